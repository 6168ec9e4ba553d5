"""FlashAttention-2 (arXiv 2307.08691) in Triton: which keys each query sees, sizes of tiles, launches.

Letters: B rows, T tokens, S keys, H query heads, G key heads, R query heads of a key head, K key dim, V value
dim.
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
# Where keys are values, heads of more dims than this are split over two programs.
SPLIT_DIM = 256
LOG2E = 1.4426950408889634


class Tile(NamedTuple):
    """Rows and keys that a program holds at a time, its warps, and the stages of its pipeline.

    masked_keys: keys of a tile that the forward kernel masks, at most `keys`; 0 is as many as `keys`.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    masked_keys: int = 0


class Tiles(NamedTuple):
    """Tiles of the three kernels: outputs, gradients of queries, gradients of keys and values.

    is_split: two launches, one for the gradients of keys and one for those of values. programs: with fewer
    tiles of keys than these, several programs share a tile, and their sums are added.
    """

    forward: Tile
    queries: Tile
    keys: Tile
    is_split: bool = False
    programs: int = 264


class Dims(NamedTuple):
    """The dim of a head as one or two powers of two, the last columns of which may be padding."""

    first: int
    second: int

    @property
    def size(self) -> int:
        """Columns of both."""
        return self.first + self.second


def _next_power_of_2(size: int) -> int:
    # The least power of two that is not below size.
    return 1 << max(0, size - 1).bit_length()


