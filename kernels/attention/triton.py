"""Softmax attention in Triton: the intervals of keys that queries see, sizes of tiles, and the function.

Letters: B rows, T tokens, S keys, H query heads, G key heads, K key dim, V value dim.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from kernels.arguments import require
from kernels.attention.reference import Pattern
from kernels.attention.triton_backward import attention_backward_queries, attention_backward_rows
from kernels.attention.triton_backward_keys import attention_backward_keys
from kernels.attention.triton_forward import attention_forward

MAX_DIM = 512
# Above so many dims a program writes half of the columns, if keys are values.
HALVED = 256
LOG2E = 1.4426950408889634


class Tile(NamedTuple):
    """Rows and keys that a program holds at a time, its warps, and the stages of its pipeline.

    edge: keys of the tiles that the forward kernel masks, no more than of others; 0 is as many.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    edge: int = 0


class Tiles(NamedTuple):
    """Tiles of the three kernels: outputs, gradients of queries, gradients of keys.

    is_split: keys and values get their gradients one after the other. programs: with fewer tiles of keys than
    these, several programs share one and their parts are summed.
    """

    forward: Tile
    queries: Tile
    keys: Tile
    is_split: bool = False
    programs: int = 264


class Dims(NamedTuple):
    """A dim of heads as one or two powers of two; the last columns may stand empty."""

    first: int
    second: int

    @property
    def size(self) -> int:
        """Columns of both."""
        return self.first + self.second


def _power(size: int) -> int:
    # The least power of two that is not below size.
    return 1 << max(0, size - 1).bit_length()


def _pieces(size: int, piece: int) -> int:
    return -(-size // piece)


def dims_of(dim: int) -> Dims:
    """The split with the fewest columns: 96 is 64 and 32, 112 is 128, 192 is 128 and 64."""
    whole = max(16, _power(dim))
    rest = max(16, _power(dim - whole // 2))
    return Dims(whole // 2, rest) if whole // 2 >= 16 and whole // 2 + rest < whole else Dims(whole, 0)


def tiles_for(key_dim: int, value_dim: int, dtype: torch.dtype, *, is_shared: bool, is_near: bool) -> Tiles:
    """Tiles that fill Hopper's registers and shared memory without spilling.

    is_shared: keys are values. is_near: a query sees few keys, so that wide tiles would hold others.
    """
    size = max(dims_of(key_dim).size, dims_of(value_dim).size)
    if dtype == torch.float32:
        if size <= 64:
            return Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))
        if size <= 128:
            return Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 8, 1), Tile(32, 64, 8, 1))
        if size <= 256:
            return Tiles(Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), is_split=True)
        return Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), is_split=True)
    if size <= 64:
        forward = Tile(128, 64, 4, 3) if is_near else Tile(128, 128, 8, 3, 64)
        return Tiles(forward, Tile(128, 64, 8, 2), Tile(64, 64 if is_near else 128, 8, 2))
    if size <= 128:
        forward = Tile(128, 64, 8, 3) if is_near else Tile(128, 128, 8, 2, 64)
        return Tiles(forward, Tile(128, 64, 8, 2), Tile(64, 128, 8, 3))
    if size <= 192:
        forward = Tile(128, 64, 8, 2) if is_near else Tile(128, 128, 8, 2, 64)
        return Tiles(forward, Tile(128, 64, 8, 2), Tile(32, 128, 8, 3))
    if size <= 256:
        return Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2), is_split=True)
    if is_shared:
        return Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))
    return Tiles(Tile(64, 32, 8, 1), Tile(64, 16, 8, 1), Tile(16, 64, 8, 1), is_split=True)


class Interval(NamedTuple):
    """The keys [low, high) that each query sees, int32 [B T]; both never fall along a row.

    low of None: the last `window` keys up to the query's own, or all. high of None: up to its own.
    """

    low: Tensor | None = None
    high: Tensor | None = None
    window: int | None = None

    @property
    def kinds(self) -> tuple[int, int]:
        """LOW and HIGH, as the kernels take them."""
        return 2 if self.low is not None else int(self.window is not None), int(self.high is not None)

    def readers(self, keys: int) -> tuple[Tensor | None, Tensor | None]:
        """For each key the first query that sees it and the one after its last; None where not loaded."""
        return _passing(self.high, keys), _passing(self.low, keys)


def _passing(bound: Tensor | None, keys: int) -> Tensor | None:
    # The first query whose bound is past each key; int32 [B S].
    if bound is None:
        return None
    key = torch.arange(keys, dtype=torch.int32, device=bound.device).expand(bound.shape[0], -1)
    return torch.searchsorted(bound, key.contiguous(), right=True, out_int32=True)


