"""Attention over chosen keys on drawn inputs."""

import torch
from torch import Tensor

from kernels.selected_attention.reference import selected_attention_direct
from kernels.selected_attention.shapes import Shape
from kernels.selected_attention.triton import Tiles, selected_attention_triton, shares_triton
from kernels.spec import InputFactory, KernelCase, KernelCost, KernelSpec

# The interpreter takes a query at a time.
SMALL_SHAPES = (
    Shape(1, 1, 1, 1, 4, 4, 1),
    Shape(2, 5, 4, 2, 8, 6, 5),
    Shape(1, 7, 6, 2, 5, 8, 40, has_sinks=True),
    Shape(1, 6, 3, 1, 24, 16, 7, is_shared=True, has_sinks=True),
    Shape(2, 3, 20, 1, 16, 16, 40, keys=30, is_shared=True),
)


def select(shape: Shape, factory: InputFactory) -> Tensor:
    """Different keys for every query in any order, -1 among them, and some queries with nothing else."""
    keys = shape.keys or shape.tokens
    if factory.device.type == "meta":
        return torch.empty(shape.rows, shape.tokens, shape.chosen, dtype=torch.int64, device="meta")
    order = factory.uniform(shape.rows, shape.tokens, max(keys, shape.chosen)).argsort(-1)
    order = order[..., : shape.chosen]
    order = torch.where(order < keys, order, -1)
    order = order.masked_fill(factory.integers(*order.shape, low=0, high=5) == 0, -1)
    return order.masked_fill(factory.integers(shape.rows, shape.tokens, 1, low=0, high=6) == 0, -1)


def draw(shape: Shape, factory: InputFactory, *, is_deterministic: bool = False) -> KernelCase:
    """Outputs, and what the heads take of each key."""
    selection = select(shape, factory)
    size = (shape.rows, shape.keys or shape.tokens, shape.key_heads)
    inputs = {
        "q": factory.normal(shape.rows, shape.tokens, shape.heads, shape.key_dim),
        "k": factory.normal(*size, shape.key_dim),
    }
    if not shape.is_shared:
        inputs["v"] = factory.normal(*size, shape.value_dim)
    if shape.has_sinks:
        inputs["sinks"] = factory.normal(shape.heads)
    scale = shape.key_dim**-0.5
    tiles = Tiles(16, 16, 1, 1) if factory.uses_small_tiles else None

    def ours(q, k, v=shape.value_dim, sinks=None):
        out, lse = selected_attention_triton(
            q, k, v, selection, scale=scale, sinks=sinks, is_deterministic=is_deterministic, tiles=tiles
        )
        return out, shares_triton(q, k, selection, lse, scale=scale, tiles=tiles)

    def reference(q, k, v=None, sinks=None):
        v = k[..., : shape.value_dim] if v is None else v
        return selected_attention_direct(q, k, v, selection, scale=scale, sinks=sinks)

    return KernelCase(inputs, ours, reference)


def draw_in_order(shape: Shape, factory: InputFactory) -> KernelCase:
    """The same with sums in a fixed order."""
    return draw(shape, factory, is_deterministic=True)


def cost(shape: Shape) -> KernelCost:
    """Products of chosen pairs; bytes in bfloat16 of queries and outputs, and of keys once."""
    pairs = float(shape.rows * shape.tokens * min(shape.chosen, shape.keys or shape.tokens))
    flops = 2.0 * shape.heads * pairs
    lines = shape.rows * shape.tokens * shape.heads * (shape.key_dim + shape.value_dim)
    keys = shape.rows * (shape.keys or shape.tokens) * shape.key_heads * shape.key_dim
    return KernelCost(
        flops * (shape.key_dim + shape.value_dim),
        2.0 * (lines + keys),
        flops * (3 * shape.key_dim + 2 * shape.value_dim),
        4.0 * (lines + keys),
    )


def dsa(tokens: int) -> Shape:
    """DeepSeek-V3.2: 128 heads on one latent of 512 and a shared rotary part."""
    return Shape(1, tokens, 128, 1, 576, 512, min(2048, tokens), is_shared=True)


def csa(tokens: int) -> Shape:
    """DeepSeek-V4: keys that are values, a window and 512 entries, sinks."""
    return Shape(1, tokens, 64, 1, 512, 512, 640, keys=tokens + tokens // 4, is_shared=True, has_sinks=True)


WIDE = {
    "selected_forward": "the outputs of 64 heads by 512 dims fill more than half of all registers",
    "selected_backward_q": "the gradients of 64 heads by 576 dims fill more than half of all registers",
}
# With heads of 512 dims the older release keeps all of it in registers.
WIDE_NEWEST = {f"{kernel}@3.9": reason for kernel, reason in WIDE.items()}
SPECS = (
    KernelSpec("selected_attention.dsa", SMALL_SHAPES, dsa, draw, cost, WIDE),
    KernelSpec("selected_attention.csa", (), csa, draw, cost, WIDE_NEWEST),
    KernelSpec("selected_attention.in_order", SMALL_SHAPES[2:], dsa, draw_in_order, cost, WIDE),
)
