"""Attention over chosen keys on drawn inputs."""

import torch
from torch import Tensor

from kernels.selected_attention import Case
from kernels.selected_attention.reference import selected_attention_direct
from kernels.selected_attention.triton import Tiles, selected_attention_triton, shares_triton
from kernels.trial import Setting, Subject, Trial, Work

# The interpreter takes a query at a time.
SMALL = (
    Case(1, 1, 1, 1, 4, 4, 1),
    Case(2, 5, 4, 2, 8, 6, 5),
    Case(1, 7, 6, 2, 5, 8, 40, has_sinks=True),
    Case(1, 6, 3, 1, 24, 16, 7, is_shared=True, has_sinks=True),
    Case(2, 3, 20, 1, 16, 16, 40, keys=30, is_shared=True),
)


def select(case: Case, setting: Setting) -> Tensor:
    """Different keys for every query in any order, -1 among them, and some queries with nothing else."""
    keys = case.keys or case.tokens
    if setting.device.type == "meta":
        return torch.empty(case.rows, case.tokens, case.chosen, dtype=torch.int64, device="meta")
    order = setting.uniform(case.rows, case.tokens, max(keys, case.chosen)).argsort(-1)[..., : case.chosen]
    order = torch.where(order < keys, order, -1)
    order = order.masked_fill(setting.integers(*order.shape, low=0, high=5) == 0, -1)
    return order.masked_fill(setting.integers(case.rows, case.tokens, 1, low=0, high=6) == 0, -1)


def draw(case: Case, setting: Setting, *, is_deterministic: bool = False) -> Trial:
    """Outputs, and what the heads take of each key."""
    selection = select(case, setting)
    shape = (case.rows, case.keys or case.tokens, case.key_heads)
    inputs = {
        "q": setting.normal(case.rows, case.tokens, case.heads, case.key_dim),
        "k": setting.normal(*shape, case.key_dim),
    }
    if not case.is_shared:
        inputs["v"] = setting.normal(*shape, case.value_dim)
    if case.has_sinks:
        inputs["sinks"] = setting.normal(case.heads)
    scale = case.key_dim**-0.5
    tiles = Tiles(16, 16, 1, 1) if setting.is_small else None

    def ours(q, k, v=case.value_dim, sinks=None):
        out, lse = selected_attention_triton(
            q, k, v, selection, scale=scale, sinks=sinks, is_deterministic=is_deterministic, tiles=tiles
        )
        return out, shares_triton(q, k, selection, lse, scale=scale, tiles=tiles)

    def truth(q, k, v=None, sinks=None):
        v = k[..., : case.value_dim] if v is None else v
        return selected_attention_direct(q, k, v, selection, scale=scale, sinks=sinks)

    return Trial(inputs, ours, truth)


def draw_in_order(case: Case, setting: Setting) -> Trial:
    """The same with sums in a fixed order."""
    return draw(case, setting, is_deterministic=True)


def work(case: Case) -> Work:
    """Products of chosen pairs; bytes in bfloat16 of queries and outputs, and of keys once."""
    pairs = float(case.rows * case.tokens * min(case.chosen, case.keys or case.tokens))
    flops = 2.0 * case.heads * pairs
    lines = case.rows * case.tokens * case.heads * (case.key_dim + case.value_dim)
    keys = case.rows * (case.keys or case.tokens) * case.key_heads * case.key_dim
    return Work(
        flops * (case.key_dim + case.value_dim),
        2.0 * (lines + keys),
        flops * (3 * case.key_dim + 2 * case.value_dim),
        4.0 * (lines + keys),
    )


def dsa(tokens: int) -> Case:
    """DeepSeek-V3.2: 128 heads on one latent of 512 and a shared rotary part."""
    return Case(1, tokens, 128, 1, 576, 512, min(2048, tokens), is_shared=True)


def csa(tokens: int) -> Case:
    """DeepSeek-V4: keys that are values, a window and 512 entries, sinks."""
    return Case(1, tokens, 64, 1, 512, 512, 640, keys=tokens + tokens // 4, is_shared=True, has_sinks=True)


WIDE = {
    "selected_forward": "the outputs of 64 heads by 512 dims fill more than half of all registers",
    "selected_backward_q": "the gradients of 64 heads by 576 dims fill more than half of all registers",
}
# With heads of 512 dims the older release keeps all of it in registers.
WIDE_NEWEST = {f"{kernel}@3.9": reason for kernel, reason in WIDE.items()}
SUBJECTS = (
    Subject("selected_attention.dsa", SMALL, dsa, draw, work, WIDE),
    Subject("selected_attention.csa", (), csa, draw, work, WIDE_NEWEST),
    Subject("selected_attention.in_order", SMALL[2:], dsa, draw_in_order, work, WIDE),
)
