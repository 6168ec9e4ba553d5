"""Attention over selected blocks in Triton, block by block instead of query by query.

Queries are listed by the block they chose (FlashMoBA, arXiv 2511.11571), so that a tile of keys is loaded
once for many of them, and products are large however few heads share a selection; the kernel of Native Sparse
Attention (arXiv 2502.11089, section 3.4) goes by query. Each choice leaves the output and log-sum-exp of its
block, and a query merges those of its choices in order of rank; chunks of tokens bound the memory of these
partial outputs. No sum depends on the order in which programs run.

Letters: B rows, T queries, S keys, H query heads, G key heads, J selecting heads, n selected blocks, m = n +
1, K key dim, V value dim, N slots of blocks.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# A kernel's launch looks to pyright like a call of the Python function.

import math
from typing import Any, NamedTuple, cast

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from kernels.block_attention.triton_backward import (
    block_attention_delta,
    block_attention_own_dkv,
    block_attention_own_dq,
    block_attention_selected_dkv,
    block_attention_selected_dq,
)
from kernels.block_attention.triton_forward import (
    block_attention_own_forward,
    block_attention_selected_forward,
)
from kernels.block_attention.triton_lists import Lists, lists_of, plan_of
from kernels.document_windows import document_windows
from kernels.query_index import at_queries


class Tile(NamedTuple):
    """Rows (query heads of tokens) and keys of a tile, warps and pipeline stages of one kernel."""

    rows: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Tiles of each kernel, forward and backward.

    steps: tiles of choices that a program takes if the keys of a block are one tile. chunk_bytes: of the
    partial outputs in memory at once.
    """

    selected_forward: Tile
    own_forward: Tile
    selected_dkv: Tile
    own_dkv: Tile
    selected_dq: Tile
    own_dq: Tile
    steps: int
    chunk_bytes: int = 1 << 29


def tiles_for(block: int, key_dim: int, dtype: torch.dtype) -> Tiles:
    """Tiles whose sums fit in registers: all keys of a short block at once, some at a time of a long one."""
    if dtype == torch.float32:
        small = Tile(32, 32, 4, 1)
        return Tiles(small, small, small, small, small, small, 4)
    own_forward, own_dq = Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)
    own_dkv = Tile(64, 64, 8, 2) if key_dim <= 128 else Tile(32, 64, 8, 2)
    if block <= 64:
        selected_dkv = Tile(32, 64, 4, 2) if key_dim <= 128 else own_dkv
        return Tiles(own_forward, own_forward, selected_dkv, own_dkv, own_forward, own_dq, 16)
    selected_dkv = Tile(32, 128, 8, 2) if key_dim <= 128 else own_dkv
    if block <= 128 and key_dim <= 128:
        selected_forward = Tile(64, 128, 4, 2)
        return Tiles(selected_forward, own_forward, selected_dkv, own_dkv, selected_forward, own_dq, 8)
    selected_dq = Tile(128, 64 if key_dim <= 128 else 32, 8, 2)
    return Tiles(Tile(128, 64, 8, 3), own_forward, selected_dkv, own_dkv, selected_dq, own_dq, 8)


class Sizes(NamedTuple):
    """Sizes that are no constants of the kernels; chunk_size: tokens of a chunk, lists: of all rows."""

    tokens: int
    chunk_size: int
    chunks: int
    lists: int
    slots: int
    heads: int
    groups: int
    selectors: int
    num_selected: int