class Spec(NamedTuple):
    """What does not need a gradient. `far` is a second interval, of keys of its own or of the same."""

    scale: float
    logit_cap: float | None
    near: Interval
    far: Interval | None
    tiles: Tiles

    @property
    def factors(self) -> tuple[float, float, float]:
        """Of a score before powers of two are taken; and, with a cap, of the product in it, and the cap."""
        if self.logit_cap is None:
            return self.scale * LOG2E, 0.0, 0.0
        return 1.0, 2 * self.scale * LOG2E / self.logit_cap, self.logit_cap * LOG2E


class _Sizes(NamedTuple):
    """Constants of a launch."""

    REPEAT: int
    KEY_DIM: int
    VALUE_DIM: int
    K0: int
    K1: int
    V0: int
    V1: int
    HALVES: int


def _sizes(q: Tensor, k: Tensor, v: Tensor | None) -> _Sizes:
    key_dim = q.shape[3]
    value_dim = key_dim if v is None else v.shape[3]
    repeat = q.shape[2] // k.shape[2]
    if v is None and key_dim > HALVED:
        half = _power(key_dim) // 2
        return _Sizes(repeat, key_dim, value_dim, half, half, half, half, HALVES=2)
    return _Sizes(repeat, key_dim, value_dim, *dims_of(key_dim), *dims_of(value_dim), HALVES=1)


def attention_strides(x: Tensor | None) -> tuple[int, int, int]:
    """Of rows, tokens and heads."""
    if x is None:
        return 0, 0, 0
    row, token, head, _ = x.stride()
    return row, token, head


def _programs(rows: int, tile: int, sizes: _Sizes, k: Tensor) -> tuple[int, int, int]:
    return _pieces(rows, tile) * sizes.HALVES, k.shape[2], k.shape[0]


class KeySets(NamedTuple):
    """Keys and values of both intervals; v of None: keys are values, far_k of None: the keys are the same."""

    k: Tensor
    v: Tensor | None
    far_k: Tensor | None
    far_v: Tensor | None

    def arguments(self, spec: Spec) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """Tensors with their bounds, strides, numbers of keys and window, as the kernels take them."""
        v = self.k if self.v is None else self.v
        far_k = far_v = far_low = far_high = None
        if spec.far is not None:
            far_k, far_v = (self.k, v) if self.far_k is None else (self.far_k, self.far_v)
            far_k, far_v = far_k, far_k if far_v is None else far_v
            far_low, far_high = spec.far.low, spec.far.high
        tensors = (self.k, v, far_k, far_v, spec.near.low, spec.near.high, far_low, far_high)
        strides = tuple(attention_strides(x) for x in tensors[:4])
        far_keys = 0 if far_k is None else far_k.shape[1]
        return tensors, strides, (self.k.shape[1], far_keys, spec.near.window or 0)


