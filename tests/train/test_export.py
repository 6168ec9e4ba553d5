"""An export reads a file's worth of a checkpoint at a time, and writes what the whole model would give."""

import errno
import filecmp
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from conf.errors import CheckpointError, StorageError
from model.hf.files import INDEX, SINGLE, write_shard
from model.hf.pretrained import save_pretrained
from parallel.config.degrees import Degrees
from parallel.mesh.axes import open_axes
from parallel.mesh.world import World
from tests.live_bytes import LiveBytes
from tests.train.runs import model_of
from tests.train.saved_runs import save_run
from tests.worlds import run_world
from train.config.reading import open_to_read
from train.eval import exported
from train.eval.exported import Form, export
from train.export import main

DIGEST = "ab" * 32
SMALL = ("data=text", "data.directory=x", "data.corpora.documents.source=x", "data.tokenizer.vocab_size=400")
SIZES = ("model.width=32", "model.vocab_size=448", "moe.num_experts=8", "moe.hidden=16")
# Experts that are stacked here and apart there, with an MTP module; and stacked on both sides, transposed.
FAMILIES = {
    "qwen3_next": ("model=qwen3_next_small", "model.mtp.depth=1"),
    "gpt_oss": ("model=gpt_oss_small",),
}
# 10^9 bytes: everything in one file; some tensors in each; a file for each tensor.
SHARDS = (5.0, 1e-4, 1e-9)


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    directory = tmp_path_factory.mktemp("saved") / request.param
    save_run([*SMALL, *FAMILIES[request.param], *SIZES, f"run.dir={directory}"], tokenizer=DIGEST)
    return request.param, directory


def assert_same(found: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names
    assert filecmp.cmpfiles(found, expected, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("shard_gb", SHARDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_own", [False, True])
def test_files_are_those_of_the_model_in_memory(
    run: tuple[str, Path], tmp_path: Path, shard_gb: float, dtype: str, is_own: bool
) -> None:
    family, directory = run
    model_type = "weft" if is_own else family
    form = (f"model_type={model_type}", f"dtype={dtype}", f"shard_gb={shard_gb}")
    main([f"run={directory}", f"to={tmp_path}/found", *form])
    save_pretrained(
        model_of(directory),
        tmp_path / "expected",
        model_type=model_type,
        dtype=getattr(torch, dtype),
        shard_bytes=int(shard_gb * 1e9),
        tokenizer_digest=DIGEST,
        facts={} if is_own else {"max_position_embeddings": 4096},
    )
    assert_same(tmp_path / "found", tmp_path / "expected")
    assert (tmp_path / "found" / (SINGLE if shard_gb == 5.0 else INDEX)).exists()
    assert len(list(tmp_path.iterdir())) == 2


def export_here(rank: int, size: int, directory: Path, to: Path, shard_bytes: int, fails: int = -1) -> int:
    """Exports on one of several ranks; gives how many files this one wrote."""
    count = 0

    def counted(beside: Path, number: int, shard: dict[str, torch.Tensor]) -> None:
        nonlocal count
        if rank == fails and count == 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(beside))
        write_shard(beside, number, shard)
        count += 1

    exported.write_shard = counted
    world = World(rank, size, torch.device("cpu"), open_axes(Degrees(dp_shard=size), rank))
    form = Form(None, torch.float32, shard_bytes)
    export(str(directory), open_to_read(str(directory), None, (), 1), to, form, world)
    return count


def test_ranks_write_the_same_files_between_them(run: tuple[str, Path], tmp_path: Path) -> None:
    _, directory = run
    main([f"run={directory}", f"to={tmp_path}/one", "shard_gb=1e-4"])
    counts = run_world(2, export_here, directory, tmp_path / "two", 100_000)
    assert_same(tmp_path / "two", tmp_path / "one")
    files = len(list((tmp_path / "one").glob("model-*.safetensors")))
    assert sorted(counts) == [files // 2, files - files // 2]
    assert files > 2


def refused_here(rank: int, size: int, directory: Path, to: Path) -> str:
    """What an export says whose second rank has no room."""
    with pytest.raises(StorageError) as caught:
        export_here(rank, size, directory, to, 50_000, 1)
    return str(caught.value)


def test_a_rank_that_cannot_write_leaves_nothing(run: tuple[str, Path], tmp_path: Path) -> None:
    _, directory = run
    for said in run_world(2, refused_here, directory, tmp_path / "two"):
        assert said.startswith(f"{tmp_path}/two not written: rank 1: ")
        assert "the disk is full" in said
    assert list(tmp_path.iterdir()) == []


def peak_bytes(overrides: Sequence[str], root: Path, shard_bytes: int) -> tuple[int, int]:
    """Bytes of tensors that an export holds at most, and those of the model."""
    directory = root / "run"
    (model,) = save_run([*SMALL, *overrides, f"run.dir={directory}"]).values()
    whole = sum(x.nbytes for x in model.state_dict().values())
    del model
    config, world = open_to_read(str(directory), None, (), 1), World.alone(torch.device("cpu"))
    form = Form("weft" if "weft" in root.name else None, torch.float32, shard_bytes)
    with LiveBytes(()) as live:
        export(str(directory), config, root / "hub", form, world)
    return live.peak, whole


@pytest.mark.parametrize("name", ["hub", "weft"])
def test_memory_holds_a_file_and_not_the_model(tmp_path: Path, name: str) -> None:
    keys = ("model=mixtral_small", *SIZES, "moe.num_experts=16", "moe.hidden=64")
    shard = 60_000
    found = {}
    for depth in (2, 8):
        root = tmp_path / f"{name} {depth}"
        found[depth], whole = peak_bytes([*keys, f"model.depth={depth}"], root, shard)
        assert whole > 4 * shard * depth
    # As read and as written. Where experts stand apart no stack of them is read; in our own form it is one
    # tensor, and so a file.
    stack = 16 * 2 * 64 * 32 * 4
    assert found[8] <= found[2] * 1.05
    assert shard / 2 < found[8] < 2.1 * (stack if name == "weft" else shard)
    assert 2.1 * shard < stack


def test_what_exists_is_refused_before_anything_is_read(run: tuple[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists; export to a directory that does not"):
        main([f"run={run[1]}", f"to={tmp_path}"])
