"""The inverse of a selection: for each block of keys the list of queries that chose it, without a host sync.

A choice is an index into the flattened `selected` [B T J n]. Letters: B rows, T tokens, J selecting heads,
n selected blocks of a query, G key heads, N slots of blocks, L = B G N lists, S chunks of tokens, P programs.
The kernels here also load and multiply rows of q and k in two tiles of K0 and K1 columns, K1 = 0 for one.
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
    """Choices sorted by list, within a list in rising order; lists are by row, key head and slot.

    order: the choices. bounds: list by list, the start in `order` of the choices of each chunk of tokens, and
    at last the end of all.
    """

    order: Int[Tensor, "C"]
    bounds: Int[Tensor, "LS1"]
    lists: int
    chunks: int


class Plan(NamedTuple):
    """Which program takes which part of which list, for each chunk of tokens or at once for all (S = 1).

    list_of_program: L for a program without work. first_program: of each list, and after the last. A program
    takes at most per_program choices.
    """

    list_of_program: Int[Tensor, "S P"]
    first_program: Int[Tensor, "S L1"]
    per_program: int


@triton.jit
def block_attention_key(
    selected,
    key,
    choices,
    tokens,
    selectors,
    num_selected,
    groups,
    slots,
    chunk,
    chunks,
    none,
    BLOCK: tl.constexpr,
):
    """Sort key of choices: list, then chunk of the token; `none` where -1 was chosen."""
    choice = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_in = choice < choices
    slot = tl.load(selected + choice, mask=is_in, other=-1).to(tl.int64)
    head = (choice // num_selected) % selectors
    token = (choice // (num_selected * selectors)) % tokens
    row = choice // (num_selected * selectors * tokens)
    group = head // (selectors // groups)
    list_and_chunk = ((row * groups + group) * slots + slot) * chunks + token // chunk
    tl.store(key + choice, tl.where(slot >= 0, list_and_chunk, none).to(tl.int32), mask=is_in)


def lists_of(selected: Int[Tensor, "B T J n"], groups: int, slots: int, chunk: int) -> Lists:
    """The lists, for chunks of `chunk` tokens."""
    rows, tokens, selectors, num_selected = selected.shape
    chunks, lists = triton.cdiv(tokens, chunk), rows * groups * slots
    key = torch.empty(selected.numel(), dtype=torch.int32, device=selected.device)
    choices = selected.numel()
    if choices:
        block_attention_key[(triton.cdiv(choices, 1024),)](
            selected.contiguous(), key, choices, tokens, selectors, num_selected, groups, slots, chunk,
            chunks, lists * chunks, BLOCK=1024,
        )  # fmt: skip
    key, order = key.sort(stable=True)
    edges = torch.arange(lists * chunks + 1, dtype=torch.int32, device=selected.device)
    return Lists(order, torch.searchsorted(key, edges, out_int32=True), lists, chunks)


def plan_of(lists: Lists, per_program: int, choices: int, *, by_chunk: bool) -> Plan:
    """Programs of at most per_program choices; there are at most `choices`, by chunk in each of them."""
    bounds = lists.bounds if by_chunk else lists.bounds[:: lists.chunks]
    rows = lists.chunks if by_chunk else 1
    parts = (bounds.diff() + (per_program - 1)) // per_program
    stop_program = parts.view(lists.lists, rows).T.cumsum(1, dtype=torch.int32)
    bound = choices // per_program + min(lists.lists, choices)
    program = torch.arange(bound, dtype=torch.int32, device=bounds.device).expand(rows, -1)
    list_of_program = torch.searchsorted(stop_program, program.contiguous(), right=True, out_int32=True)
    return Plan(list_of_program, torch.nn.functional.pad(stop_program, (1, 0)), per_program)


@triton.jit
def block_attention_program(
    list_of_program, first_program, bounds, lists, step, chunk, chunks, CHOICES: tl.constexpr
):
    """The list of this program, `lists` for none, and the start and end in `order` of its choices.

    step: bounds to the end of the list's part: 1 if the plan is by chunk, else the number of chunks.
    """
    program = tl.program_id(0)
    list_id = tl.load(list_of_program + chunk * tl.num_programs(0) + program)
    known = tl.minimum(list_id, lists - 1)
    part = program - tl.load(first_program + chunk * (lists + 1) + known)
    index = known * chunks + chunk
    begin = tl.load(bounds + index) + part * CHOICES
    return list_id, begin, tl.minimum(begin + CHOICES, tl.load(bounds + index + step))


@triton.jit
def block_attention_choice_rows(
    order,
    at,
    end,
    tokens,
    selectors,
    num_selected,
    SHARED: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of ROWS rows: token, selecting head, query head within it, rank of the block, and whether it exists."""
    index = tl.arange(0, ROWS)
    head, at = index % PADDED, at + index // PADDED
    is_in = (at < end) & (head < SHARED)
    choice = tl.load(order + at, mask=at < end, other=0)
    rank, selector = choice % num_selected, (choice // num_selected) % selectors
    return (choice // (num_selected * selectors)) % tokens, selector, head, rank, is_in


@triton.jit
def block_attention_token_rows(
    first, last, group, SHARED: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr
):
    """Of ROWS rows of consecutive tokens: token, query head, and whether it exists."""
    index = tl.arange(0, ROWS)
    token, head = first + index // PADDED, index % PADDED
    return token, group * SHARED + head, (token < last) & (head < SHARED)


@triton.jit
def block_attention_load_rows(x, is_in, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of WIDTH columns at pointers x."""
    column = tl.arange(0, COLUMNS)
    is_there = is_in[:, None] if COLUMNS == WIDTH else is_in[:, None] & (column < WIDTH)[None, :]
    return tl.load(x[:, None] + column[None, :], mask=is_there, other=0.0)


@triton.jit
def block_attention_load(x, is_in, WIDTH: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr):
    """Rows of WIDTH columns at pointers x as tiles of K0 and K1 columns; if K1 is 0, the first tile twice."""
    if K1:
        x0 = block_attention_load_rows(x, is_in, K0, K0)
        x1 = block_attention_load_rows(x + K0, is_in, WIDTH - K0, K1)
        return x0, x1
    else:
        x0 = block_attention_load_rows(x, is_in, WIDTH, K0)
        return x0, x0


@triton.jit
def block_attention_store(x, x0, x1, is_in, WIDTH: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr):
    """Stores what `block_attention_load` loads."""
    column = tl.arange(0, K0)
    dtype = x.dtype.element_ty
    tl.store(x[:, None] + column[None, :], x0.to(dtype), mask=is_in[:, None] & (column < WIDTH)[None, :])
    if K1:
        column = K0 + tl.arange(0, K1)
        is_high = is_in[:, None] & (column < WIDTH)[None, :]
        tl.store(x[:, None] + column[None, :], x1.to(dtype), mask=is_high)


@triton.jit
def block_attention_products(a0, a1, b0, b1, K1: tl.constexpr):
    """a b^T over one or two tiles of columns."""
    out = tl.dot(a0, tl.trans(b0), input_precision="tf32x3")
    if K1:
        out = tl.dot(a1, tl.trans(b1), out, input_precision="tf32x3")
    return out
