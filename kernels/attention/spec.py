"""Attention on drawn inputs: plain, in windows, of latent and wide heads, and over first and last blocks."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from kernels.attention.reference import FULL, Pattern, attention_direct
from kernels.attention.shapes import SHAPES, Shape
from kernels.attention.triton import Tile, Tiles, attention_triton
from kernels.spec import InputFactory, KernelCase, KernelCost, KernelSpec, Outputs

# Tiles that few tokens fill several of; both ways to get the gradients of keys and values.
SMALL = Tiles(Tile(32, 16, 1, 1), Tile(16, 32, 1, 1), Tile(32, 16, 1, 1), programs=3)
SMALL_SPLIT = Tiles(Tile(16, 32, 1, 1, 16), Tile(32, 16, 1, 1), Tile(16, 32, 1, 1), is_split=True, programs=1)


class Masked(NamedTuple):
    """A shape and what its queries see; documents: their mean length, 0 for one in each row."""

    shape: Shape
    pattern: Pattern = FULL
    has_sinks: bool = False
    logit_cap: float | None = None
    documents: float = 0.0
    is_shared: bool = False


def draw(masked: Masked, factory: InputFactory) -> KernelCase:
    """Outputs and log-sum-exp; strided queries, as they come out of one projection with keys and values."""
    rows, tokens, heads, key_heads, key_dim, value_dim, _ = masked.shape
    q = factory.normal(rows, tokens, heads, key_dim)
    k = factory.normal(rows, tokens, key_heads, key_dim)
    v = factory.normal(rows, tokens, key_heads, value_dim)
    inputs = {"q": q, "k": k} if masked.is_shared else {"q": q, "k": k, "v": v}
    if masked.has_sinks:
        inputs["sinks"] = factory.uniform(heads, low=-2.0, high=2.0)
    document = position = None
    if masked.documents:
        document, position = factory.documents(rows, tokens, masked.documents)
    tiles = None
    if factory.uses_small_tiles:
        tiles = SMALL_SPLIT if max(key_dim, value_dim) > 128 else SMALL
    options = {"scale": key_dim**-0.5, "pattern": masked.pattern, "logit_cap": masked.logit_cap}
    options |= {"document": document, "position": position}

    def with_values(form: Callable[..., Outputs], **more: Any) -> Callable[..., Outputs]:
        def run(q: Tensor, k: Tensor, v: Tensor | None = None, sinks: Tensor | None = None) -> Outputs:
            return form(q, k, k if v is None else v, sinks=sinks, **options, **more)

        return run

    return KernelCase(inputs, with_values(attention_triton, tiles=tiles), with_values(attention_direct))


def pairs(masked: Masked) -> float:
    """Pairs of a query and a key that it sees in one row, with all documents of the mean length."""
    tokens, (window, block, first) = masked.shape.tokens, masked.pattern
    length = min(int(masked.documents) or tokens, tokens)
    reach = min(window or length, length)
    near = reach * length - reach * (reach - 1) / 2
    # On average half of the first block of a window is not seen, and the early keys by those past both.
    near -= (block - 1) / 2 * max(0, length - reach)
    return tokens / length * (near + first * max(0, length - reach - first))


def cost(masked: Masked) -> KernelCost:
    """Two products of all pairs forward and five backward; q, k, v, out, and their gradients in bfloat16."""
    rows, tokens, heads, key_heads, key_dim, value_dim, _ = masked.shape
    seen = 2.0 * rows * heads * pairs(masked)
    read = (
        2.0 * rows * tokens * (heads * key_dim + key_heads * (key_dim + value_dim * (not masked.is_shared)))
    )
    out, lse = 2.0 * rows * tokens * heads * value_dim, 4.0 * rows * tokens * heads
    backward = seen * (3 * key_dim + 2 * value_dim)
    return KernelCost(seen * (key_dim + value_dim), read + out + lse, backward, 2 * read + 2 * out + lse)


def _plain(heads: int, key_heads: int, key_dim: int, value_dim: int) -> Callable[[int], Masked]:
    return lambda tokens: Masked(Shape(1, tokens, heads, key_heads, key_dim, value_dim, None))


BASE = Shape(2, 70, 4, 2, 16, 16, None)
# A sum of 64 rows and 256 columns takes half of the registers; operands of 512 columns have many addresses.
KNOWN_SPILLS = {
    "attention_backward_queries": "50 reloads for the 66 products of a tile: addresses of operands",
    "attention_backward_keys": "reloads outside its loops, and a few for the 68 products of a tile",
}
SPECS = (
    KernelSpec(
        "attention",
        (
            *(Masked(shape, Pattern(shape.window)) for shape in SHAPES),
            Masked(Shape(1, 40, 16, 1, 64, 64, None)),
            Masked(Shape(1, 45, 8, 1, 32, 48, None)),
            Masked(Shape(1, 35, 2, 2, 80, 112, None)),
        ),
        _plain(32, 8, 128, 128),
        draw,
        cost,
    ),
    KernelSpec(
        "attention.documents",
        (
            Masked(BASE, documents=20.0),
            Masked(BASE, Pattern(9), documents=6.0),
            Masked(Shape(1, 33, 3, 1, 16, 32, None), documents=1.2, has_sinks=True),
        ),
        lambda tokens: Masked(Shape(1, tokens, 32, 8, 128, 128, None), documents=2048.0),
        draw,
        cost,
    ),
    KernelSpec(
        "attention.window",
        (
            Masked(BASE, Pattern(12), has_sinks=True),
            Masked(Shape(1, 50, 8, 1, 64, 64, 1), Pattern(1), has_sinks=True),
            Masked(Shape(1, 90, 6, 2, 32, 16, 33), Pattern(33), has_sinks=True, documents=30.0),
        ),
        lambda tokens: Masked(Shape(1, tokens, 64, 8, 64, 64, 128), Pattern(128), has_sinks=True),
        draw,
        cost,
    ),
    KernelSpec(
        "attention.mla",
        (
            Masked(Shape(1, 40, 2, 2, 192, 128, None)),
            Masked(Shape(1, 40, 2, 2, 48, 32, None), documents=15.0),
        ),
        _plain(16, 16, 192, 128),
        draw,
        cost,
    ),
    KernelSpec(
        "attention.wide",
        (
            Masked(Shape(1, 40, 4, 1, 256, 256, None)),
            Masked(BASE, logit_cap=2.0),
            Masked(BASE, Pattern(20), logit_cap=50.0, documents=25.0),
        ),
        _plain(16, 2, 256, 256),
        draw,
        cost,
    ),
    KernelSpec(
        "attention.capped",
        (Masked(Shape(1, 40, 4, 1, 256, 256, None), logit_cap=5.0),),
        lambda tokens: Masked(Shape(1, tokens, 16, 2, 256, 256, None), logit_cap=50.0),
        draw,
        cost,
    ),
    KernelSpec(
        "attention.zigzag",
        (
            Masked(BASE, Pattern(16, 8, 8)),
            Masked(BASE, Pattern(8, 4, 12), documents=30.0, has_sinks=True),
            Masked(Shape(1, 60, 3, 1, 16, 16, None), Pattern(12, 12), documents=30.0),
        ),
        lambda tokens: Masked(
            Shape(1, tokens, 16, 16, 192, 128, None), Pattern(1024, 128, 128), documents=float(tokens)
        ),
        draw,
        cost,
    ),
    KernelSpec(
        "attention.shared",
        (
            Masked(
                Shape(1, 33, 4, 1, 32, 32, 10), Pattern(10), has_sinks=True, documents=20.0, is_shared=True
            ),
            Masked(Shape(1, 20, 2, 1, 48, 48, None), is_shared=True),
            # Above 256 dims programs write half of the columns.
            Masked(Shape(1, 40, 3, 1, 512, 512, 9), Pattern(9), has_sinks=True, is_shared=True),
            Masked(Shape(1, 33, 2, 1, 320, 320, None), documents=20.0, is_shared=True),
        ),
        lambda tokens: Masked(
            Shape(1, tokens, 64, 1, 512, 512, 128), Pattern(128), has_sinks=True, is_shared=True
        ),
        draw,
        cost,
        KNOWN_SPILLS,
    ),
)
