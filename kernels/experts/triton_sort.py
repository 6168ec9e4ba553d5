"""Choices sorted by expert on the device: two launches and a running sum, no number goes back to the host.

Letters: E experts, R = N k choices. Ids from E on get no row.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# A kernel's launch looks to pyright like a call of the Python function.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

# Choices of a program, and the row tiles that it looks up.
BLOCK = 512
TILES = 16


class Sorted(NamedTuple):
    """Rows sorted by expert, in the order of the choices within each.

    order: the choice of each row; behind the last expert's it means nothing. row_of: the row of each choice,
    R for an id that is no expert. ends: the last row of each expert plus one.
    tile_expert, tile_first: expert and first row of each tile; no tile has rows of two experts. tiles: how
    many there are, at most the length of the lists.
    """

    order: Int[Tensor, "R"]
    row_of: Int[Tensor, "R"]
    ends: Int[Tensor, "E"]
    tile_expert: Int[Tensor, "M"]
    tile_first: Int[Tensor, "M"]
    tiles: Int[Tensor, "1"]


@triton.jit
def experts_count(chosen, counts, choices, experts, blocks, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """How often each expert occurs in BLOCK choices."""
    choice_offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(chosen + choice_offs, mask=choice_offs < choices, other=experts)
    is_real = expert < experts
    found = tl.histogram(tl.where(is_real, expert, 0).to(tl.int32), BINS, mask=is_real)
    bins = tl.arange(0, BINS)
    tl.store(counts + bins.to(tl.int64) * blocks + tl.program_id(0), found, mask=bins < experts)


@triton.jit
def experts_sort(
    chosen, counts, running, order, row_of, ends, tile_expert, tile_first, tiles,
    choices, experts, blocks, tile_bound,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The rows of BLOCK choices, and the experts of TILES row tiles."""
    block = tl.program_id(0)
    own = tl.arange(0, BLOCK)
    choice_offs = block * BLOCK + own
    is_in = choice_offs < choices
    expert = tl.load(chosen + choice_offs, mask=is_in, other=experts).to(tl.int64)
    is_real = expert < experts
    # Rows of this expert from earlier choices: of other blocks, then of this one.
    cell = expert * blocks + block
    row = tl.load(running + cell, mask=is_real, other=0) - tl.load(counts + cell, mask=is_real, other=0)
    for first in range(0, BLOCK, CHUNK):
        other = first + tl.arange(0, CHUNK)
        at = block * BLOCK + other
        rival = tl.load(chosen + at, mask=at < choices, other=experts).to(tl.int64)
        is_before = (rival[None, :] == expert[:, None]) & (other[None, :] < own[:, None])
        row += tl.sum(is_before.to(tl.int32), axis=1)
    tl.store(row_of + choice_offs, tl.where(is_real, row, choices), mask=is_in)
    tl.store(order + row, choice_offs, mask=is_real)

    bins = tl.arange(0, BINS)
    last = bins.to(tl.int64) * blocks + blocks - 1
    end = tl.load(running + last, mask=bins < experts, other=0)
    start = tl.load(running + last - blocks, mask=(bins > 0) & (bins < experts), other=0)
    own_tiles = (end - start + ROWS - 1) // ROWS
    upto = tl.cumsum(own_tiles, axis=0)
    if block == 0:
        tl.store(ends + bins, end, mask=bins < experts)
        tl.store(tiles, tl.sum(own_tiles, axis=0))
    tile = block * TILES + tl.arange(0, TILES)
    owner = tl.sum((upto[None, :] <= tile[:, None]).to(tl.int32), axis=1)
    # Row tile t of an expert whose tiles begin with number b and rows with s starts at s + (t - b) ROWS.
    shift = start - (upto - own_tiles) * ROWS
    shift = tl.sum(tl.where(bins[None, :] == owner[:, None], shift[None, :], 0), axis=1)
    tl.store(tile_expert + tile, owner, mask=tile < tile_bound)
    tl.store(tile_first + tile, shift + tile * ROWS, mask=tile < tile_bound)


def sort_by_expert(chosen: Int[Tensor, "R"], experts: int, rows: int, *, block: int = BLOCK) -> Sorted:
    """Sorts, for row tiles of `rows`."""
    choices, device = chosen.shape[0], chosen.device
    blocks = max(1, triton.cdiv(choices, block))
    # An expert fills all of its tiles but one.
    bound = max(1, choices // rows + min(experts, choices))
    counts = torch.empty(experts, blocks, dtype=torch.int32, device=device)
    bins = max(32, triton.next_power_of_2(experts))
    experts_count[(blocks,)](chosen, counts, choices, experts, blocks, BLOCK=block, BINS=bins)
    running = counts.flatten().cumsum(0, dtype=torch.int32)
    order, row_of, ends, tile_expert, tile_first, tiles = (
        torch.empty(size, dtype=torch.int32, device=device)
        for size in (choices, choices, experts, bound, bound, 1)
    )
    grid = (max(blocks, triton.cdiv(bound, TILES)),)
    experts_sort[grid](
        chosen, counts, running, order, row_of, ends, tile_expert, tile_first, tiles,
        choices, experts, blocks, bound,
        BLOCK=block, CHUNK=min(16, block), BINS=bins, ROWS=rows, TILES=TILES, num_warps=8,
    )  # fmt: skip
    return Sorted(order, row_of, ends, tile_expert, tile_first, tiles)
