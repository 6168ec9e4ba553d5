"""Rotary positions on drawn inputs."""

from kernels.rotary import CASES, Case
from kernels.rotary.reference import rotate_direct
from kernels.rotary.triton import Tiles, rotate_triton
from kernels.trial import Setting, Subject, Trial, Work


def draw(case: Case, setting: Setting) -> Trial:
    """Heads that are a part of wider ones, turned by any angles."""
    x = setting.normal(case.rows, case.tokens, case.heads, case.dim + 1)
    angles = setting.uniform(case.rows, case.tokens, case.turned // 2, high=6.3)
    cos, sin = angles.cos(), angles.sin()
    tiles = Tiles(2, 1) if setting.is_small else None
    return Trial(
        {"x": x},
        lambda x: (rotate_triton(x[..., 1:], cos, sin, case.layout, on_last=case.on_last, tiles=tiles),),
        lambda x: (rotate_direct(x[..., 1:], cos, sin, case.layout, on_last=case.on_last),),
    )


def work(case: Case) -> Work:
    """Bytes in bfloat16 of x and its like, each way, and the tables in float32."""
    size = 2.0 * case.rows * case.tokens * case.heads * case.dim
    tables = 4.0 * case.rows * case.tokens * case.turned
    return Work(0.0, 2 * size + tables, 0.0, 2 * size + tables)


SUBJECTS = (
    Subject("rotary", CASES, lambda tokens: Case(1, tokens, 32, 128, 128, "half_split", False), draw, work),
    Subject(
        "rotary.last",
        (),
        lambda tokens: Case(1, tokens, 64, 512, 64, "interleaved", True),
        draw,
        work,
    ),
)
