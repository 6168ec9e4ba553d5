from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.mixture import BLOCK, Mixture, share_counts

NAMES = "abcde"
WEIGHTS = st.lists(st.floats(0.05, 20), min_size=1, max_size=5).map(
    lambda w: dict(zip(NAMES, w, strict=False))
)
SEEDS = st.integers(0, 2**63 - 1)
FROZEN_CORPORA = [0, 0, 0, 2, 1, 0, 0, 0, 1, 0, 0, 1, 0, 1, 2, 0]
FROZEN_TURNS = {0: range(2999267, 2999277), 1: range(1500245, 1500249), 2: range(500488, 500490)}


def span(start: int, stop: int) -> np.ndarray:
    return np.arange(start, stop, dtype=np.int64)


@given(WEIGHTS, SEEDS, st.integers(0, 10**9))
def test_every_block_has_the_exact_shares(weights: Mapping[str, float], seed: int, block: int) -> None:
    mixture = Mixture(weights, seed)
    corpora, _ = mixture.locate(span(block * BLOCK, (block + 1) * BLOCK))
    served = np.bincount(corpora, minlength=len(weights))
    total = sum(weights.values())
    for count, weight in zip(served, weights.values(), strict=True):
        assert abs(count - weight / total * BLOCK) < 1
    assert served.tolist() == share_counts(weights).tolist()


@given(WEIGHTS, SEEDS)
def test_each_corpus_is_served_in_turn(weights: Mapping[str, float], seed: int) -> None:
    corpora, turns = Mixture(weights, seed).locate(span(0, 3 * BLOCK))
    for corpus in range(len(weights)):
        mine = turns[corpora == corpus]
        assert mine.tolist() == list(range(len(mine)))


@given(WEIGHTS, SEEDS, st.integers(0, 10**12), st.lists(st.integers(1, 700), min_size=1, max_size=5))
def test_any_chunking_gives_the_same(
    weights: Mapping[str, float], seed: int, start: int, sizes: list[int]
) -> None:
    whole = Mixture(weights, seed).locate(span(start, start + sum(sizes)))
    parts, cursor = [], start
    for size in sizes:
        parts.append(Mixture(weights, seed).locate(span(cursor, cursor + size)))
        cursor += size
    for number in range(2):
        assert np.concatenate([part[number] for part in parts]).tolist() == whole[number].tolist()
    # Ranks that take every third sequence, in any order.
    strided = Mixture(weights, seed).locate(span(start, start + sum(sizes))[::-3])
    assert strided[1].tolist() == whole[1][::-3].tolist()


@given(WEIGHTS, SEEDS, st.integers(0, BLOCK))
def test_shares_hold_inside_a_block_too(weights: Mapping[str, float], seed: int, length: int) -> None:
    corpora, _ = Mixture(weights, seed).locate(span(0, length))
    expected = share_counts(weights) * (length / BLOCK)
    assert (np.abs(np.bincount(corpora, minlength=len(weights)) - expected) <= len(weights) + 1).all()


@given(WEIGHTS, WEIGHTS, SEEDS, st.integers(0, 3 * BLOCK), st.integers(0, 10**6))
def test_a_new_stage_goes_on_where_the_last_one_stopped(
    first: Mapping[str, float], second: Mapping[str, float], seed: int, stop: int, begin: int
) -> None:
    second = {name: second.get(name, 0.0) for name in NAMES}
    first = {name: first.get(name, 0.0) for name in NAMES}
    before = Mixture(first, seed, begin=begin)
    consumed = before.consumed(begin + stop)
    assert sum(consumed.values()) == stop
    after = Mixture(second, seed, begin=begin + stop, consumed=consumed)
    served: dict[int, list[int]] = {}
    for mixture, start, end in ((before, begin, begin + stop), (after, begin + stop, begin + stop + 500)):
        for corpus, turn in zip(*mixture.locate(span(start, end)), strict=True):
            served.setdefault(int(corpus), []).append(int(turn))
    for turns in served.values():
        assert turns == list(range(len(turns)))


def test_the_seed_and_the_block_change_the_order() -> None:
    weights = {"a": 1.0, "b": 1.0}
    orders = [
        Mixture(weights, seed).locate(span(start, start + BLOCK))[0].tolist()
        for seed in (0, 1, 2**40)
        for start in (0, BLOCK, BLOCK << 33)
    ]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_order_is_frozen() -> None:
    # A change here changes what every resumed run reads: it needs a new format of the order.
    corpora, turns = Mixture({"a": 0.6, "b": 0.3, "c": 0.1}, 1234).locate(span(5_000_000, 5_000_016))
    assert corpora.tolist() == FROZEN_CORPORA
    assert {corpus: turns[corpora == corpus].tolist() for corpus in range(3)} == {
        corpus: list(turns) for corpus, turns in FROZEN_TURNS.items()
    }


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"a": 1.0, "web": -1.0}, "web is -1.0"),
        ({"web": float("nan")}, "web is nan"),
        ({"web": float("inf")}, "web is inf"),
        ({"a": 0.0, "b": 0.0}, "every weight is 0"),
        ({}, "every weight is 0"),
        ({"a": 1.0, "web": 1e-5}, "web is 1e-05, a share of less than one sequence in 4096"),
    ],
)
def test_weights_that_cannot_be_used_are_named(weights: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Mixture(weights, 0)


def test_only_the_ratio_of_weights_counts() -> None:
    shares = share_counts({"a": 3.0, "b": 1.0})
    assert shares.tolist() == [3072, 1024]
    for scale in (1e-300, 0.1, 5e307):
        assert share_counts({"a": 3.0 * scale, "b": scale}).tolist() == [3072, 1024]


def test_a_corpus_of_weight_zero_is_never_served() -> None:
    corpora, _ = Mixture({"a": 0.0, "b": 1.0}, 0).locate(span(0, 2 * BLOCK))
    assert set(corpora.tolist()) == {1}


def test_seeds_and_indices_out_of_range_are_refused() -> None:
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match="outside"):
            Mixture({"a": 1.0}, seed)
    with pytest.raises(ValueError, match="before the first, 7"):
        Mixture({"a": 1.0}, 0, begin=7).locate(span(6, 9))
    with pytest.raises(ValueError, match="below 0"):
        Mixture({"a": 1.0}, 0, consumed={"a": -1})
