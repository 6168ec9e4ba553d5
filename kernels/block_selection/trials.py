"""The choice of blocks on drawn inputs."""

from kernels.block_selection import CASES, Case
from kernels.block_selection.reference import select_by_max_direct
from kernels.block_selection.triton import Tiles, select_by_max_triton
from kernels.trial import Setting, Subject, Trial, Work


def draw(case: Case, setting: Setting) -> Trial:
    """Small whole numbers: their scores are exact and often equal, so that ties count."""
    position = setting.documents(case.rows, case.tokens, 4.0 * case.block)[1]
    numbers = {"low": -2, "high": 3, "dtype": setting.dtype}
    inputs = {
        "q": setting.integers(case.rows, case.tokens, case.heads, case.dim, **numbers),
        "k": setting.integers(case.rows, case.tokens, 1, case.dim, **numbers),
    }
    options = {"block": case.block, "count": case.chosen, "local": case.local, "position": position}
    tiles = Tiles(16, 16, 32, 1) if setting.is_small else None

    def known(chosen, peaks):
        # In order of slots: blocks that go first are equals. The best key of no block may be any token.
        chosen, order = chosen.sort(dim=-1)
        far = peaks[..., 1:].gather(-1, order).masked_fill(chosen < 0, -1)
        return chosen, peaks[..., :1], far

    return Trial(
        inputs,
        lambda q, k: known(*select_by_max_triton(q, k, **options, tiles=tiles)),
        lambda q, k: known(*select_by_max_direct(q, k, **options)),
    )


def work(case: Case) -> Work:
    """Products of all causal pairs; bytes in bfloat16 of the queries."""
    pairs = case.rows * case.tokens**2 / 2
    return Work(2.0 * pairs * case.heads * case.dim, 2.0 * case.tokens * case.heads * case.dim, 0.0, 0.0)


SUBJECTS = (
    Subject("block_selection.peak", CASES, lambda tokens: Case(1, tokens, 4, 1, 128, 128, 16, 1), draw, work),
)
