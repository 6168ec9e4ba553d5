"""Routed experts on drawn inputs."""

from typing import NamedTuple

from torch import Tensor

from kernels.activation import is_gated
from kernels.experts import PLAIN, ExpertBiases, ExpertForm
from kernels.experts.reference import experts_direct
from kernels.experts.shapes import SHAPES, Shape
from kernels.experts.triton import Tiles, routed_experts_triton
from kernels.spec import InputFactory, KernelCase, KernelCost, KernelSpec


class Variant(NamedTuple):
    """A shape and what its experts compute; ids reach num_idle beyond the experts."""

    shape: Shape
    form: ExpertForm = PLAIN
    has_bias: bool = False
    num_idle: int = 0


# Small tiles: most experts fill several and the last one in part.
SMALL = Tiles(16, 32, 16, 1, 1, 32)
# A limit that bfloat16 has: products of many gates round to it.
BIASED = ExpertForm("shifted_swiglu", limit=0.5)
FORM_VARIANTS = (
    Variant(Shape(33, 24, 5, 2, 40), ExpertForm("swiglu", limit=0.3)),
    Variant(Shape(33, 24, 5, 2, 40), ExpertForm("swiglu", limit=0.3, clamps_product=True), True),
    Variant(Shape(33, 24, 5, 2, 40), BIASED, True),
    Variant(Shape(33, 24, 5, 3, 40), ExpertForm("shifted_swiglu", limit=0.7, clamps_product=True), True, 4),
    Variant(Shape(33, 24, 5, 2, 40), ExpertForm("geglu")),
    Variant(Shape(33, 24, 5, 2, 40), ExpertForm("geglu", limit=0.3, clamps_product=True), False, 3),
    Variant(Shape(33, 24, 5, 2, 40), ExpertForm("relu2"), True),
    Variant(Shape(33, 24, 5, 1, 40), ExpertForm("relu2"), False, 2),
    Variant(Shape(33, 24, 5, 1, 40), ExpertForm("swiglu", scales_input=True)),
    Variant(Shape(33, 24, 5, 2, 40), ExpertForm("shifted_swiglu", scales_input=True), True, 2),
)
PLAIN_VARIANTS = (*(Variant(shape) for shape in SHAPES), Variant(Shape(70, 48, 3, 2, 72)))


def draw(variant: Variant, factory: InputFactory) -> KernelCase:
    """Choices drawn without regard to balance; the last expert is never among them if there are enough."""
    tokens, width, experts, top_k, hidden = variant.shape
    columns = hidden * (2 if is_gated(variant.form.kind) else 1)
    inputs = {
        "x": factory.normal(tokens, width),
        "gate_up": factory.normal(experts, columns, width, scale=width**-0.5),
        "down": factory.normal(experts, width, hidden, scale=hidden**-0.5),
        "weights": factory.uniform(tokens, top_k),
    }
    if variant.has_bias:
        inputs |= {"up_bias": factory.normal(experts, columns), "down_bias": factory.normal(experts, width)}
    ids = experts + variant.num_idle
    scores = factory.uniform(tokens, ids)
    if experts > top_k and factory.device.type != "meta":
        scores[:, experts - 1] = -1.0
    chosen = scores.topk(top_k, dim=-1).indices
    tiles = SMALL if factory.uses_small_tiles else None

    def run(function, more: dict, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, *biases: Tensor):
        packed = ExpertBiases(*biases) if biases else None
        return (function(x, gate_up, down, chosen.to(x.device), weights, variant.form, packed, **more),)

    return KernelCase(
        inputs,
        lambda **given: run(routed_experts_triton, {"tiles": tiles}, *given.values()),
        lambda **given: run(experts_direct, {}, *given.values()),
    )


def cost(variant: Variant) -> KernelCost:
    """Three products of a choice forward and six back; bytes of bfloat16 numbers, of weights and of rows."""
    tokens, width, experts, top_k, hidden = variant.shape
    factors = 3 if is_gated(variant.form.kind) else 2
    flops = 2.0 * factors * tokens * top_k * width * hidden
    matrices, rows = 2.0 * factors * experts * width * hidden, 2.0 * tokens * width
    return KernelCost(flops, matrices + 2 * rows, 2 * flops, 2 * matrices + 3 * rows)


def at_large(tokens: int) -> Variant:
    """DeepSeek-V3 on one of eight GPUs."""
    return Variant(Shape(tokens, 7168, 32, 8, 2048))


def at_fine(tokens: int) -> Variant:
    """Qwen3-Next with all of its experts: few rows for each."""
    return Variant(Shape(tokens, 2048, 512, 10, 512))


SPECS = (
    # Qwen3-Next on one of eight GPUs.
    KernelSpec(
        "experts", PLAIN_VARIANTS, lambda tokens: Variant(Shape(tokens, 2048, 64, 8, 512)), draw, cost
    ),
    KernelSpec("experts.wide", PLAIN_VARIANTS[-1:], at_large, draw, cost),
    KernelSpec("experts.fine", PLAIN_VARIANTS[:1], at_fine, draw, cost),
    # gpt-oss.
    KernelSpec(
        "experts.forms",
        FORM_VARIANTS,
        lambda tokens: Variant(
            Shape(tokens, 2880, 32, 4, 2880), ExpertForm("shifted_swiglu", limit=7.0), has_bias=True
        ),
        draw,
        cost,
        {"experts_down_grad@3.9": "128 registers, so that two programs share a core"},
    ),
)
