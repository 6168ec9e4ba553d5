from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conf.errors import DataError
from data.merge import TokenFileWriter
from data.packing import Packing, permute, read_windows
from data.token_file import TokenFile

SEEDS = st.integers(0, 2**63 - 1)
FROZEN_WINDOWS = [39, 73, 67, 19, 77, 92, 21, 74, 28, 96, 52, 42]


def file_of(tmp_path: Path, lengths: list[int]) -> TokenFile:
    """A file whose tokens are their own positions."""
    with TokenFileWriter(tmp_path / "x", np.dtype(np.int32)) as writer:
        for length, end in zip(lengths, np.cumsum(lengths), strict=True):
            writer.add(np.arange(end - length, end, dtype=np.int32), 0)
    return TokenFile(tmp_path / "x")


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@example(1, 0)
@example(2, 0)
@example(64, 7)
@example(65, 7)
def test_a_permutation_takes_each_index_once(size: int, key: int) -> None:
    taken = permute(np.arange(size), size, np.full(size, key, np.uint64))
    assert sorted(taken.tolist()) == list(range(size))


@given(st.integers(1, 2**47), st.integers(0, 2**64 - 1))
def test_a_permutation_of_any_size_stays_inside(size: int, key: int) -> None:
    indices = np.unique(np.linspace(0, size - 1, 50).astype(np.int64))
    taken = permute(indices, size, np.full(len(indices), key, np.uint64))
    assert len(set(taken.tolist())) == len(indices)
    assert taken.min() >= 0
    assert taken.max() < size


@pytest.mark.parametrize("size", [2, 3, 5, 24, 100])
def test_every_place_is_as_likely_for_every_index(size: int) -> None:
    keys = np.random.default_rng(0).integers(0, 2**63, 20_000).astype(np.uint64)
    for index in (0, size - 1):
        taken = permute(np.full(len(keys), index), size, keys)
        counts = np.bincount(taken, minlength=size)
        expected = len(keys) / size
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        # Mean size - 1, deviation sqrt(2 (size - 1)); six deviations.
        assert chi_square < size - 1 + 6 * np.sqrt(2 * (size - 1)) + 6


def test_all_orders_of_a_few_come_up_alike() -> None:
    keys = np.arange(24_000, dtype=np.uint64)
    orders = np.stack([permute(np.full(len(keys), index), 4, keys) for index in range(4)], axis=1)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 80


@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_each_epoch_has_each_window_once_in_its_own_order(tmp_path: Path, seed: int) -> None:
    packing = Packing(file_of(tmp_path, [50, 51]), 4, seed, 3)
    assert packing.num_windows == 25
    ids = packing.window_ids(np.arange(75))
    epochs = [ids[start : start + 25].tolist() for start in (0, 25, 50)]
    assert all(sorted(epoch) == list(range(25)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    others = [Packing(packing.file, 4, seed + 1, 3), Packing(packing.file, 4, seed, 2)]
    assert all(other.window_ids(np.arange(25)).tolist() != epochs[0] for other in others)


@given(SEEDS, st.lists(st.integers(0, 10**15), min_size=1, max_size=30))
def test_a_window_depends_on_its_turn_alone(
    tmp_path_factory: pytest.TempPathFactory, seed: int, turns: list[int]
) -> None:
    packing = Packing(file_of(tmp_path_factory.mktemp("turns"), [100]), 9, seed, 0)
    together = packing.window_ids(np.array(turns))
    alone = [int(packing.window_ids(np.array([turn]))[0]) for turn in turns]
    assert together.tolist() == alone


def test_the_order_is_frozen(tmp_path: Path) -> None:
    # A change here changes what every resumed run reads: it needs a new format of the order.
    packing = Packing(file_of(tmp_path, [1001]), 10, 42, 1)
    assert packing.window_ids(np.arange(250, 262)).tolist() == FROZEN_WINDOWS


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 9))
def test_windows_cover_the_stream_and_mark_documents(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence_length: int
) -> None:
    file = file_of(tmp_path_factory.mktemp("windows"), lengths)
    total = sum(lengths)
    if total <= sequence_length:
        with pytest.raises(DataError, match=rf": {total} tokens, .* = {sequence_length + 1}; add"):
            Packing(file, sequence_length, 0, 0)
        return
    packing = Packing(file, sequence_length, 0, 0)
    ids = np.sort(packing.window_ids(np.arange(packing.num_windows)))
    windows = packing.read(ids)
    first_tokens = {sum(lengths[:number]) for number, length in enumerate(lengths) if length}
    for row in range(packing.num_windows):
        token_ids = list(range(row * sequence_length, (row + 1) * sequence_length + 1))
        assert windows.tokens[row].tolist() == token_ids  # a token is its own position
        marks = [token in first_tokens and column > 0 for column, token in enumerate(token_ids)]
        assert windows.starts[row].tolist() == marks


@given(SEEDS, st.integers(2, 200), st.integers(1, 199))
def test_two_epochs_learn_every_token_and_one_leaves_out_less_than_a_window(
    tmp_path_factory: pytest.TempPathFactory, seed: int, total: int, sequence_length: int
) -> None:
    file = file_of(tmp_path_factory.mktemp("epochs"), [total])
    packing = Packing(file, min(sequence_length, total - 1), seed, 0)
    count, learned = packing.num_windows, []
    for epoch in range(4):
        windows = packing.read(packing.window_ids(np.arange(epoch * count, (epoch + 1) * count)))
        targets = windows.tokens[:, 1:].flatten().tolist()
        assert len(targets) == len(set(targets)) == total - 1 - packing.left_out
        learned.append(set(targets))
    assert packing.left_out < packing.sequence_length
    assert all(a | b == set(range(1, total)) for a, b in pairwise(learned))
    ids = packing.window_ids(np.arange(4 * count))
    same_tokens = {tuple(row) for row in packing.read(np.unique(ids)).tokens.tolist()}
    assert len(same_tokens) == len(np.unique(ids))


def test_no_windows_are_no_rows(tmp_path: Path) -> None:
    windows = read_windows(file_of(tmp_path, [20]), np.empty(0, np.int64), 4)
    assert windows.tokens.shape == windows.starts.shape == (0, 5)