def forward_launch(
    q: Tensor, keys: KeySets, sinks: Tensor | None, spec: Spec, *, has_values: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Outputs [B T H V] and log-sum-exp [B T H]; without values the latter alone."""
    rows, tokens, heads, _ = q.shape
    sizes, tile = _sizes(q, keys.k, keys.v), spec.tiles.forward
    out = q.new_empty(rows, tokens, heads, sizes.VALUE_DIM) if has_values else None
    lse = q.new_empty(rows, tokens, heads, dtype=torch.float32)
    tensors, strides, counts = keys.arguments(spec)
    low, high = spec.near.kinds
    grid = _programs(tokens * sizes.REPEAT, tile.rows, sizes, keys.k)
    cast(Any, attention_forward)[grid](
        q,
        *tensors,
        sinks,
        out,
        lse,
        attention_strides(q),
        *strides,
        tokens,
        *counts,
        *spec.factors,
        **sizes._asdict(),
        LOW=low,
        HIGH=high,
        FAR=spec.far is not None,
        SAME=keys.v is None,
        SINKS=sinks is not None,
        CAPPED=spec.logit_cap is not None,
        VALUES=has_values,
        ROWS=tile.rows,
        KEYS=tile.keys,
        EDGE=tile.edge or tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out, lse


class IntervalAttention(torch.autograd.Function):
    """q [B T H K], k [B S G K], v [B S G V], far keys and values, sinks [H] -> [B T H V], [B T H].

    The last dim of each is dense. Without v keys are values; far keys of None are the keys.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        far_k: Tensor | None,
        far_v: Tensor | None,
        sinks: Tensor | None,
        spec: Spec,
    ) -> tuple[Tensor, Tensor]:
        """One launch."""
        out, lse = forward_launch(q, KeySets(k, v, far_k, far_v), sinks, spec)
        assert out is not None
        ctx.save_for_backward(q, k, v, far_k, far_v, sinks, out, lse)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys, values and sinks."""
        q, k, v, far_k, far_v, sinks, out, lse = ctx.saved_tensors
        spec, keys = ctx.spec, KeySets(k, v, far_k, far_v)
        grad = None if grads[0] is None else _dense(grads[0])
        grad_lse = None if grads[1] is None else grads[1].float().contiguous()
        scaled, delta = _row_sums(out, grad, lse, grad_lse, k.shape[2], spec)
        grad_sinks = None
        if sinks is not None:
            # [B G T R] to [H].
            count, repeat = q.shape[1] * q.shape[2] // k.shape[2], q.shape[2] // k.shape[2]
            parts = [x[..., :count].unflatten(2, (-1, repeat)) for x in (scaled, delta)]
            share = (sinks.float().view(k.shape[2], 1, -1) * LOG2E - parts[0]).exp2_()
            grad_sinks = share.mul_(parts[1]).sum((0, 2)).neg_().flatten().to(sinks.dtype)
        grad = torch.zeros_like(out) if grad is None else grad
        rows = (grad, scaled, delta)
        grad_q = _query_grads(q, keys, rows, spec)
        has_own_far = far_k is not None
        second = None if has_own_far else spec.far
        grad_k, grad_v = _key_grads(q, k, v, rows, spec, spec.near, second)
        grad_far_k = grad_far_v = None
        if has_own_far:
            grad_far_k, grad_far_v = _key_grads(q, far_k, far_v, rows, spec, spec.far, None)
        return grad_q, grad_k, grad_v, grad_far_k, grad_far_v, grad_sinks, None


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _row_sums(
    out: Tensor, grad: Tensor | None, lse: Tensor, grad_lse: Tensor | None, groups: int, spec: Spec
) -> tuple[Tensor, Tensor]:
    # The log-sum-exp for powers of two, and delta; [B G rows], with a tile of rows past the last.
    rows, tokens, heads, dim = out.shape
    repeat, dims = heads // groups, dims_of(dim)
    length = tokens * repeat + spec.tiles.keys.rows
    scaled = lse.new_empty(rows, groups, length)
    delta, size = torch.empty_like(scaled), max(16, 8192 // _power(dims.size))
    cast(Any, attention_backward_rows)[(_pieces(length, size), groups, rows)](
        out,
        grad,
        lse,
        grad_lse,
        scaled,
        delta,
        attention_strides(grad),
        tokens,
        length,
        REPEAT=repeat,
        VALUE_DIM=dim,
        V0=dims.first,
        V1=dims.second,
        HAS_GRAD=grad is not None,
        HAS_GRAD_LSE=grad_lse is not None,
        ROWS=size,
        num_warps=4,
    )
    return scaled, delta


def _query_grads(q: Tensor, keys: KeySets, rows: tuple[Tensor, Tensor, Tensor], spec: Spec) -> Tensor:
    sizes, tile = _sizes(q, keys.k, keys.v), spec.tiles.queries
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tensors, strides, counts = keys.arguments(spec)
    low, high = spec.near.kinds
    cast(Any, attention_backward_queries)[_programs(q.shape[1] * sizes.REPEAT, tile.rows, sizes, keys.k)](
        q,
        *tensors,
        *rows,
        grad_q,
        attention_strides(q),
        *strides,
        attention_strides(rows[0]),
        q.shape[1],
        rows[1].shape[2],
        *counts,
        spec.scale,
        *spec.factors,
        **sizes._asdict(),
        LOW=low,
        HIGH=high,
        FAR=spec.far is not None,
        SAME=keys.v is None,
        CAPPED=spec.logit_cap is not None,
        ROWS=tile.rows,
        KEYS=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return grad_q


def _key_grads(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    rows: tuple[Tensor, Tensor, Tensor],
    spec: Spec,
    near: Interval,
    far: Interval | None,
) -> tuple[Tensor, Tensor | None]:
    # Of keys that the queries see by `near`, and by `far` as well if there is one.
    sizes, tile, keys = _sizes(q, k, v), spec.tiles.keys, k.shape[1]
    if keys == 0:
        return torch.zeros_like(k), None if v is None else torch.zeros_like(v)
    blocks, groups, lines = _programs(keys, tile.keys, sizes, k)
    count = q.shape[1] * sizes.REPEAT
    splits = min(spec.tiles.programs // (blocks * groups * lines), _pieces(count, tile.rows))
    splits = max(1, splits)
    dtype = k.dtype if splits == 1 else torch.float32
    shape = (splits, lines, keys, groups)
    grad_k = torch.empty(*shape, sizes.KEY_DIM, dtype=dtype, device=k.device)
    grad_v = None
    if v is not None:
        grad_v = torch.empty(*shape, sizes.VALUE_DIM, dtype=dtype, device=k.device)
    readers = near.readers(keys) + ((None, None) if far is None else far.readers(keys))
    low, high = near.kinds
    values = k if v is None else v
    passes = ((True, False), (False, True)) if spec.tiles.is_split and v is not None else ((True, True),)
    for wants_k, wants_v in passes:
        cast(Any, attention_backward_keys)[(blocks * splits, groups, lines)](
            q,
            k,
            values,
            *readers,
            *rows,
            grad_k,
            grad_v,
            attention_strides(q),
            attention_strides(k),
            attention_strides(values),
            attention_strides(rows[0]),
            q.shape[1],
            rows[1].shape[2],
            keys,
            splits,
            near.window or 0,
            spec.scale,
            *spec.factors,
            **sizes._asdict(),
            LOW=low,
            HIGH=high,
            FAR=far is not None,
            SAME=v is None,
            CAPPED=spec.logit_cap is not None,
            WANTS_K=wants_k,
            WANTS_V=wants_v,
            ROWS=tile.rows,
            KEYS=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return _summed(grad_k, k.dtype), None if grad_v is None else _summed(grad_v, k.dtype)


def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)


def key_sets(
    q: Tensor, k: Tensor, v: Tensor | None, far_k: Tensor | None, far_v: Tensor | None, spec: Spec
) -> tuple[Tensor, KeySets, Spec]:
    """Queries, keys and spec as the kernels take them: dense in the last dim, and of a scale above 0.

    Raises ValueError for dims above MAX_DIM.
    """
    for name, x in (("q", q), ("v", v)):
        if x is not None:
            require(x.shape[3] <= MAX_DIM, name, f"at most {MAX_DIM} dims", x.shape[3])
    if spec.scale <= 0:
        # The kernels take the highest product for the highest score.
        q = -q if spec.scale < 0 else q * 0
        spec = spec._replace(scale=-spec.scale or 1.0)
    v, far_k, far_v = (None if x is None else _dense(x) for x in (v, far_k, far_v))
    return _dense(q), KeySets(_dense(k), v, far_k, far_v), spec


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    far_k: Tensor | None,
    far_v: Tensor | None,
    sinks: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Tensor]:
    """Attention over one or two intervals and its log-sum-exp; shapes as IntervalAttention.

    Raises ValueError for dims above MAX_DIM.
    """
    q, keys, spec = key_sets(q, k, v, far_k, far_v, spec)
    sinks = None if sinks is None else sinks.contiguous()
    out, lse = cast(tuple[Tensor, Tensor], IntervalAttention.apply(q, *keys, sinks, spec))
    return out, lse


def intervals_of(
    pattern: Pattern,
    shape: tuple[int, int],
    document: Tensor | None,
    position: Tensor | None,
    like: Tensor,
    places: Tensor | None = None,
) -> tuple[Interval, Interval | None]:
    """The keys near each query, and those at the start of its document if the pattern asks for them.

    shape: rows and keys. With places queries are the keys there, in rising order.
    """
    window, block, first = pattern
    is_local = window is not None and (block > 1 or first > 0)
    if document is None and not is_local and places is None:
        return Interval(window=window), None
    token = torch.arange(shape[1], dtype=torch.int32, device=like.device).expand(shape)
    start = torch.zeros_like(token) if document is None else _starts(document)
    base = token * 0
    if is_local and position is not None:
        base = token - position.to(torch.int32)
    high = None
    if places is not None:
        token, start, base = (x.gather(1, places.long()) for x in (token, start, base))
        high = token + 1
    if window is None:
        return Interval(start, high), None
    if block == 1:
        low = token - (window - 1)
    else:
        blocks = torch.div(token - base, block, rounding_mode="floor") - (window // block - 1)
        low = base + blocks * block
    low = torch.maximum(low, start)
    if not first:
        return Interval(low, high), None
    return Interval(low, high), Interval(start, torch.minimum(torch.maximum(base + first, start), low))


def _starts(document: Tensor) -> Tensor:
    # The first token of each token's document, whose numbers never fall; int32 [B T].
    document = document.contiguous()
    return torch.searchsorted(document, document, out_int32=True)


def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    pattern: Pattern,
    sinks: Tensor | None = None,
    logit_cap: float | None = None,
    document: Tensor | None = None,
    position: Tensor | None = None,
    places: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """`kernels.attention.attention_with_lse` in Triton. Raises ValueError for dims above MAX_DIM."""
    near, far = intervals_of(pattern, (q.shape[0], k.shape[1]), document, position, q, places)
    is_shared = k is v
    if tiles is None:
        is_near = pattern.window is not None and pattern.window <= 512
        tiles = tiles_for(q.shape[3], v.shape[3], q.dtype, is_shared=is_shared, is_near=is_near)
    spec = Spec(scale, logit_cap, near, far, tiles)
    return interval_attention(q, k, None if is_shared else v, None, None, sinks, spec)
