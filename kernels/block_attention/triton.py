"""Attention over selected blocks in Triton, block by block instead of query by query.

Queries are listed by the block they chose, so that a tile of keys is loaded once for many of them, and
products are large however few heads share a selection. Each choice leaves an output and a log-sum-exp of its
block, and a query sums those of its places in order; slabs of tokens bound the memory of that. No sum depends
on the order in which programs run. (Native sparse attention, arXiv 2502.11089, walks by query; FlashMoBA,
arXiv 2511.11571, by block.)
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
    block_attention_far_keys,
    block_attention_far_query,
    block_attention_near_keys,
    block_attention_near_query,
)
from kernels.block_attention.triton_forward import block_attention_far, block_attention_near
from kernels.block_attention.triton_lists import Lists, lists_of, plan_of
from kernels.document_windows import document_windows
from kernels.places import at_places


class Tile(NamedTuple):
    """Rows of queries and heads, keys, warps and stages of one kernel."""

    rows: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Tiles by kernel; tiles of choices that a program takes of a short block; bytes of partial results."""

    far: Tile
    near: Tile
    far_keys: Tile
    near_keys: Tile
    far_query: Tile
    near_query: Tile
    steps: int
    slab_bytes: int = 1 << 29


def tiles_for(block: int, key_dim: int, dtype: torch.dtype) -> Tiles:
    """Tiles that keep sums in registers: of a short block all keys at once, of a long one some at a time."""
    if dtype == torch.float32:
        small = Tile(32, 32, 4, 1)
        return Tiles(small, small, small, small, small, small, 4)
    side, query = Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)
    keys = Tile(64, 64, 8, 2) if key_dim <= 128 else Tile(32, 64, 8, 2)
    if block <= 64:
        far_keys = Tile(32, 64, 4, 2) if key_dim <= 128 else keys
        return Tiles(side, side, far_keys, keys, side, query, 16)
    far_keys = Tile(32, 128, 8, 2) if key_dim <= 128 else keys
    if block <= 128 and key_dim <= 128:
        far = Tile(64, 128, 4, 2)
        return Tiles(far, side, far_keys, keys, far, query, 8)
    far_query = Tile(128, 64 if key_dim <= 128 else 32, 8, 2)
    return Tiles(Tile(128, 64, 8, 3), side, far_keys, keys, far_query, query, 8)


