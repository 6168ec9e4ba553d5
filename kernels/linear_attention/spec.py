"""Linear attention on drawn inputs."""

from collections.abc import Callable

from torch import Tensor

from kernels.linear_attention.reference import linear_attention_recurrent
from kernels.linear_attention.shapes import SHAPES, Shape
from kernels.linear_attention.triton import linear_attention_triton
from kernels.linear_attention.triton_launch import Part, Tiles
from kernels.spec import InputFactory, KernelCase, KernelCost, KernelSpec


def small_tiles(tokens: int) -> Tiles:
    """Several chunks and blocks in few tokens and small dims."""
    part = Part(16, 16, 4)
    return Tiles(16 if tokens < 64 else 32 if tokens < 100 else 64, 1, part, part, part, part)


def draw_of(span: str) -> Callable[[Shape, InputFactory], KernelCase]:
    """Draws inputs with a decay per head or per channel, or none; documents where there are many tokens."""

    def draw(shape: Shape, factory: InputFactory) -> KernelCase:
        rows, tokens, key_heads, heads, key_dim, value_dim = shape
        inputs = {
            "q": factory.normal(rows, tokens, key_heads, key_dim, scale=key_dim**-0.5),
            "k": factory.normal(rows, tokens, key_heads, key_dim),
            "v": factory.normal(rows, tokens, heads, value_dim),
        }
        if span != "none":
            size = (rows, tokens, heads, key_dim)[: 3 + (span == "channel")]
            inputs["log_decay"] = factory.uniform(*size, low=-1.0, high=0.0)
        inputs["initial_state"] = factory.normal(rows, heads, key_dim, value_dim)
        document = factory.documents(rows, tokens, mean=40.0)[0] if tokens % 2 else None
        tiles = small_tiles(tokens) if factory.uses_small_tiles else None

        def kernel(initial_state: Tensor, **parts: Tensor) -> tuple[Tensor, ...]:
            return linear_attention_triton(
                **parts, initial_state=initial_state, document=document, tiles=tiles
            )

        def reference(initial_state: Tensor, **parts: Tensor) -> tuple[Tensor, ...]:
            return linear_attention_recurrent(**parts, initial_state=initial_state, document=document)

        return KernelCase(inputs, kernel, reference)

    return draw


def cost(shape: Shape) -> KernelCost:
    """Scores, reads and writes of chunks of 64 tokens; bytes in bfloat16 and one decay per head."""
    rows, tokens, key_heads, heads, key_dim, value_dim = shape
    products = 2.0 * rows * tokens * heads
    flops = products * (64 * (key_dim + value_dim) / 2 + 2 * key_dim * value_dim)
    numbers = rows * tokens * (2.0 * key_heads * key_dim + 2 * heads * value_dim)
    return KernelCost(flops, 2 * numbers, 2.5 * flops, 4 * numbers)


def _lightning(tokens: int) -> Shape:
    # MiniMax-01.
    return Shape(1, tokens, 64, 64, 128, 128)


def _mamba(tokens: int) -> Shape:
    # Nemotron-H: heads of 64 in 8 groups with states of 128.
    return Shape(1, tokens, 8, 128, 128, 64)


# States and gates of 128 by 128 leave few registers over.
WIDE = "gradients through the gates of all channels of a chunk at once"
WIDE_NEWEST = {"linear_attention_backward_channel@3.9": WIDE}
SPECS = (
    KernelSpec("linear_attention.head", SHAPES, _mamba, draw_of("head"), cost),
    KernelSpec("linear_attention.none", SHAPES, _lightning, draw_of("none"), cost),
    KernelSpec("linear_attention.channel", SHAPES, _lightning, draw_of("channel"), cost, WIDE_NEWEST),
)
