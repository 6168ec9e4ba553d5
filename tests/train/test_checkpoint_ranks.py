"""Two real processes: shards, resharding, and failures that every rank learns of."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from conf.errors import CheckpointError, StorageError
from tests.worlds import run_world
from train.checkpoint import transient
from train.checkpoint.storage import DigestingFileSystem, DigestingStream
from train.checkpoint.store import CheckpointStore


def trained(seed: int, size: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of odd shapes after two AdamW steps, sharded over the ranks when there are several."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    if size > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
    for _ in range(2):
        model(torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, seed: int) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    random_state = torch.full((8,), 10 * seed + rank, dtype=torch.uint8)
    return {"model": weights, "optim": moments, "rng": {f"rank{rank}": random_state}, "seen": seed}


def full(value: Any) -> Any:
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().clone() if isinstance(value, Tensor) else value


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, optimizer_state = get_state_dict(model, optimizer)
    moments: dict[str, Any] = dict(optimizer_state)
    flat = {f"model.{name}": full(value) for name, value in weights.items()}
    for name, values in moments["state"].items():
        flat |= {f"optim.{name}.{part}": full(value) for part, value in values.items()}
    return flat | {"lr": moments["param_groups"][0]["lr"]}


def save(rank: int, size: int, directory: Path) -> None:
    model, optimizer = trained(1, size)
    store = CheckpointStore(directory / "checkpoints", keep=2, rank=rank, size=size)
    store.save(4, state_of(model, optimizer, rank, 1), {"cursor": 9})
    expected = full_state(model, optimizer)
    if rank == 0:
        torch.save(expected, directory / "expected.pt")


def load(rank: int, size: int, directory: Path) -> None:
    model, optimizer = trained(2, size)
    state = state_of(model, optimizer, rank, 2)
    store = CheckpointStore(directory / "checkpoints", keep=2, rank=rank, size=size)
    loaded = store.load_latest(state, optional=("rng",))
    assert loaded is not None
    assert (loaded.step, loaded.extra) == (4, {"cursor": 9})
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    expected, found = torch.load(directory / "expected.pt", weights_only=True), full_state(model, optimizer)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        same = torch.equal(value, found[name]) if isinstance(value, Tensor) else value == found[name]
        assert same, f"{name}: {value} != {found[name]}"
    assert state["seen"] == 1
    had_this_rank = not loaded.skipped
    expected_byte = 10 + rank if had_this_rank else 20 + rank
    assert state["rng"][f"rank{rank}"].eq(expected_byte).all()


@pytest.mark.slow
@pytest.mark.parametrize(("saved_by", "loaded_by"), [(2, 2), (2, 1), (1, 2)])
def test_shards_come_back_bit_for_bit_in_any_number_of_ranks(
    tmp_path: Path, saved_by: int, loaded_by: int
) -> None:
    run_or_call(save, saved_by, tmp_path)
    shards = list((tmp_path / "checkpoints" / "step_00000004").glob("*.distcp"))
    assert len(shards) == saved_by
    run_or_call(load, loaded_by, tmp_path)


def run_or_call(function: Callable[[int, int, Path], None], size: int, directory: Path) -> None:
    if size > 1:
        run_world(size, function, directory)
    else:
        function(0, 1, directory)


class FullDisk(DigestingStream):
    def write(self, data: Any, /) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


class BrokenOnOneRank(CheckpointStore):
    """A store whose rank 1 finds the disk full."""

    def _open_file_system(self) -> DigestingFileSystem:
        fs = DigestingFileSystem()
        if self._ranks.rank == 1:
            fs.open_stream = FullDisk
        return fs


def faults(rank: int, size: int, directory: Path) -> None:
    root = directory / "checkpoints"
    store = CheckpointStore(root, keep=2, rank=rank, size=size)
    weights = {f"w{rank}": torch.full((6,), float(rank))}
    store.save(1, {"model": weights}, {})

    # A full disk on one rank is an error on both, and leaves step 1 alone.
    with pytest.raises(StorageError, match=r"rank 1: .*__1_0\.distcp: cannot write: the disk is full"):
        BrokenOnOneRank(root, keep=2, rank=rank, size=size).save(2, {"model": weights}, {})
    dist.barrier()
    assert [path.name for path in root.iterdir()] == ["step_00000001"]

    # A state that only one rank cannot store.
    with pytest.raises(RuntimeError, match="rank 1: TypeError"):
        store.save(2, {"model": weights, "bad": object() if rank == 1 else 1}, {})
    dist.barrier()

    # A key that only one rank lacks.
    wanted = {"model": {f"w{rank}": torch.zeros(6)} | ({"new": torch.zeros(1)} if rank == 1 else {})}
    with pytest.raises(CheckpointError, match=r"1 missing: model\.new"):
        store.load_latest(wanted)

    # Damage that only one rank reads sends both to the older checkpoint.
    store.save(2, {"model": weights}, {})
    for victim in ("__0_0.distcp", "__1_0.distcp"):
        path = store.save(3, {"model": weights}, {}) / victim
        dist.barrier()
        if rank == 0:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        dist.barrier()
        target = {"model": {f"w{rank}": torch.zeros(6)}}
        loaded = store.load_latest(target)
        assert loaded is not None
        assert loaded.step == 2
        assert len(loaded.set_aside) == 1
        assert victim in loaded.set_aside[0]
        assert target["model"][f"w{rank}"].eq(rank).all()

    # Retention keeps two on the shared disk.
    for step in (5, 6, 7):
        store.save(step, {"model": weights}, {})
        dist.barrier()
        assert len(store.candidates()) == 2
        dist.barrier()
    assert store.candidates() == [7, 6]


def test_a_failure_on_one_rank_is_the_same_error_on_every_rank(tmp_path: Path) -> None:
    run_world(2, faults, tmp_path)


def load_beside_a_blind_rank(rank: int, size: int, directory: Path) -> None:
    """Rank 1 reads no file of weights, as a node does that lost its path to them."""
    opened = Path.open

    def failing(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.suffix == ".distcp":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return opened(path, *args, **kwargs)

    transient.WAITS = (0.0,)
    if rank == 1:
        Path.open = failing
    store = CheckpointStore(directory / "checkpoints", keep=2, rank=rank, size=size)
    model, optimizer = trained(2, size)
    try:
        with pytest.raises(StorageError, match=r"not loaded: rank 1: .*Input/output error"):
            store.load_latest(state_of(model, optimizer, rank, 2), optional=("rng",))
    finally:
        Path.open = opened
        transient.WAITS = (0.1, 0.5, 2.0)


def test_a_checkpoint_that_one_rank_cannot_read_is_kept(tmp_path: Path) -> None:
    run_world(2, save, tmp_path)
    run_world(2, load_beside_a_blind_rank, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000004"]
