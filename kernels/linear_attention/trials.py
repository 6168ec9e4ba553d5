"""Linear attention on drawn inputs."""

from collections.abc import Callable

from torch import Tensor

from kernels.linear_attention import CASES, Case
from kernels.linear_attention.reference import linear_attention_recurrent
from kernels.linear_attention.triton import Part, Tiles, linear_attention_triton
from kernels.trial import Setting, Subject, Trial, Work


def small_tiles(tokens: int) -> Tiles:
    """Several chunks and blocks in few tokens and small dims."""
    part = Part(16, 16, 4)
    return Tiles(16 if tokens < 64 else 32 if tokens < 100 else 64, 1, part, part, part, part)


def step_uniform(span: str) -> Callable[[Case, Setting], Trial]:
    """Draws inputs with a decay per head or per channel, or none; documents where there are many tokens."""

    def draw(case: Case, setting: Setting) -> Trial:
        rows, tokens, key_heads, heads, key_dim, value_dim = case
        inputs = {
            "q": setting.normal(rows, tokens, key_heads, key_dim, scale=key_dim**-0.5),
            "k": setting.normal(rows, tokens, key_heads, key_dim),
            "v": setting.normal(rows, tokens, heads, value_dim),
        }
        if span != "none":
            shape = (rows, tokens, heads, key_dim)[: 3 + (span == "channel")]
            inputs["log_decay"] = setting.uniform(*shape, low=-1.0, high=0.0)
        inputs["state"] = setting.normal(rows, heads, key_dim, value_dim)
        document = setting.documents(rows, tokens, mean=40.0)[0] if tokens % 2 else None
        tiles = small_tiles(tokens) if setting.is_small else None

        def kernel(state: Tensor, **parts: Tensor) -> tuple[Tensor, ...]:
            return linear_attention_triton(**parts, state=state, document=document, tiles=tiles)

        def truth(state: Tensor, **parts: Tensor) -> tuple[Tensor, ...]:
            return linear_attention_recurrent(**parts, state=state, document=document)

        return Trial(inputs, kernel, truth)

    return draw


def work(case: Case) -> Work:
    """Scores, reads and writes of chunks of 64 tokens; bytes in bfloat16 and one decay per head."""
    rows, tokens, key_heads, heads, key_dim, value_dim = case
    products = 2.0 * rows * tokens * heads
    flops = products * (64 * (key_dim + value_dim) / 2 + 2 * key_dim * value_dim)
    numbers = rows * tokens * (2.0 * key_heads * key_dim + 2 * heads * value_dim)
    return Work(flops, 2 * numbers, 2.5 * flops, 4 * numbers)


def _lightning(tokens: int) -> Case:
    # MiniMax-01.
    return Case(1, tokens, 64, 64, 128, 128)


def _mamba(tokens: int) -> Case:
    # Nemotron-H: heads of 64 in 8 groups with states of 128.
    return Case(1, tokens, 8, 128, 128, 64)


# States and gates of 128 by 128 leave few registers over.
WIDE_NEWEST = {
    "linear_attention_backward_channel@3.9": "gradients through the gates of all channels of a chunk at once"
}
SUBJECTS = (
    Subject("linear_attention.head", CASES, _mamba, step_uniform("head"), work),
    Subject("linear_attention.none", CASES, _lightning, step_uniform("none"), work),
    Subject("linear_attention.channel", CASES, _lightning, step_uniform("channel"), work, WIDE_NEWEST),
)
