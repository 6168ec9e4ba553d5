"""The norms on drawn inputs."""

from kernels.norm import CASES, GATED_CASES, Case, GatedCase
from kernels.norm.reference import gated_rms_norm_direct, rms_norm_direct, unit_norm_direct
from kernels.norm.triton import Tiles, gated_rms_norm_triton, rms_norm_triton, unit_norm_triton
from kernels.trial import Setting, Subject, Trial, Work

EPS = 1e-6


def _tiles(setting: Setting) -> Tiles | None:
    return Tiles(2, 1) if setting.is_small else None


def draw(case: Case, setting: Setting) -> Trial:
    """The plain norm; the weight is in float32, as masters are kept."""
    x = setting.normal(case.rows, case.width, scale=3.0)
    weight = setting.uniform(case.width, low=-2.0, high=2.0)
    options = {"is_zero_centered": case.is_zero_centered}
    return Trial(
        {"x": x, "weight": weight},
        lambda x, weight: (rms_norm_triton(x, weight, EPS, **options, tiles=_tiles(setting)),),
        lambda x, weight: (rms_norm_direct(x, weight, EPS, **options),),
    )


def draw_unit(case: Case, setting: Setting) -> Trial:
    """Rows to unit length, of a part of wider rows."""
    x = setting.normal(case.rows, 2, case.width, scale=3.0)
    return Trial(
        {"x": x},
        lambda x: (unit_norm_triton(x[:, 1], factor=0.3, tiles=_tiles(setting)),),
        lambda x: (unit_norm_direct(x[:, 1], factor=0.3, eps=EPS),),
    )


def draw_gated(case: GatedCase, setting: Setting) -> Trial:
    """The gated norm of heads; weights by head where gates come first, as groups of channels have them."""
    shape = (case.rows, case.heads, case.width)
    x, gate = setting.normal(*shape, scale=3.0), setting.normal(*shape)
    weight = setting.uniform(case.heads if case.gates_first else 1, case.width, low=-2.0, high=2.0)
    options = {"kind": case.kind, "gates_first": case.gates_first}
    return Trial(
        {"x": x, "gate": gate, "weight": weight},
        lambda x, gate, weight: (
            gated_rms_norm_triton(x, gate, weight, EPS, **options, tiles=_tiles(setting)),
        ),
        lambda x, gate, weight: (gated_rms_norm_direct(x, gate, weight, EPS, **options),),
    )


def work(case: Case) -> Work:
    """Bytes in bfloat16: x and y; x, dy and dx."""
    size = 2.0 * case.rows * case.width
    return Work(0.0, 2 * size, 0.0, 3 * size)


def gated_work(case: GatedCase) -> Work:
    """Bytes in bfloat16: x, gate and y; x, gate, dy, dx and dgate."""
    size = 2.0 * case.rows * case.heads * case.width
    return Work(0.0, 3 * size, 0.0, 5 * size)


SUBJECTS = (
    Subject("norm", CASES, lambda tokens: Case(tokens, 4096), draw, work),
    Subject("norm.unit", CASES, lambda tokens: Case(tokens * 16, 128), draw_unit, work),
    Subject(
        "norm.gated",
        GATED_CASES,
        lambda tokens: GatedCase(tokens, 32, 128, "silu", False),
        draw_gated,
        gated_work,
    ),
    Subject(
        "norm.groups",
        GATED_CASES,
        lambda tokens: GatedCase(tokens, 8, 512, "silu", True),
        draw_gated,
        gated_work,
        {"norm_backward@3.9": "eight moves, which the older release does without"},
    ),
)
