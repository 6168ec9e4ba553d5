"""The gated delta rule on drawn inputs."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import normalize

from kernels.delta_rule import CASES, Case
from kernels.delta_rule.reference import gated_delta_rule_recurrent
from kernels.delta_rule.triton import gated_delta_rule_triton
from kernels.linear_attention.trials import WIDE_NEWEST, small_tiles
from kernels.trial import Setting, Subject, Trial, Work


def step_uniform(span: str) -> Callable[[Case, Setting], Trial]:
    """Draws inputs with a decay per head or per channel; documents where there are many tokens."""

    def draw(case: Case, setting: Setting) -> Trial:
        rows, tokens, key_heads, heads, key_dim, value_dim = case
        q, k = (setting.normal(rows, tokens, key_heads, key_dim) for _ in range(2))
        shape = (rows, tokens, heads, key_dim)[: 3 + (span == "channel")]
        inputs = {
            "q": q * key_dim**-0.5,
            "k": normalize(k, dim=-1),
            "v": setting.normal(rows, tokens, heads, value_dim),
            "log_decay": setting.uniform(*shape, low=-1.0, high=0.0),
            "beta": setting.uniform(rows, tokens, heads),
            "state": setting.normal(rows, heads, key_dim, value_dim),
        }
        document = setting.documents(rows, tokens, mean=40.0)[0] if tokens % 2 else None
        tiles = small_tiles(tokens) if setting.is_small else None

        def kernel(state: Tensor, **parts: Tensor) -> tuple[Tensor, ...]:
            return gated_delta_rule_triton(**parts, state=state, document=document, tiles=tiles)

        def truth(state: Tensor, **parts: Tensor) -> tuple[Tensor, ...]:
            return gated_delta_rule_recurrent(**parts, state=state, document=document)

        return Trial(inputs, kernel, truth)

    return draw


def work(case: Case) -> Work:
    """Products of chunks of 64 tokens, the solve among them; bytes in bfloat16 and one decay per head."""
    rows, tokens, key_heads, heads, key_dim, value_dim = case
    each = 2 * 64 * (3 * key_dim + 2 * value_dim) + 6 * key_dim * value_dim + 64 * 64
    flops = 1.0 * rows * tokens * heads * each
    numbers = rows * tokens * (2.0 * key_heads * key_dim + 2 * heads * value_dim)
    return Work(flops, 2 * numbers, 2.6 * flops, 4 * numbers)


def _qwen(tokens: int) -> Case:
    # Qwen3-Next.
    return Case(1, tokens, 16, 32, 128, 128)


def _kimi(tokens: int) -> Case:
    # Kimi-Linear.
    return Case(1, tokens, 32, 32, 128, 128)


SUBJECTS = (
    Subject("delta_rule.head", CASES, _qwen, step_uniform("head"), work),
    Subject("delta_rule.channel", CASES, _kimi, step_uniform("channel"), work, WIDE_NEWEST),
)
