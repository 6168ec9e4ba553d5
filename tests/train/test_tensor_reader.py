"""Rows of tensors from the files of a checkpoint, however these hold them."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conf.errors import CheckpointError
from parallel.shard.shard_map import ShardMap, TensorSlice
from parallel.shard.shard_view import GlobalShardView
from tests.live_bytes import LiveBytes
from train.checkpoint.store import CheckpointStore

WHOLE = torch.arange(6 * 4 * 3, dtype=torch.float32).view(6, 4, 3)


def block(first: tuple[int, int], sizes: tuple[int, int]) -> TensorSlice:
    corner = (*first, 0)
    return TensorSlice(corner, corner, (*sizes, 3))


def in_blocks(*slices: TensorSlice) -> Tensor:
    """WHOLE as some blocks of it are saved."""
    return GlobalShardView.of(WHOLE.clone(), ShardMap(WHOLE.shape, slices))


STORED = {
    "whole": (WHOLE, WHOLE),
    "transposed": (WHOLE.transpose(0, 2), WHOLE.transpose(0, 2)),
    "part of a larger one": (WHOLE[:, 1:3], WHOLE[:, 1:3]),
    "by rows": (in_blocks(block((0, 0), (1, 4)), block((1, 0), (3, 4)), block((4, 0), (2, 4))), WHOLE),
    "by columns": (in_blocks(block((0, 0), (6, 1)), block((0, 1), (6, 3))), WHOLE),
    "both": (in_blocks(block((0, 0), (2, 4)), block((2, 0), (4, 2)), block((2, 2), (4, 2))), WHOLE),
    "bfloat16": (WHOLE.bfloat16(), WHOLE.bfloat16()),
    "one dim": (torch.arange(5), torch.arange(5)),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CheckpointStore:
    store = CheckpointStore(tmp_path_factory.mktemp("reader") / "checkpoints", keep=2)
    state = {name: stored for name, (stored, _) in STORED.items()}
    more = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    # The blocks of this one leave a row out.
    lost = in_blocks(block((0, 0), (2, 4)), block((3, 0), (3, 4)))
    store.save(1, {"model": state | more | {"lost": lost}}, {})
    return store


@pytest.mark.parametrize("name", STORED)
def test_rows_are_those_that_were_saved(store: CheckpointStore, name: str) -> None:
    _, expected = STORED[name]
    with store.open_tensors({}, partial=("none",)) as opened:
        assert opened is not None
        for first in range(len(expected) + 1):
            for stop in range(first, len(expected) + 1):
                found = opened.reader.rows(f"model.{name}", first, stop)
                assert torch.equal(found, expected[first:stop])
                assert found.is_contiguous()
                assert found.dtype == expected.dtype


def test_a_scalar_is_one_row_and_nothing_is_none(store: CheckpointStore) -> None:
    with store.open_tensors({}, partial=("none",)) as opened:
        assert opened is not None
        assert opened.reader.rows("model.scalar", 0, 1).tolist() == [3.5]
        assert opened.reader.rows("model.empty", 0, 0).shape == (0, 4)


def test_rows_that_no_block_has_are_no_numbers(store: CheckpointStore) -> None:
    with store.open_tensors({}, partial=("none",)) as opened:
        assert opened is not None
        assert torch.equal(opened.reader.rows("model.lost", 3, 6), WHOLE[3:])
        with pytest.raises(CheckpointError, match=r"holds no blocks for 12 numbers of model\.lost"):
            opened.reader.rows("model.lost", 1, 4)


def test_memory_holds_the_rows_alone(tmp_path: Path) -> None:
    store, rows = CheckpointStore(tmp_path / "checkpoints", keep=2), 3
    store.save(1, {"w": torch.randn(500, 8)}, {})
    with store.open_tensors({}, partial=("none",)) as opened:
        assert opened is not None
        with LiveBytes(()) as live:
            opened.reader.rows("w", 200, 200 + rows)
    assert live.peak == rows * 8 * 4


def test_a_checkpoint_that_is_deleted_meanwhile_is_read_to_its_end(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    path = store.save(1, {"w": WHOLE}, {})
    with store.open_tensors({}, partial=("none",)) as opened:
        assert opened is not None
        shutil.rmtree(path)
        assert torch.equal(opened.reader.rows("w", 0, 6), WHOLE)


def test_a_file_that_is_cut_after_it_was_verified_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    path = store.save(1, {"w": WHOLE}, {})
    (file,) = path.glob("*.distcp")
    with store.open_tensors({}, partial=("none",)) as opened:
        assert opened is not None
        opened.reader.rows("w", 0, 1)
        with file.open("r+b") as opened_file:
            opened_file.truncate(file.stat().st_size // 2)
        with pytest.raises(CheckpointError, match=rf"{file}: ends after"):
            opened.reader.rows("w", 5, 6)
