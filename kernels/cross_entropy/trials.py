"""The linear cross entropy on drawn inputs."""

from kernels.cross_entropy import CASES, IGNORED, Case
from kernels.cross_entropy.reference import linear_cross_entropy_direct
from kernels.cross_entropy.triton import Tiles, linear_cross_entropy_triton
from kernels.trial import Setting, Subject, Trial, Work

# The interpreter takes a token at a time.
SMALL = tuple(case for case in CASES if case.tokens < 100)


def draw(case: Case, setting: Setting) -> Trial:
    """About every fourth target is ignored."""
    x = setting.normal(case.tokens, case.width)
    weight = setting.normal(case.vocabulary, case.width)
    targets = setting.integers(case.tokens, low=0, high=case.vocabulary)
    targets = targets.masked_fill(setting.integers(case.tokens, low=0, high=4) == 0, IGNORED)
    tiles = Tiles(5, 16, 1) if setting.is_small else None
    return Trial(
        {"x": x, "weight": weight},
        lambda x, weight: linear_cross_entropy_triton(x, weight, targets, case.form, tiles=tiles),
        lambda x, weight: linear_cross_entropy_direct(x, weight, targets, case.form),
    )


def work(case: Case) -> Work:
    """Forward and both gradients are one pass; bytes in bfloat16, of the weight's gradient in float32."""
    numbers = case.tokens * case.width
    weights = case.vocabulary * case.width
    flops = 6.0 * case.tokens * case.width * case.vocabulary
    return Work(flops, 2.0 * (2 * numbers + weights) + 4.0 * weights, 0.0, 4.0 * numbers + 6.0 * weights)


SUBJECTS = (Subject("cross_entropy", SMALL, lambda tokens: Case(tokens, 4096, 129280), draw, work),)
