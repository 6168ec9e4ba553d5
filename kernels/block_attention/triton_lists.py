"""The inverse of a selection: for each block of keys the list of queries that chose it, without a host sync.

A choice is one number of `selected`, in its order: by row, token, selecting head and place. Letters: B rows,
T tokens, G key heads, N slots, L = B G N lists, S slabs of tokens.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# A kernel's launch looks to pyright like a call of the Python function.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor


class Lists(NamedTuple):
    """Choices by list, within a list in their own order; lists by row, key head and slot.

    order: the choices. bounds: where the part of each list that lies in each slab begins, list by list, and
    the end of all.
    """

    order: Int[Tensor, "C"]
    bounds: Int[Tensor, "LS1"]
    lists: int
    slabs: int


class Plan(NamedTuple):
    """Programs, each with a part of a list: the list of each, L for none, and the first program of each list.

    One line for each slab, or one for all tokens.
    """

    owner: Int[Tensor, "S P"]
    before: Int[Tensor, "S L1"]
    share: int


@triton.jit
def block_attention_key(
    selected, key, choices, tokens, selectors, places, groups, slots, slab, slabs, none, BLOCK: tl.constexpr
):
    """What sorts the choices: list, then slab; `none` for a choice of nothing."""
    choice = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_in = choice < choices
    slot = tl.load(selected + choice, mask=is_in, other=-1).to(tl.int64)
    head = (choice // places) % selectors
    token = (choice // (places * selectors)) % tokens
    row = choice // (places * selectors * tokens)
    group = head // (selectors // groups)
    found = ((row * groups + group) * slots + slot) * slabs + token // slab
    tl.store(key + choice, tl.where(slot >= 0, found, none).to(tl.int32), mask=is_in)


def lists_of(selected: Int[Tensor, "B T J n"], groups: int, slots: int, slab: int) -> Lists:
    """The lists, for slabs of `slab` tokens."""
    rows, tokens, selectors, places = selected.shape
    slabs, lists = triton.cdiv(tokens, slab), rows * groups * slots
    key = torch.empty(selected.numel(), dtype=torch.int32, device=selected.device)
    choices = selected.numel()
    if choices:
        block_attention_key[(triton.cdiv(choices, 1024),)](
            selected.contiguous(), key, choices, tokens, selectors, places, groups, slots, slab, slabs,
            lists * slabs, BLOCK=1024,
        )  # fmt: skip
    key, order = key.sort(stable=True)
    edges = torch.arange(lists * slabs + 1, dtype=torch.int32, device=selected.device)
    return Lists(order, torch.searchsorted(key, edges, out_int32=True), lists, slabs)


def plan_of(lists: Lists, share: int, choices: int, *, by_slab: bool) -> Plan:
    """Programs of at most `share` choices of one list; `choices` bounds those of a line."""
    bounds = lists.bounds if by_slab else lists.bounds[:: lists.slabs]
    lines = lists.slabs if by_slab else 1
    parts = (bounds.diff() + (share - 1)) // share
    upto = parts.view(lists.lists, lines).T.cumsum(1, dtype=torch.int32)
    bound = choices // share + min(lists.lists, choices)
    program = torch.arange(bound, dtype=torch.int32, device=bounds.device).expand(lines, -1)
    owner = torch.searchsorted(upto, program.contiguous(), right=True, out_int32=True)
    return Plan(owner, torch.nn.functional.pad(upto, (1, 0)), share)


@triton.jit
def block_attention_part(owner, before, bounds, lists, step, slab, slabs, SHARE: tl.constexpr):
    """List, first choice and the one after the last of this program; `lists` for the list if there is none.

    Bounds are read `step` apart: 1 where a plan goes by slab, else the number of slabs.
    """
    program = tl.program_id(0)
    found = tl.load(owner + slab * tl.num_programs(0) + program)
    inside = tl.minimum(found, lists - 1)
    first = program - tl.load(before + slab * (lists + 1) + inside)
    place = inside * slabs + slab
    begin = tl.load(bounds + place) + first * SHARE
    return found, begin, tl.minimum(begin + SHARE, tl.load(bounds + place + step))


@triton.jit
def block_attention_rows(
    order, at, end, tokens, selectors, places, SHARED: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr
):
    """Of ROWS rows: token, selecting head, head within the selection, place, and whether there is one."""
    index = tl.arange(0, ROWS)
    head, at = index % PADDED, at + index // PADDED
    is_in = (at < end) & (head < SHARED)
    choice = tl.load(order + at, mask=at < end, other=0)
    place, selector = choice % places, (choice // places) % selectors
    return (choice // (places * selectors)) % tokens, selector, head, place, is_in


@triton.jit
def block_attention_side(first, last, group, SHARED: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Of ROWS rows of consecutive tokens: token, query head, and whether there is one."""
    index = tl.arange(0, ROWS)
    token, head = first + index // PADDED, index % PADDED
    return token, group * SHARED + head, (token < last) & (head < SHARED)


@triton.jit
def block_attention_line(x, is_in, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of WIDTH numbers at pointers x."""
    column = tl.arange(0, COLUMNS)
    is_there = is_in[:, None] if COLUMNS == WIDTH else is_in[:, None] & (column < WIDTH)[None, :]
    return tl.load(x[:, None] + column[None, :], mask=is_there, other=0.0)


@triton.jit
def block_attention_load(x, is_in, WIDTH: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Rows of WIDTH numbers at x in two parts of LOW and HIGH columns; without a second, the first twice."""
    if HIGH:
        low = block_attention_line(x, is_in, LOW, LOW)
        high = block_attention_line(x + LOW, is_in, WIDTH - LOW, HIGH)
        return low, high
    else:
        low = block_attention_line(x, is_in, WIDTH, LOW)
        return low, low


@triton.jit
def block_attention_store(x, low, high, is_in, WIDTH: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Stores what `block_attention_load` loads."""
    column = tl.arange(0, LOW)
    kind = x.dtype.element_ty
    tl.store(x[:, None] + column[None, :], low.to(kind), mask=is_in[:, None] & (column < WIDTH)[None, :])
    if HIGH:
        column = LOW + tl.arange(0, HIGH)
        is_high = is_in[:, None] & (column < WIDTH)[None, :]
        tl.store(x[:, None] + column[None, :], high.to(kind), mask=is_high)


@triton.jit
def block_attention_products(a_low, a_high, b_low, b_high, HIGH: tl.constexpr):
    """a b^T of rows in two parts."""
    out = tl.dot(a_low, tl.trans(b_low), input_precision="tf32x3")
    if HIGH:
        out = tl.dot(a_high, tl.trans(b_high), out, input_precision="tf32x3")
    return out
