"""The gated delta rule on drawn inputs."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import normalize

from kernels.delta_rule.reference import gated_delta_rule_recurrent
from kernels.delta_rule.triton import gated_delta_rule_triton
from kernels.linear_attention.shapes import SHAPES, Shape
from kernels.linear_attention.spec import WIDE, small_tiles
from kernels.spec import InputFactory, KernelCase, KernelCost, KernelSpec


def draw_of(span: str) -> Callable[[Shape, InputFactory], KernelCase]:
    """Draws inputs with a decay per head or per channel; documents where there are many tokens."""

    def draw(shape: Shape, factory: InputFactory) -> KernelCase:
        rows, tokens, key_heads, heads, key_dim, value_dim = shape
        q, k = (factory.normal(rows, tokens, key_heads, key_dim) for _ in range(2))
        size = (rows, tokens, heads, key_dim)[: 3 + (span == "channel")]
        inputs = {
            "q": q * key_dim**-0.5,
            "k": normalize(k, dim=-1),
            "v": factory.normal(rows, tokens, heads, value_dim),
            "log_decay": factory.uniform(*size, low=-1.0, high=0.0),
            "beta": factory.uniform(rows, tokens, heads),
            "initial_state": factory.normal(rows, heads, key_dim, value_dim),
        }
        document = factory.documents(rows, tokens, mean=40.0)[0] if tokens % 2 else None
        tiles = small_tiles(tokens) if factory.uses_small_tiles else None

        def kernel(initial_state: Tensor, **parts: Tensor) -> tuple[Tensor, ...]:
            return gated_delta_rule_triton(
                **parts, initial_state=initial_state, document=document, tiles=tiles
            )

        def reference(initial_state: Tensor, **parts: Tensor) -> tuple[Tensor, ...]:
            return gated_delta_rule_recurrent(**parts, initial_state=initial_state, document=document)

        return KernelCase(inputs, kernel, reference)

    return draw


def cost(shape: Shape) -> KernelCost:
    """Products of chunks of 64 tokens, the solve among them; bytes in bfloat16 and one decay per head."""
    rows, tokens, key_heads, heads, key_dim, value_dim = shape
    each = 2 * 64 * (3 * key_dim + 2 * value_dim) + 6 * key_dim * value_dim + 64 * 64
    flops = 1.0 * rows * tokens * heads * each
    numbers = rows * tokens * (2.0 * key_heads * key_dim + 2 * heads * value_dim)
    return KernelCost(flops, 2 * numbers, 2.6 * flops, 4 * numbers)


def _qwen(tokens: int) -> Shape:
    # Qwen3-Next.
    return Shape(1, tokens, 16, 32, 128, 128)


def _kimi(tokens: int) -> Shape:
    # Kimi-Linear.
    return Shape(1, tokens, 32, 32, 128, 128)


WIDE_NEWEST = {"delta_rule_backward_channel@3.9": WIDE}
SPECS = (
    KernelSpec("delta_rule.head", SHAPES, _qwen, draw_of("head"), cost),
    KernelSpec("delta_rule.channel", SHAPES, _kimi, draw_of("channel"), cost, WIDE_NEWEST),
)