class Spec(NamedTuple):
    """Sizes of one call, its scale and tiles. chunk: tokens of a chunk; selectors: heads that select."""

    rows: int
    tokens: int
    keys: int
    heads: int
    groups: int
    selectors: int
    num_selected: int
    slots: int
    key_dim: int
    value_dim: int
    block: int
    chunk: int
    scale: float
    tiles: Tiles

    @property
    def has_selected(self) -> bool:
        """Whether any block can be selected."""
        return self.num_selected > 0 and self.slots > 0

    @property
    def dims(self) -> dict[str, int]:
        """Columns of a key as tiles K0 and K1, of a value as V0, all of them powers of two or 0."""
        k0 = 1 << (self.key_dim.bit_length() - 1)
        k1 = max(16, _next_power_of_2(self.key_dim - k0)) if self.key_dim > k0 else 0
        if k0 < 16 or k0 == k1:
            k0, k1 = max(16, _next_power_of_2(self.key_dim)), 0
        v0 = max(16, _next_power_of_2(self.value_dim))
        return {
            "KEY_DIM": self.key_dim,
            "K0": k0,
            "K1": k1,
            "VALUE_DIM": self.value_dim,
            "V0": v0,
        }

    @property
    def scale_log2(self) -> float:
        """The scale of scores in base 2."""
        return self.scale * math.log2(math.e)

    def selected_options(self, tile: Tile) -> dict[str, int]:
        """Constants of a kernel over lists of choices."""
        shared = self.heads // self.selectors
        return self._options(tile, shared) | {
            "SHARED": shared,
            "BLOCK": self.block,
            "KEYS": max(16, min(tile.keys, _next_power_of_2(self.block))),
        }

    def own_options(self, tile: Tile) -> dict[str, int]:
        """Constants of a kernel over consecutive queries."""
        shared = self.heads // self.groups
        return self._options(tile, shared) | {"KEYS": tile.keys, "SHARED": shared}

    def _options(self, tile: Tile, shared: int) -> dict[str, int]:
        padded = _next_power_of_2(shared)
        return self.dims | {
            "PADDED": padded,
            "ROWS": max(tile.rows, padded),
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

    def steps(self, options: dict[str, int]) -> int:
        """Tiles of choices that a program takes: several if the keys of a block are one tile."""
        return self.tiles.steps if self.block <= options["KEYS"] else 1

    def chunks(self) -> list[tuple[int, int, int]]:
        """Index, first token and the one after the last of each chunk."""
        ends = range(0, self.tokens, self.chunk)
        return [(i, a, min(a + self.chunk, self.tokens)) for i, a in enumerate(ends)]

    def sizes(self, lists: Lists) -> Sizes:
        """What kernels take."""
        return Sizes(
            self.tokens, self.chunk, lists.chunks, lists.lists, self.slots, self.heads, self.groups,
            self.selectors, self.num_selected,
        )  # fmt: skip

    @property
    def chunk_choices(self) -> int:
        """Choices of a chunk."""
        return self.rows * self.chunk * self.selectors * self.num_selected


class OwnBlocks(NamedTuple):
    """The own block of each query and key: index of its first key in the row.

    q_index: index of each query in its row of keys; None: query t is key t. queries_before: how many queries
    have a lower index than each key, and than the end of the row; None without q_index.
    """

    own_starts: Int[Tensor, "B T"]
    q_index: Int[Tensor, "B T"] | None
    own_starts_of_keys: Int[Tensor, "B S"]
    queries_before: Int[Tensor, "B S1"] | None


def own_blocks(position: Tensor, q_index: Tensor | None, block: int) -> OwnBlocks:
    """The own blocks, of `block` tokens each; int32."""
    token = torch.arange(position.shape[1] + 1, device=position.device, dtype=torch.int32)
    own = token[:-1] - (position % block).to(torch.int32)
    if q_index is None:
        return OwnBlocks(own, None, own, None)
    q_index = q_index.to(torch.int32).contiguous()
    queries_before = torch.searchsorted(
        q_index, token.expand(q_index.shape[0], -1).contiguous(), out_int32=True
    )
    return OwnBlocks(at_queries(own, q_index), q_index, own, queries_before)


class BlockAttention(torch.autograd.Function):
    """q [B T H K], k [B S G K], v [B S G V], selection [B T J n], starts [B N] of slots -> out and mass."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: Tensor,
        starts: Tensor,
        own_blocks: OwnBlocks,
        spec: Spec,
    ) -> tuple[Tensor, Tensor]:
        """Two launches for each chunk."""
        lists = lists_of(selection, spec.groups, spec.slots, spec.chunk)
        out = q.new_empty(spec.rows, spec.tokens, spec.heads, spec.value_dim)
        lse = torch.empty(out.shape[:3], dtype=torch.float32, device=q.device)
        mass = lse.new_empty(*selection.shape[:3], spec.num_selected + 1)
        partial_rows = spec.chunk_choices * (spec.heads // spec.selectors)
        partial, partial_lse = (
            q.new_empty(max(1, partial_rows), spec.value_dim),
            lse.new_empty(max(1, partial_rows)),
        )
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        selected, own = (
            spec.selected_options(spec.tiles.selected_forward),
            spec.own_options(spec.tiles.own_forward),
        )
        selected["STEPS"] = spec.steps(selected)
        own |= {"OWN_SHARED": own["SHARED"], "SHARED": selected["SHARED"]}
        per_program = selected["STEPS"] * selected["ROWS"] // selected["PADDED"]
        plan = plan_of(lists, per_program, spec.chunk_choices, by_chunk=True) if spec.has_selected else None
        sizes = spec.sizes(lists)
        for number, first, last in spec.chunks():
            if plan is not None:
                block_attention_selected_forward[(plan.list_of_program.shape[1],)](
                    (q, k, v), strides, (starts, *lists[:2], *plan[:2]), partial, partial_lse, sizes,
                    first, number, spec.scale_log2, **selected,
                )  # fmt: skip
            grid = (triton.cdiv(last - first, own["ROWS"] // own["PADDED"]), spec.rows * spec.groups)
            block_attention_own_forward[grid](
                (q, k, v), strides, *own_blocks[:2], selection, partial, partial_lse, (out, lse, mass), sizes,
                first, last, spec.scale_log2,
                HAS_Q_INDEX=own_blocks.q_index is not None, **own,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, selection, starts, lists.order, lists.bounds, out, lse)
        ctx.spec, ctx.own_blocks = spec, own_blocks
        ctx.mark_non_differentiable(mass)
        return out, mass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Three launches, and two for each chunk."""
        q, k, v, selection, starts, order, bounds, out, lse = ctx.saved_tensors
        spec, own_blocks = ctx.spec, ctx.own_blocks
        lists = Lists(order, bounds, spec.rows * spec.groups * spec.slots, len(spec.chunks()))
        do, delta = grads[0].contiguous(), torch.empty_like(lse)
        block_attention_delta[(triton.cdiv(delta.numel(), 32),)](
            out, do, delta, delta.numel(),
            VALUE_DIM=spec.value_dim, V0=spec.dims["V0"], ROWS=32,
        )  # fmt: skip
        inputs = (q, k, v, do, lse, delta)
        dk, dv = _dk_dv(inputs, starts, own_blocks, lists, spec)
        return _dq(inputs, selection, starts, own_blocks, lists, spec), dk, dv, *[None] * 4


def _dk_dv(
    inputs: tuple[Tensor, ...], starts: Tensor, own_blocks: OwnBlocks, lists: Lists, spec: Spec
) -> tuple[Tensor, Tensor]:
    q, k, v = inputs[:3]
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    partial, first_program = inputs[4], own_blocks.own_starts
    if spec.has_selected:
        selected, choices = spec.selected_options(spec.tiles.selected_dkv), lists.order.shape[0]
        items = selected["ROWS"] // selected["PADDED"]
        # Twice the mean: few lists are split, and none keeps one program for long.
        selected["CHOICES"] = max(items, _next_power_of_2(2 * choices // lists.lists))
        plan = plan_of(lists, selected["CHOICES"], choices, by_chunk=False)
        first_program, programs = plan.first_program, plan.list_of_program.shape[1]
        size = programs * spec.block * (spec.key_dim + spec.value_dim)
        partial = torch.empty(size, dtype=torch.float32, device=q.device)
        block_attention_selected_dkv[(programs, triton.cdiv(spec.block, selected["KEYS"]))](
            inputs, strides, (starts, *lists[:2], *plan[:2]), partial, spec.sizes(lists), spec.scale_log2,
            spec.scale, **selected,
        )  # fmt: skip
    own = spec.own_options(spec.tiles.own_dkv)
    block_attention_own_dkv[(triton.cdiv(spec.keys, own["KEYS"]), spec.rows * spec.groups)](
        inputs, strides, own_blocks, starts, first_program, partial, dk, dv, spec.sizes(lists), spec.keys,
        spec.scale_log2, spec.scale,
        BLOCK=spec.block, HAS_SELECTED=spec.has_selected, HAS_Q_INDEX=own_blocks.q_index is not None, **own,
    )  # fmt: skip
    return dk, dv


def _dq(
    inputs: tuple[Tensor, ...],
    selection: Tensor,
    starts: Tensor,
    own_blocks: OwnBlocks,
    lists: Lists,
    spec: Spec,
) -> Tensor:
    q, k, v = inputs[:3]
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    selected, own = spec.selected_options(spec.tiles.selected_dq), spec.own_options(spec.tiles.own_dq)
    selected["STEPS"] = spec.steps(selected)
    own |= {"OWN_SHARED": own["SHARED"], "SHARED": selected["SHARED"]}
    partial_rows = spec.chunk_choices * selected["SHARED"]
    partial = q.new_empty(max(1, partial_rows), spec.key_dim)
    per_program = selected["STEPS"] * selected["ROWS"] // selected["PADDED"]
    plan = plan_of(lists, per_program, spec.chunk_choices, by_chunk=True) if spec.has_selected else None
    sizes = spec.sizes(lists)
    for number, first, last in spec.chunks():
        if plan is not None:
            block_attention_selected_dq[(plan.list_of_program.shape[1],)](
                inputs, strides, (starts, *lists[:2], *plan[:2]), partial, sizes, first, number,
                spec.scale_log2, **selected,
            )  # fmt: skip
        grid = (triton.cdiv(last - first, own["ROWS"] // own["PADDED"]), spec.rows * spec.groups)
        block_attention_own_dq[grid](
            inputs, strides, *own_blocks[:2], selection, partial, dq, sizes, first, last, spec.scale_log2,
            spec.scale, HAS_Q_INDEX=own_blocks.q_index is not None, **own,
        )  # fmt: skip
    return dq


def _next_power_of_2(x: int) -> int:
    return int(triton.next_power_of_2(max(1, x)))


def block_attention_triton(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    selected: Int[Tensor, "B T J n"],
    *,
    scale: float,
    block: int,
    position: Int[Tensor, "B S"],
    q_index: Int[Tensor, "B T"] | None = None,
    tiles: Tiles | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T J m"]]:
    """`kernels.block_attention.block_attention` in Triton."""
    rows, tokens, heads, key_dim = q.shape
    tiles = tiles or tiles_for(block, key_dim, q.dtype)
    windows, own = document_windows(position, block, block), own_blocks(position, q_index, block)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    per_token = rows * heads * selected.shape[3] * max(key_dim, v.shape[3]) * q.element_size()
    fitting = max(1, tiles.chunk_bytes // max(1, per_token))
    chunk = min(tokens, 1 << (fitting.bit_length() - 1))
    spec = Spec(
        rows, tokens, k.shape[1], heads, k.shape[2], selected.shape[2], selected.shape[3],
        windows.start.shape[1], key_dim, v.shape[3], block, chunk, scale, tiles,
    )  # fmt: skip
    result = BlockAttention.apply(q, k, v, selected.contiguous(), windows.start, own, spec)
    return cast(tuple[Tensor, Tensor], result)
