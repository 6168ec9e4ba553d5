"""Activations on drawn inputs."""

from kernels.activation import CASES, Case, is_gated
from kernels.activation.reference import activate_direct
from kernels.activation.triton import Tiles, activate_triton
from kernels.trial import Setting, Subject, Trial, Work


def draw(case: Case, setting: Setting) -> Trial:
    """Gates and ups on both sides of the limit."""
    factors = 2 if is_gated(case.kind) else 1
    hidden = setting.normal(case.rows, factors * case.hidden, scale=2.0)
    options = {"limit": case.limit, "clamps_product": case.clamps_product}
    tiles = Tiles(2, 16, 1) if setting.is_small else None
    return Trial(
        {"hidden": hidden},
        lambda hidden: (activate_triton(hidden, case.kind, **options, tiles=tiles),),
        lambda hidden: (activate_direct(hidden, case.kind, **options),),
    )


def work(case: Case) -> Work:
    """Bytes in bfloat16: gates, ups and results; gates, ups, and the gradients of all three."""
    size, factors = 2.0 * case.rows * case.hidden, 2 if is_gated(case.kind) else 1
    return Work(0.0, (factors + 1) * size, 0.0, (2 * factors + 1) * size)


SUBJECTS = (
    Subject("activation", CASES, lambda tokens: Case(tokens, 4096, "swiglu", None, False), draw, work),
)
