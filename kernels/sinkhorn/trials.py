"""Sinkhorn-Knopp on drawn inputs."""

from kernels.sinkhorn import CASES, Case
from kernels.sinkhorn.reference import sinkhorn_iterated
from kernels.sinkhorn.triton import Tiles, sinkhorn_triton
from kernels.trial import Setting, Subject, Trial, Work

EPS = 1e-6


def draw(case: Case, setting: Setting) -> Trial:
    """Matrices far from doubly stochastic."""
    logits = setting.normal(case.matrices, case.streams, case.streams, scale=2.0)
    options = {"iterations": case.iterations, "eps": EPS}
    tiles = Tiles(4, 1) if setting.is_small else None
    return Trial(
        {"logits": logits},
        lambda logits: (sinkhorn_triton(logits, **options, tiles=tiles),),
        lambda logits: (sinkhorn_iterated(logits, **options),),
    )


def work(case: Case) -> Work:
    """Bytes in float32 of the matrices: in and out; in, their gradients in and out."""
    size = 4.0 * case.matrices * case.streams**2
    return Work(0.0, 2 * size, 0.0, 3 * size)


SUBJECTS = (Subject("sinkhorn", CASES, lambda tokens: Case(tokens, 4, 20), draw, work),)
