"""The norms on drawn inputs."""

from kernels.norm.reference import gated_rms_norm_direct, rms_norm_direct, unit_norm_direct
from kernels.norm.shapes import GATED_SHAPES, SHAPES, GatedShape, Shape
from kernels.norm.triton import Tiles, gated_rms_norm_triton, rms_norm_triton, unit_norm_triton
from kernels.spec import InputFactory, KernelCase, KernelCost, KernelSpec

EPS = 1e-6


def _tiles(factory: InputFactory) -> Tiles | None:
    return Tiles(2, 1) if factory.uses_small_tiles else None


def draw(shape: Shape, factory: InputFactory) -> KernelCase:
    """The plain norm; the weight is in float32, as masters are kept."""
    x = factory.normal(shape.rows, shape.width, scale=3.0)
    weight = factory.uniform(shape.width, low=-2.0, high=2.0)
    options = {"is_zero_centered": shape.is_zero_centered}
    return KernelCase(
        {"x": x, "weight": weight},
        lambda x, weight: (rms_norm_triton(x, weight, EPS, **options, tiles=_tiles(factory)),),
        lambda x, weight: (rms_norm_direct(x, weight, EPS, **options),),
    )


def draw_unit(shape: Shape, factory: InputFactory) -> KernelCase:
    """Rows to unit length, of a part of wider rows."""
    x = factory.normal(shape.rows, 2, shape.width, scale=3.0)
    return KernelCase(
        {"x": x},
        lambda x: (unit_norm_triton(x[:, 1], factor=0.3, tiles=_tiles(factory)),),
        lambda x: (unit_norm_direct(x[:, 1], factor=0.3, eps=EPS),),
    )


def draw_gated(shape: GatedShape, factory: InputFactory) -> KernelCase:
    """The gated norm of heads; weights by head where gates come first, as groups of channels have them."""
    size = (shape.rows, shape.heads, shape.width)
    x, gate = factory.normal(*size, scale=3.0), factory.normal(*size)
    weight = factory.uniform(shape.heads if shape.gates_first else 1, shape.width, low=-2.0, high=2.0)
    options = {"kind": shape.kind, "gates_first": shape.gates_first}
    return KernelCase(
        {"x": x, "gate": gate, "weight": weight},
        lambda x, gate, weight: (
            gated_rms_norm_triton(x, gate, weight, EPS, **options, tiles=_tiles(factory)),
        ),
        lambda x, gate, weight: (gated_rms_norm_direct(x, gate, weight, EPS, **options),),
    )


def cost(shape: Shape) -> KernelCost:
    """Bytes in bfloat16: x and y; x, dy and dx."""
    size = 2.0 * shape.rows * shape.width
    return KernelCost(0.0, 2 * size, 0.0, 3 * size)


def gated_cost(shape: GatedShape) -> KernelCost:
    """Bytes in bfloat16: x, gate and y; x, gate, dy, dx and dgate."""
    size = 2.0 * shape.rows * shape.heads * shape.width
    return KernelCost(0.0, 3 * size, 0.0, 5 * size)


SPECS = (
    KernelSpec("norm", SHAPES, lambda tokens: Shape(tokens, 4096), draw, cost),
    KernelSpec("norm.unit", SHAPES, lambda tokens: Shape(tokens * 16, 128), draw_unit, cost),
    KernelSpec(
        "norm.gated",
        GATED_SHAPES,
        lambda tokens: GatedShape(tokens, 32, 128, "silu", False),
        draw_gated,
        gated_cost,
    ),
    KernelSpec(
        "norm.groups",
        GATED_SHAPES,
        lambda tokens: GatedShape(tokens, 8, 512, "silu", True),
        draw_gated,
        gated_cost,
        {"norm_backward@3.9": "eight moves, which the older release does without"},
    ),
)
