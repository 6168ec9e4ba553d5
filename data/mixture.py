"""Which corpus serves which sequence: exact shares in every block, as a pure function of (seed, index)."""

import math
from collections.abc import Mapping

import numpy as np

BLOCK = 4096  # sequences in which every share is exact, and the inverse of the smallest share
_MAX_SEED = 1 << 63
_STREAM = 0x6D69780000000000  # sets this use of the seed apart from others


class Mixture:
    """The order in which corpora serve one endless stream of sequences.

    In each block of BLOCK sequences every corpus has the same count, its share rounded by largest
    remainder; inside a block a corpus is spread evenly, with jitter. Access is random, O(BLOCK).
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        seed: int,
        *,
        begin: int = 0,
        consumed: Mapping[str, int] | None = None,
    ) -> None:
        """`weights` by corpus name need not sum to one; a corpus is known by its index among them.
        `begin` is the first index that this mixture serves, and `consumed` how many sequences each corpus
        has served before: a new stage goes on where the last one stopped.

        Raises ValueError for weights that are negative, not finite, all zero, or above zero but too
        small for one sequence in a block; for a seed outside [0, 2**63); for negative counts.
        """
        if not 0 <= seed < _MAX_SEED:
            raise ValueError(f"seed {seed} is outside [0, 2**63)")
        self.names = list(weights)
        self.counts = share_counts(weights)
        self._seed = seed
        self._begin = begin
        before = consumed or {}
        self._consumed = np.array([before.get(name, 0) for name in weights], np.int64)
        if begin < 0 or (self._consumed < 0).any():
            raise ValueError(f"{begin=}, {consumed=}: neither may be below 0")
        self._last: tuple[int, np.ndarray, np.ndarray] | None = None

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For int64 sequence indices: the corpus of each, and how many it has served before, int64.

        Raises ValueError for an index before `begin`.
        """
        relative = self._relative(indices)
        blocks, positions = relative // BLOCK, relative % BLOCK
        corpora, turns = np.empty_like(relative), np.empty_like(relative)
        for block in np.unique(blocks):
            chosen = blocks == block
            order, ranks = self._block(int(block))
            corpora[chosen] = order[positions[chosen]]
            turns[chosen] = ranks[positions[chosen]]
        return corpora, self._consumed[corpora] + blocks * self.counts[corpora] + turns

    def consumed(self, index: int) -> dict[str, int]:
        """Sequences that each corpus has served before `index`, earlier stages included."""
        block, position = divmod(int(self._relative(np.array([index], np.int64))[0]), BLOCK)
        order, _ = self._block(block)
        partial = np.bincount(order[:position], minlength=len(self.counts))
        total = self._consumed + block * self.counts + partial
        return dict(zip(self.names, total.tolist(), strict=True))

    def _relative(self, indices: np.ndarray) -> np.ndarray:
        relative = indices - self._begin
        if len(relative) and int(relative.min()) < 0:
            raise ValueError(f"sequence {int(indices.min())} is before the first, {self._begin}")
        return relative

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        last = self._last  # one read: another thread may set it in between
        if last is not None and last[0] == block:
            return last[1], last[2]
        corpora = np.repeat(np.arange(len(self.counts)), self.counts)
        ranks = np.concatenate([np.arange(count) for count in self.counts])
        # Raw output: numpy keeps it the same for ever, which it does not promise for distributions.
        raw = np.random.Philox(key=[self._seed, _STREAM], counter=[0, 0, 0, block]).random_raw(BLOCK)
        jitter = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
        order = np.argsort((ranks + jitter) / self.counts[corpora], kind="stable")
        self._last = (block, corpora[order], ranks[order])
        return corpora[order], ranks[order]


def share_counts(weights: Mapping[str, float]) -> np.ndarray:
    """Sequences of each corpus in a block, int64, summing to BLOCK. Raises ValueError as Mixture does."""
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"the weight of {name} is {weight}; it must be finite and at least 0")
    largest = max(weights.values(), default=0.0)
    if largest == 0:
        raise ValueError("every weight is 0; at least one must be above 0")
    # Scaled first, so that no sum overflows; summed exactly, so that the order of the names has no say.
    scaled = [weight / largest for weight in weights.values()]
    total = math.fsum(scaled)
    exact = np.array([weight / total * BLOCK for weight in scaled], np.float64)
    counts = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[: BLOCK - int(counts.sum())]] += 1
    for (name, weight), count in zip(weights.items(), counts, strict=True):
        if weight > 0 and count == 0:
            raise ValueError(
                f"the weight of {name} is {weight}, a share of less than one sequence in {BLOCK}; "
                "raise it or leave the corpus out"
            )
    return counts