class Spec(NamedTuple):
    """Sizes of one call, and its scale."""

    rows: int
    tokens: int
    keys: int
    heads: int
    groups: int
    selectors: int
    places: int
    slots: int
    key_dim: int
    value_dim: int
    block: int
    slab: int
    scale: float
    tiles: Tiles

    @property
    def has_far(self) -> bool:
        """Whether anything can be chosen."""
        return self.places > 0 and self.slots > 0

    @property
    def dims(self) -> dict[str, int]:
        """Dims as the kernels take them: keys in two powers of two, values in one."""
        low = 1 << (self.key_dim.bit_length() - 1)
        high = max(16, _power(self.key_dim - low)) if self.key_dim > low else 0
        if low < 16 or low == high:
            low, high = max(16, _power(self.key_dim)), 0
        values = max(16, _power(self.value_dim))
        return {
            "KEY_DIM": self.key_dim,
            "LOW": low,
            "HIGH": high,
            "VALUE_DIM": self.value_dim,
            "VALUES": values,
        }

    @property
    def scale_of_two(self) -> float:
        """The scale for powers of two instead of e."""
        return self.scale * math.log2(math.e)

    def far(self, tile: Tile) -> dict[str, int]:
        """Options of a kernel over lists of choices."""
        shared = self.heads // self.selectors
        return self._options(tile, shared) | {
            "SHARED": shared,
            "BLOCK": self.block,
            "KEYS": max(16, min(tile.keys, _power(self.block))),
        }

    def near(self, tile: Tile) -> dict[str, int]:
        """Options of a kernel over consecutive queries."""
        shared = self.heads // self.groups
        return self._options(tile, shared) | {"KEYS": tile.keys, "SHARED": shared}

    def _options(self, tile: Tile, shared: int) -> dict[str, int]:
        padded = _power(shared)
        return self.dims | {
            "PADDED": padded,
            "ROWS": max(tile.rows, padded),
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

    def steps(self, options: dict[str, int]) -> int:
        """Tiles of choices of a program: several where their keys are one tile."""
        return self.tiles.steps if self.block <= options["KEYS"] else 1

    def slabs(self) -> list[tuple[int, int, int]]:
        """Number, first token and the one after the last of each slab."""
        ends = range(0, self.tokens, self.slab)
        return [(i, a, min(a + self.slab, self.tokens)) for i, a in enumerate(ends)]

    @property
    def slab_choices(self) -> int:
        """Choices of a slab."""
        return self.rows * self.slab * self.selectors * self.places


class Stands(NamedTuple):
    """Where queries stand among the keys: the first key of each one's own block, and its own place.

    Without places query t is key t. own_of_keys is the first of each key's own block. readers: how many
    queries stand before each key and before the end of the row; with places alone.
    """

    own: Int[Tensor, "B T"]
    places: Int[Tensor, "B T"] | None
    own_of_keys: Int[Tensor, "B S"]
    readers: Int[Tensor, "B S1"] | None


def stands_of(position: Tensor, places: Tensor | None, block: int) -> Stands:
    """For blocks of `block` tokens; int32."""
    token = torch.arange(position.shape[1] + 1, device=position.device, dtype=torch.int32)
    own = token[:-1] - (position % block).to(torch.int32)
    if places is None:
        return Stands(own, None, own, None)
    places = places.to(torch.int32).contiguous()
    readers = torch.searchsorted(places, token.expand(places.shape[0], -1).contiguous(), out_int32=True)
    return Stands(at_places(own, places), places, own, readers)


class BlockAttention(torch.autograd.Function):
    """q [B T H K], k [B S G K], v [B S G V], selected [B T J n], starts [B N] of slots -> out and mass."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selected: Tensor,
        starts: Tensor,
        stands: Stands,
        spec: Spec,
    ) -> tuple[Tensor, Tensor]:
        """Two launches for each slab."""
        lists = lists_of(selected, spec.groups, spec.slots, spec.slab)
        out = q.new_empty(spec.rows, spec.tokens, spec.heads, spec.value_dim)
        lse = torch.empty(out.shape[:3], dtype=torch.float32, device=q.device)
        mass = lse.new_empty(*selected.shape[:3], spec.places + 1)
        lines = spec.slab_choices * (spec.heads // spec.selectors)
        partial, partial_lse = q.new_empty(max(1, lines), spec.value_dim), lse.new_empty(max(1, lines))
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        far, near = spec.far(spec.tiles.far), spec.near(spec.tiles.near)
        far["STEPS"] = spec.steps(far)
        near |= {"OWN_SHARED": near["SHARED"], "SHARED": far["SHARED"]}
        share = far["STEPS"] * far["ROWS"] // far["PADDED"]
        plan = plan_of(lists, share, spec.slab_choices, by_slab=True) if spec.has_far else None
        for number, first, last in spec.slabs():
            if plan is not None:
                block_attention_far[(plan.owner.shape[1],)](
                    q, k, v, starts, lists.order, lists.bounds, plan.owner, plan.before, partial, partial_lse,
                    *strides, spec.tokens, first, spec.slab, number, lists.slabs, lists.lists, spec.slots,
                    spec.groups, spec.selectors, spec.places, spec.scale_of_two, **far,
                )  # fmt: skip
            grid = (triton.cdiv(last - first, near["ROWS"] // near["PADDED"]), spec.rows * spec.groups)
            block_attention_near[grid](
                q, k, v, stands.own, stands.places, selected, partial, partial_lse, out, lse, mass, *strides,
                spec.tokens, first, last, spec.slab, spec.heads, spec.groups, spec.selectors, spec.places,
                spec.scale_of_two, HAS_PLACES=stands.places is not None, **near,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, selected, starts, lists.order, lists.bounds, out, lse)
        ctx.spec, ctx.stands = spec, stands
        ctx.mark_non_differentiable(mass)
        return out, mass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Three launches, and two for each slab."""
        q, k, v, selected, starts, order, bounds, out, lse = ctx.saved_tensors
        spec, stands = ctx.spec, ctx.stands
        lists = Lists(order, bounds, spec.rows * spec.groups * spec.slots, len(spec.slabs()))
        grad, delta = grads[0].contiguous(), torch.empty_like(lse)
        block_attention_delta[(triton.cdiv(delta.numel(), 32),)](
            out, grad, delta, delta.numel(),
            VALUE_DIM=spec.value_dim, VALUES=spec.dims["VALUES"], ROWS=32,
        )  # fmt: skip
        inputs = (q, k, v, grad, lse, delta)
        grad_k, grad_v = _grads_of_keys(inputs, starts, stands, lists, spec)
        return _grad_of_queries(inputs, selected, starts, stands, lists, spec), grad_k, grad_v, *[None] * 4


def _grads_of_keys(
    inputs: tuple[Tensor, ...], starts: Tensor, stands: Stands, lists: Lists, spec: Spec
) -> tuple[Tensor, Tensor]:
    q, k, v = inputs[:3]
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    partial, before = inputs[4], stands.own
    if spec.has_far:
        far, choices = spec.far(spec.tiles.far_keys), lists.order.shape[0]
        items = far["ROWS"] // far["PADDED"]
        # Twice the mean: few blocks are in parts, and none keeps one program for long.
        far["SHARE"] = max(items, _power(2 * choices // lists.lists))
        plan = plan_of(lists, far["SHARE"], choices, by_slab=False)
        before, programs = plan.before, plan.owner.shape[1]
        size = programs * spec.block * (spec.key_dim + spec.value_dim)
        partial = torch.empty(size, dtype=torch.float32, device=q.device)
        block_attention_far_keys[(programs, triton.cdiv(spec.block, far["KEYS"]))](
            *inputs, starts, lists.order, lists.bounds, plan.owner, plan.before, partial, *strides,
            spec.tokens, lists.slabs, lists.lists, spec.slots, spec.heads, spec.groups, spec.selectors,
            spec.places, spec.scale_of_two, spec.scale, **far,
        )  # fmt: skip
    near = spec.near(spec.tiles.near_keys)
    block_attention_near_keys[(triton.cdiv(spec.keys, near["KEYS"]), spec.rows * spec.groups)](
        *inputs, *stands, starts, before, partial, grad_k, grad_v, *strides, spec.tokens, spec.keys,
        lists.lists, spec.slots, spec.heads, spec.groups, spec.scale_of_two, spec.scale,
        BLOCK=spec.block, HAS_FAR=spec.has_far, HAS_PLACES=stands.places is not None, **near,
    )  # fmt: skip
    return grad_k, grad_v


def _grad_of_queries(
    inputs: tuple[Tensor, ...], selected: Tensor, starts: Tensor, stands: Stands, lists: Lists, spec: Spec
) -> Tensor:
    q, k, v = inputs[:3]
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    far, near = spec.far(spec.tiles.far_query), spec.near(spec.tiles.near_query)
    far["STEPS"] = spec.steps(far)
    near |= {"OWN_SHARED": near["SHARED"], "SHARED": far["SHARED"]}
    lines = spec.slab_choices * far["SHARED"]
    partial = q.new_empty(max(1, lines), spec.key_dim)
    share = far["STEPS"] * far["ROWS"] // far["PADDED"]
    plan = plan_of(lists, share, spec.slab_choices, by_slab=True) if spec.has_far else None
    for number, first, last in spec.slabs():
        if plan is not None:
            block_attention_far_query[(plan.owner.shape[1],)](
                *inputs, starts, lists.order, lists.bounds, plan.owner, plan.before, partial, *strides,
                spec.tokens, first, spec.slab, number, lists.slabs, lists.lists, spec.slots, spec.heads,
                spec.groups, spec.selectors, spec.places, spec.scale_of_two, **far,
            )  # fmt: skip
        grid = (triton.cdiv(last - first, near["ROWS"] // near["PADDED"]), spec.rows * spec.groups)
        block_attention_near_query[grid](
            *inputs, stands.own, stands.places, selected, partial, grad_q, *strides, spec.tokens, first, last,
            spec.slab, spec.heads, spec.groups, spec.selectors, spec.places, spec.scale_of_two, spec.scale,
            HAS_PLACES=stands.places is not None, **near,
        )  # fmt: skip
    return grad_q


def _power(x: int) -> int:
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
    places: Int[Tensor, "B T"] | None = None,
    tiles: Tiles | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T J m"]]:
    """`kernels.block_attention.block_attention` in Triton."""
    rows, tokens, heads, key_dim = q.shape
    tiles = tiles or tiles_for(block, key_dim, q.dtype)
    windows, stands = document_windows(position, block, block), stands_of(position, places, block)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    per_token = rows * heads * selected.shape[3] * max(key_dim, v.shape[3]) * q.element_size()
    fitting = max(1, tiles.slab_bytes // max(1, per_token))
    slab = min(tokens, 1 << (fitting.bit_length() - 1))
    spec = Spec(
        rows, tokens, k.shape[1], heads, k.shape[2], selected.shape[2], selected.shape[3],
        windows.start.shape[1], key_dim, v.shape[3], block, slab, scale, tiles,
    )  # fmt: skip
    result = BlockAttention.apply(q, k, v, selected.contiguous(), windows.start, stands, spec)
    return cast(tuple[Tensor, Tensor], result)
