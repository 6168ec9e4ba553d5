"""Attention over selected blocks on drawn inputs."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.block_attention import CASES, Case
from kernels.block_attention.reference import block_attention_direct
from kernels.block_attention.triton import Tile, Tiles, block_attention_triton
from kernels.document_windows import document_windows
from kernels.trial import Outputs, Setting, Subject, Trial, Work


class Packed(NamedTuple):
    """A shape, and the mean length of packed documents; 0 for one document in each row."""

    case: Case
    mean: float = 0.0


# Several tiles of queries and keys, several chunks and parts of lists in few tokens.
_TILE = Tile(32, 16, 1, 1)
SMALL = Tiles(_TILE, _TILE, _TILE, _TILE, _TILE, _TILE, 2, 1 << 16)


def draw(packed: Packed, setting: Setting) -> Trial:
    """Queries choose at random among the blocks before their own."""
    case = packed.case
    rows, tokens, heads, key_heads, selectors, key_dim, value_dim, block, chosen = case
    position = torch.arange(tokens, device=setting.device).expand(rows, -1)
    if packed.mean:
        _, position = setting.documents(rows, tokens, packed.mean)
    inputs = {
        "q": setting.normal(rows, tokens, heads, key_dim),
        "k": setting.normal(rows, tokens, key_heads, key_dim),
        "v": setting.normal(rows, tokens, key_heads, value_dim),
    }
    windows = document_windows(position, block, block)
    slots = windows.start.shape[1]
    if setting.device.type == "meta":
        selected = torch.empty(rows, tokens, selectors, min(chosen, slots), dtype=torch.int64, device="meta")
    else:
        selected = windows.choose(setting.uniform(rows, tokens, selectors, slots), position, count=chosen)
    tiles = SMALL if setting.is_small else None

    def run(form: Callable[..., Outputs], q: Tensor, k: Tensor, v: Tensor, **more: Tiles | None) -> Outputs:
        chosen, own_position = selected.to(q.device), position.to(q.device)
        return form(q, k, v, chosen, scale=key_dim**-0.5, block=block, position=own_position, **more)

    return Trial(
        inputs,
        lambda q, k, v: run(block_attention_triton, q, k, v, tiles=tiles),
        lambda q, k, v: run(block_attention_direct, q, k, v),
    )


def work(packed: Packed) -> Work:
    """Products of scores and outputs over the keys seen; five in backward. Bytes of bfloat16 numbers."""
    case = packed.case
    seen = case.block / 2 + case.chosen * case.block
    pairs = case.rows * case.tokens * case.heads * seen
    flops = 2.0 * pairs * (case.key_dim + case.value_dim)
    wide = case.heads + case.key_heads
    numbers = 2.0 * case.rows * case.tokens * wide * (case.key_dim + case.value_dim)
    backward = 2.0 * pairs * (3 * case.key_dim + 2 * case.value_dim)
    return Work(flops, numbers, backward, 2 * numbers)


def at_nsa(tokens: int) -> Packed:
    """The native sparse attention of a model of 27 B parameters."""
    return Packed(Case(1, tokens, 64, 4, 4, 192, 128, 64, 15))


def at_moba(tokens: int) -> Packed:
    """Mixture of block attention as in Llama 8B at a million tokens, whose heads choose for themselves."""
    return Packed(Case(1, tokens, 32, 32, 32, 128, 128, 512, 2))


def at_msa(tokens: int) -> Packed:
    """MiniMax-M3."""
    return Packed(Case(1, tokens, 64, 4, 4, 128, 128, 128, 15))


SUBJECTS = (
    Subject(
        "block_attention.nsa",
        (*(Packed(case) for case in CASES), Packed(Case(2, 45, 6, 2, 2, 24, 20, 4, 3), 11.0)),
        at_nsa,
        draw,
        work,
    ),
    Subject(
        "block_attention.moba",
        (
            Packed(Case(1, 96, 4, 2, 4, 16, 16, 24, 2)),
            Packed(Case(2, 100, 3, 3, 3, 16, 32, 20, 2), 40.0),
        ),
        at_moba,
        draw,
        work,
    ),
    Subject(
        "block_attention.msa",
        (Packed(Case(1, 70, 8, 1, 1, 32, 16, 16, 3), 30.0), Packed(Case(1, 40, 16, 1, 1, 16, 16, 8, 2))),
        at_msa,
        draw,
        work,
    ),
)