def _cdiv(size: int, divisor: int) -> int:
    return -(-size // divisor)


def dims_of(dim: int) -> Dims:
    """The split with the fewest columns: 96 is 64 and 32, 112 is 128, 192 is 128 and 64."""
    whole = max(16, _next_power_of_2(dim))
    rest = max(16, _next_power_of_2(dim - whole // 2))
    return Dims(whole // 2, rest) if whole // 2 >= 16 and whole // 2 + rest < whole else Dims(whole, 0)


def tiles_for(
    key_dim: int, value_dim: int, dtype: torch.dtype, *, is_shared: bool, is_windowed: bool
) -> Tiles:
    """Tiles that fill Hopper's registers and shared memory without spilling.

    is_shared: keys are values. is_windowed: a query sees few keys: most of a wide tile would be masked.
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
        forward = Tile(128, 64, 4, 3) if is_windowed else Tile(128, 128, 8, 3, 64)
        return Tiles(forward, Tile(128, 64, 8, 2), Tile(64, 64 if is_windowed else 128, 8, 2))
    if size <= 128:
        forward = Tile(128, 64, 8, 3) if is_windowed else Tile(128, 128, 8, 2, 64)
        return Tiles(forward, Tile(128, 64, 8, 2), Tile(64, 128, 8, 3))
    if size <= 192:
        forward = Tile(128, 64, 8, 2) if is_windowed else Tile(128, 128, 8, 2, 64)
        return Tiles(forward, Tile(128, 64, 8, 2), Tile(32, 128, 8, 3))
    if size <= 256:
        return Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2), is_split=True)
    if is_shared:
        return Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))
    return Tiles(Tile(64, 32, 8, 1), Tile(64, 16, 8, 1), Tile(16, 64, 8, 1), is_split=True)


class Interval(NamedTuple):
    """The keys [low, high) that each query sees, int32 [B T]; neither bound falls along a row.

    low of None: the last `window` keys up to the query itself, or without a window all. high of None: up to
    the query itself.
    """

    low: Tensor | None = None
    high: Tensor | None = None
    window: int | None = None

    @property
    def kinds(self) -> tuple[int, int]:
        """LOW and HIGH, as the kernels take them."""
        return 2 if self.low is not None else int(self.window is not None), int(self.high is not None)

    def query_bounds(self, keys: int) -> tuple[Tensor | None, Tensor | None]:
        """For each key the first query that sees it and the one after its last, [B S]; None: not needed."""
        return _first_past(self.high, keys), _first_past(self.low, keys)


def _first_past(bound: Tensor | None, keys: int) -> Tensor | None:
    # The first query with a bound above each key; int32 [B S].
    if bound is None:
        return None
    key = torch.arange(keys, dtype=torch.int32, device=bound.device).expand(bound.shape[0], -1)
    return torch.searchsorted(bound, key.contiguous(), right=True, out_int32=True)


class Spec(NamedTuple):
    """What does not need a gradient. extra: a second interval, of the same keys or of other ones."""

    scale: float
    logit_cap: float | None
    main: Interval
    extra: Interval | None
    tiles: Tiles

    @property
    def factors(self) -> tuple[float, float, float]:
        """factor in exp2(factor s), and with a logit cap cap_factor and cap of `attention_capped`."""
        if self.logit_cap is None:
            return self.scale * LOG2E, 0.0, 0.0
        return 1.0, 2 * self.scale * LOG2E / self.logit_cap, self.logit_cap * LOG2E


class _Sizes(NamedTuple):
    """Constants of a launch, as `triton_forward` names them."""

    REPEAT: int
    KEY_DIM: int
    VALUE_DIM: int
    K0: int
    K1: int
    V0: int
    V1: int
    DIM_SPLITS: int


def _sizes(q: Tensor, k: Tensor, v: Tensor | None) -> _Sizes:
    key_dim = q.shape[3]
    value_dim = key_dim if v is None else v.shape[3]
    repeat = q.shape[2] // k.shape[2]
    if v is None and key_dim > SPLIT_DIM:
        half = _next_power_of_2(key_dim) // 2
        return _Sizes(repeat, key_dim, value_dim, half, half, half, half, DIM_SPLITS=2)
    return _Sizes(repeat, key_dim, value_dim, *dims_of(key_dim), *dims_of(value_dim), DIM_SPLITS=1)


def attention_strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of rows, tokens and heads; zeros for None."""
    if x is None:
        return 0, 0, 0
    row, token, head, _ = x.stride()
    return row, token, head


def _programs(rows: int, tile: int, sizes: _Sizes, k: Tensor) -> tuple[int, int, int]:
    return _cdiv(rows, tile) * sizes.DIM_SPLITS, k.shape[2], k.shape[0]


class KeySets(NamedTuple):
    """Keys and values of both intervals; v of None: keys are values, extra_k of None: both are of k and v."""

    k: Tensor
    v: Tensor | None
    extra_k: Tensor | None
    extra_v: Tensor | None

    def arguments(self, spec: Spec) -> tuple[tuple[Any, ...], ...]:
        """Keys and values, bounds, strides, and numbers of keys and window, in the order of the kernels."""
        v = self.k if self.v is None else self.v
        extra_k = extra_v = extra_low = extra_high = None
        if spec.extra is not None:
            extra_k, extra_v = (self.k, v) if self.extra_k is None else (self.extra_k, self.extra_v)
            extra_k, extra_v = extra_k, extra_k if extra_v is None else extra_v
            extra_low, extra_high = spec.extra.low, spec.extra.high
        tensors = (self.k, v, extra_k, extra_v)
        bounds = (spec.main.low, spec.main.high, extra_low, extra_high)
        strides = tuple(attention_strides(x) for x in tensors)
        extra_keys = 0 if extra_k is None else extra_k.shape[1]
        return tensors, bounds, strides, (self.k.shape[1], extra_keys, spec.main.window or 0)


def forward_launch(
    q: Tensor, keys: KeySets, sinks: Tensor | None, spec: Spec, *, has_values: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Outputs [B T H V] and log-sum-exp [B T H]; without values the latter alone."""
    rows, tokens, heads, _ = q.shape
    sizes, tile = _sizes(q, keys.k, keys.v), spec.tiles.forward
    out = q.new_empty(rows, tokens, heads, sizes.VALUE_DIM) if has_values else None
    lse = q.new_empty(rows, tokens, heads, dtype=torch.float32)
    tensors, bounds, strides, counts = keys.arguments(spec)
    low, high = spec.main.kinds
    grid = _programs(tokens * sizes.REPEAT, tile.rows, sizes, keys.k)
    cast(Any, attention_forward)[grid](
        (q, *tensors),
        bounds,
        sinks,
        (out, lse),
        (attention_strides(q), *strides),
        (tokens, *counts),
        spec.factors,
        **sizes._asdict(),
        LOW=low,
        HIGH=high,
        HAS_EXTRA=spec.extra is not None,
        V_IS_K=keys.v is None,
        HAS_SINKS=sinks is not None,
        HAS_CAP=spec.logit_cap is not None,
        HAS_VALUES=has_values,
        ROWS=tile.rows,
        KEYS=tile.keys,
        MASKED_KEYS=tile.masked_keys or tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out, lse


class IntervalAttention(torch.autograd.Function):
    """q [B T H K], k [B S G K], v [B S G V], extra keys and values, sinks [H] -> out [B T H V], lse [B T H].

    The last dim of each has stride 1. None as in KeySets.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        extra_k: Tensor | None,
        extra_v: Tensor | None,
        sinks: Tensor | None,
        spec: Spec,
    ) -> tuple[Tensor, Tensor]:
        """One launch."""
        out, lse = forward_launch(q, KeySets(k, v, extra_k, extra_v), sinks, spec)
        assert out is not None
        ctx.save_for_backward(q, k, v, extra_k, extra_v, sinks, out, lse)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys, values and sinks."""
        q, k, v, extra_k, extra_v, sinks, out, lse = ctx.saved_tensors
        spec, keys = ctx.spec, KeySets(k, v, extra_k, extra_v)
        do = None if grads[0] is None else _dense(grads[0])
        dlse = None if grads[1] is None else grads[1].float().contiguous()
        lse2, delta = _lse_and_delta(out, do, lse, dlse, k.shape[2], spec)
        dsinks = None
        if sinks is not None:
            # [B G T R] to [H].
            count, repeat = q.shape[1] * q.shape[2] // k.shape[2], q.shape[2] // k.shape[2]
            parts = [x[..., :count].unflatten(2, (-1, repeat)) for x in (lse2, delta)]
            p_sink = (sinks.float().view(k.shape[2], 1, -1) * LOG2E - parts[0]).exp2_()
            dsinks = p_sink.mul_(parts[1]).sum((0, 2)).neg_().flatten().to(sinks.dtype)
        do = torch.zeros_like(out) if do is None else do
        row_inputs = (do, lse2, delta)
        dq = _dq(q, keys, row_inputs, spec)
        has_extra_k = extra_k is not None
        second = None if has_extra_k else spec.extra
        dk, dv = _dk_dv(q, k, v, row_inputs, spec, spec.main, second)
        dextra_k = dextra_v = None
        if has_extra_k:
            dextra_k, dextra_v = _dk_dv(q, extra_k, extra_v, row_inputs, spec, spec.extra, None)
        return dq, dk, dv, dextra_k, dextra_v, dsinks, None


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _lse_and_delta(
    out: Tensor, do: Tensor | None, lse: Tensor, dlse: Tensor | None, groups: int, spec: Spec
) -> tuple[Tensor, Tensor]:
    # The log-sum-exp in base 2, and delta; [B G rows], and a tile of rows more.
    rows, tokens, heads, dim = out.shape
    repeat, dims = heads // groups, dims_of(dim)
    length = tokens * repeat + spec.tiles.keys.rows
    lse2 = lse.new_empty(rows, groups, length)
    delta, size = torch.empty_like(lse2), max(16, 8192 // _next_power_of_2(dims.size))
    cast(Any, attention_backward_rows)[(_cdiv(length, size), groups, rows)](
        out,
        do,
        lse,
        dlse,
        lse2,
        delta,
        attention_strides(do),
        tokens,
        length,
        REPEAT=repeat,
        VALUE_DIM=dim,
        V0=dims.first,
        V1=dims.second,
        HAS_DO=do is not None,
        HAS_DLSE=dlse is not None,
        ROWS=size,
        num_warps=4,
    )
    return lse2, delta


def _dq(q: Tensor, keys: KeySets, row_inputs: tuple[Tensor, Tensor, Tensor], spec: Spec) -> Tensor:
    sizes, tile = _sizes(q, keys.k, keys.v), spec.tiles.queries
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tensors, bounds, strides, counts = keys.arguments(spec)
    low, high = spec.main.kinds
    cast(Any, attention_backward_queries)[_programs(q.shape[1] * sizes.REPEAT, tile.rows, sizes, keys.k)](
        (q, *tensors),
        bounds,
        row_inputs,
        dq,
        (attention_strides(q), *strides, attention_strides(row_inputs[0])),
        (q.shape[1], row_inputs[1].shape[2], *counts),
        spec.scale,
        spec.factors,
        **sizes._asdict(),
        LOW=low,
        HIGH=high,
        HAS_EXTRA=spec.extra is not None,
        V_IS_K=keys.v is None,
        HAS_CAP=spec.logit_cap is not None,
        ROWS=tile.rows,
        KEYS=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return dq


def _dk_dv(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    row_inputs: tuple[Tensor, Tensor, Tensor],
    spec: Spec,
    main: Interval,
    extra: Interval | None,
) -> tuple[Tensor, Tensor | None]:
    # Of keys that the queries see by `main`, and by `extra` as well if there is one.
    sizes, tile, keys = _sizes(q, k, v), spec.tiles.keys, k.shape[1]
    if keys == 0:
        return torch.zeros_like(k), None if v is None else torch.zeros_like(v)
    blocks, groups, batches = _programs(keys, tile.keys, sizes, k)
    count = q.shape[1] * sizes.REPEAT
    splits = min(spec.tiles.programs // (blocks * groups * batches), _cdiv(count, tile.rows))
    splits = max(1, splits)
    dtype = k.dtype if splits == 1 else torch.float32
    shape = (splits, batches, keys, groups)
    dk = torch.empty(*shape, sizes.KEY_DIM, dtype=dtype, device=k.device)
    dv = None
    if v is not None:
        dv = torch.empty(*shape, sizes.VALUE_DIM, dtype=dtype, device=k.device)
    query_bounds = main.query_bounds(keys) + ((None, None) if extra is None else extra.query_bounds(keys))
    low, high = main.kinds
    values = k if v is None else v
    launches = ((True, False), (False, True)) if spec.tiles.is_split and v is not None else ((True, True),)
    for wants_k, wants_v in launches:
        cast(Any, attention_backward_keys)[(blocks * splits, groups, batches)](
            (q, k, values),
            query_bounds,
            row_inputs,
            (dk, dv),
            tuple(map(attention_strides, (q, k, values, row_inputs[0]))),
            (q.shape[1], row_inputs[1].shape[2], keys, splits, main.window or 0),
            spec.scale,
            spec.factors,
            **sizes._asdict(),
            LOW=low,
            HIGH=high,
            HAS_EXTRA=extra is not None,
            V_IS_K=v is None,
            HAS_CAP=spec.logit_cap is not None,
            WANTS_K=wants_k,
            WANTS_V=wants_v,
            ROWS=tile.rows,
            KEYS=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return _summed(dk, k.dtype), None if dv is None else _summed(dv, k.dtype)


def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)


def key_sets(
    q: Tensor, k: Tensor, v: Tensor | None, extra_k: Tensor | None, extra_v: Tensor | None, spec: Spec
) -> tuple[Tensor, KeySets, Spec]:
    """Queries, keys and spec as the kernels take them: of stride 1 in the last dim, and of a scale above 0.

    Raises ValueError for dims above MAX_DIM.
    """
    for name, x in (("q", q), ("v", v)):
        if x is not None:
            require(x.shape[3] <= MAX_DIM, name, f"at most {MAX_DIM} dims", x.shape[3])
    if spec.scale <= 0:
        # The kernels take the maximum of q k, which is that of the scores if the scale is positive.
        q = -q if spec.scale < 0 else q * 0
        spec = spec._replace(scale=-spec.scale or 1.0)
    v, extra_k, extra_v = (None if x is None else _dense(x) for x in (v, extra_k, extra_v))
    return _dense(q), KeySets(_dense(k), v, extra_k, extra_v), spec


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    sinks: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Tensor]:
    """Attention over one or two intervals and its log-sum-exp; shapes as IntervalAttention.

    Raises ValueError for dims above MAX_DIM.
    """
    q, keys, spec = key_sets(q, k, v, extra_k, extra_v, spec)
    sinks = None if sinks is None else sinks.contiguous()
    out, lse = cast(tuple[Tensor, Tensor], IntervalAttention.apply(q, *keys, sinks, spec))
    return out, lse


def intervals_of(
    pattern: Pattern,
    shape: tuple[int, int],
    document: Tensor | None,
    position: Tensor | None,
    like: Tensor,
    q_index: Tensor | None = None,
) -> tuple[Interval, Interval | None]:
    """The keys of each query's window, and those at the start of its document if the pattern asks for them.

    shape: rows and keys. document, position and q_index as in `kernels.attention.attention`.
    """
    window, block, first = pattern
    is_local = window is not None and (block > 1 or first > 0)
    if document is None and not is_local and q_index is None:
        return Interval(window=window), None
    token = torch.arange(shape[1], dtype=torch.int32, device=like.device).expand(shape)
    start = torch.zeros_like(token) if document is None else _starts(document)
    opening = token * 0
    if is_local and position is not None:
        opening = token - position.to(torch.int32)
    high = None
    if q_index is not None:
        token, start, opening = (x.gather(1, q_index.long()) for x in (token, start, opening))
        high = token + 1
    if window is None:
        return Interval(start, high), None
    if block == 1:
        low = token - (window - 1)
    else:
        blocks = torch.div(token - opening, block, rounding_mode="floor") - (window // block - 1)
        low = opening + blocks * block
    low = torch.maximum(low, start)
    if not first:
        return Interval(low, high), None
    return Interval(low, high), Interval(start, torch.minimum(torch.maximum(opening + first, start), low))


def _starts(document: Tensor) -> Tensor:
    # Index of the first token of each token's document; int32 [B T].
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
    q_index: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """`kernels.attention.attention_with_lse` in Triton. Raises ValueError for dims above MAX_DIM."""
    main, extra = intervals_of(pattern, (q.shape[0], k.shape[1]), document, position, q, q_index)
    is_shared = k is v
    if tiles is None:
        is_windowed = pattern.window is not None and pattern.window <= 512
        tiles = tiles_for(q.shape[3], v.shape[3], q.dtype, is_shared=is_shared, is_windowed=is_windowed)
    spec = Spec(scale, logit_cap, main, extra, tiles)
    return interval_attention(q, k, None if is_shared else v, None, None, sinks, spec)
