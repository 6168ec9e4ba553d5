"""Linear attention and the delta rule in Triton: intra-chunk side by side, then inter-chunk one by one.

Letters: B rows, T tokens, N chunks, C chunk, G key heads, H value heads, K key dim, V value dim.
Forward is two launches. Backward makes k_ut again (the delta rule's alone, and decays per channel), passes
the chunks both ways in one launch, and then finds the gradients of each chunk on its own.
"""

from typing import Any, NamedTuple, cast

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from kernels.linear_attention.triton_channel import (
    linear_attention_backward_channel,
    linear_attention_backward_pairs,
    linear_attention_intra_chunk_channel,
)
from kernels.linear_attention.triton_head import (
    linear_attention_backward_head,
    linear_attention_intra_chunk_head,
)
from kernels.linear_attention.triton_scan import linear_attention_backward_scan, linear_attention_forward


class Part(NamedTuple):
    """Blocks of K and V that one kind of kernel takes, and its warps. Not all kinds cut both dims."""

    keys: int
    values: int
    warps: int


class Tiles(NamedTuple):
    """Tokens of a chunk, stages of the inter-chunk loads, and blocks before, in, and after inter-chunk."""

    chunk: int
    stages: int
    intra_chunk: Part
    forward: Part
    backward: Part
    gradients: Part


class Kind(NamedTuple):
    """Whether there is a decay, whether per key channel, and whether writes erase first."""

    has_decay: bool
    is_channel: bool
    is_delta: bool


class Scan(NamedTuple):
    """Sizes and kind of one call."""

    rows: int
    tokens: int
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    chunks: int
    kind: Kind
    tiles: Tiles

    @property
    def repeat(self) -> int:
        """Value heads of a key head."""
        return self.heads // self.key_heads

    def dims(self, *names: str) -> dict[str, Any]:
        """Compile-time sizes by name."""
        found = {
            "K": self.key_dim,
            "V": self.value_dim,
            "KEYS": _padded(self.key_dim),
            "VALUES": _padded(self.value_dim),
            "CHUNK": self.tiles.chunk,
            "IS_DELTA": self.kind.is_delta,
        }
        return {name: found[name] for name in ("K", "KEYS", "CHUNK", "IS_DELTA", *names)}

    def blocks(self, part: Part) -> dict[str, Any]:
        """Blocks of K and V and warps by name."""
        keys, values = min(_padded(self.key_dim), part.keys), min(_padded(self.value_dim), part.values)
        return {"KEY_BLOCK": keys, "VALUE_BLOCK": values, "num_warps": part.warps}


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def tiles_for(key_dim: int, value_dim: int, heads: int, kind: Kind, dtype: torch.dtype) -> Tiles:
    """Tiles for so many heads of all rows together.

    The inter-chunk kernels take blocks of V such that their programs fill the machine once: two of them fit
    on a core without the delta rule, one with it.
    """
    is_small = 2 * key_dim * dtype.itemsize <= 512
    full = 128 if kind.is_delta else 256

    def inter_chunk(directions: int) -> Part:
        is_wide = is_small and directions * heads * triton.cdiv(value_dim, 64) >= full
        return Part(key_dim, 64, 8) if is_wide else Part(key_dim, 32, 4 if is_small else 8)

    intra_chunk, gradients = Part(32, 64, 4), Part(64, 64, 8)
    if kind.is_channel:
        intra_chunk = Part(32, 64, 8 if kind.is_delta else 4)
        gradients = Part(32, 64, 4 if kind.is_delta else 8)
    return Tiles(64, 2 if is_small else 1, intra_chunk, inter_chunk(1), inter_chunk(2), gradients)


def scan_of(q: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, tiles: Tiles | None) -> Scan:
    """Sizes and kind of a call with these inputs."""
    rows, tokens, key_heads, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    kind = Kind(log_decay is not None, log_decay is not None and log_decay.ndim == 4, beta is not None)
    tiles = tiles or tiles_for(key_dim, value_dim, rows * heads, kind, q.dtype)
    chunks = triton.cdiv(tokens, tiles.chunk)
    return Scan(rows, tokens, key_heads, heads, key_dim, value_dim, chunks, kind, tiles)


class IntraChunk(NamedTuple):
    """What the inter-chunk kernels read. A part that its kind does not have stands in for another tensor.

    q, k: decayed from the chunk's start if decays are per channel, else the inputs. k_ut [B T H K], scores
    and inverse [B T H C], decay_from_start and decay_to_end [B T H], kept [B N H K].
    """

    q: Tensor
    k: Tensor
    k_ut: Tensor
    scores: Tensor
    inverse: Tensor
    decay_from_start: Tensor
    decay_to_end: Tensor
    kept: Tensor


class Inputs(NamedTuple):
    """Inputs with strides that kernels take: tokens of all rows follow each other at one distance."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    document: Tensor | None

    def steps(self, *names: str) -> list[int]:
        """Distances between tokens and between heads, of each input named; 0 for one that is not there."""
        parts = [getattr(self, name) for name in names]
        return [0 if part is None else part.stride(axis) for part in parts for axis in (1, 2)]


def _row_strided(x: Tensor) -> Tensor:
    is_dense = x.ndim == 3 or x.stride(-1) == 1
    return x if is_dense and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)) else x.contiguous()


def intra_chunk(scan: Scan, inputs: Inputs, solved: IntraChunk | None, *, is_kept: bool) -> IntraChunk:
    """One launch; with `solved` only what follows from its inverse."""
    q, k, _, log_decay, beta, document = inputs
    rows, tokens, heads, chunk = scan.rows, scan.tokens, scan.heads, scan.tiles.chunk
    new = lambda *shape, like=q: torch.empty(shape, dtype=like.dtype, device=q.device)  # noqa: E731
    squares = scan.kind.is_delta and is_kept
    scores = solved.scores if solved else new(rows, tokens, heads, chunk)
    inverse = solved.inverse if solved else new(rows, tokens, heads, chunk) if squares else scores
    sizes = (scan.tokens, scan.chunks, heads, scan.repeat)
    flags = {"HAS_DOCUMENT": document is not None, "IS_SOLVED": solved is not None, "IS_KEPT": is_kept}
    flags |= scan.dims() | scan.blocks(scan.tiles.intra_chunk) | {"num_stages": 1}
    del flags["VALUE_BLOCK"]
    steps = inputs.steps("q", "k", "log_decay", "beta")
    grid = (scan.chunks * rows * heads,)
    if scan.kind.is_channel:
        assert log_decay is not None
        k_ut, q_decayed = new(rows, tokens, heads, scan.key_dim), new(rows, tokens, heads, scan.key_dim)
        k_decayed = torch.empty_like(k_ut) if scan.kind.is_delta else k_ut
        kept = q.new_empty(rows, scan.chunks, heads, scan.key_dim, dtype=torch.float32)
        found = IntraChunk(q_decayed, k_decayed, k_ut, scores, inverse, kept, kept, kept)
        buffers = (scores, inverse, q_decayed, k_decayed, k_ut, kept)
        linear_attention_intra_chunk_channel[grid](
            q, k, log_decay, beta, document, *buffers, *sizes, *steps, **flags
        )
        return found
    k_ut = new(rows, tokens, heads, scan.key_dim) if scan.kind.is_delta else k
    decay_from_start, decay_to_end = (
        (solved.decay_from_start, solved.decay_to_end)
        if solved
        else q.new_empty(2, rows, tokens, heads, dtype=torch.float32).unbind()
    )
    buffers = (scores, inverse, k_ut, decay_from_start, decay_to_end)
    flags["HAS_DECAY"] = scan.kind.has_decay
    linear_attention_intra_chunk_head[grid](
        q, k, log_decay, beta, document, *buffers, *sizes, *steps, **flags
    )
    return IntraChunk(q, k, k_ut, scores, inverse, decay_from_start, decay_to_end, decay_from_start)


class ScanTriton(torch.autograd.Function):
    """q, k, v, log_decay, beta, first state, documents -> outputs and final state.

    All but q, k and v may be None.

    Keeps its inputs and, for each token and head, a row of scores and of the inverse.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        beta: Tensor | None,
        state: Tensor | None,
        document: Tensor | None,
        tiles: Tiles | None,
    ) -> tuple[Tensor, Tensor]:
        """Two launches."""
        ctx.set_materialize_grads(False)
        scan = scan_of(q, v, log_decay, beta, tiles)
        parts = (None if x is None else _row_strided(x) for x in (q, k, v, log_decay, beta))
        inputs = Inputs(*parts, None if document is None else document.contiguous())  # type: ignore[arg-type]
        first = None if state is None else state.to(torch.float32).contiguous()
        intra = intra_chunk(scan, inputs, None, is_kept=any(ctx.needs_input_grad))
        shape = (scan.rows, scan.tokens, scan.heads, scan.value_dim)
        out = torch.empty(shape, dtype=v.dtype, device=v.device)
        end = torch.empty(
            scan.rows, scan.heads, scan.key_dim, scan.value_dim, dtype=torch.float32, device=v.device
        )
        options = _inter_chunk_options(scan, scan.tiles.forward)
        grid = (triton.cdiv(scan.value_dim, options["VALUES"]), scan.rows * scan.heads)
        linear_attention_forward[grid](
            *(intra.q, intra.k, inputs.v, intra.k_ut, intra.scores),
            *(intra.decay_from_start, intra.decay_to_end, intra.kept, inputs.beta, first, out, end),
            *(scan.tokens, scan.heads, scan.repeat, *inputs.steps("q", "k", "v", "beta")),
            **options,
            HAS_STATE=first is not None,
        )
        ctx.scan, ctx.state_dtype = scan, None if state is None else state.dtype
        kept = (intra.scores, intra.inverse, intra.decay_from_start, intra.decay_to_end)
        ctx.save_for_backward(*inputs, first, *kept)
        return out, end

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Two launches; three with the delta rule, or with decays per channel."""
        scan: Scan = ctx.scan
        *parts, first, scores, inverse, decay_from_start, decay_to_end = ctx.saved_tensors
        inputs = Inputs(*parts)
        q, k, v, *_ = inputs
        intra = IntraChunk(q, k, k, scores, inverse, decay_from_start, decay_to_end, decay_from_start)
        if scan.kind.is_delta or scan.kind.is_channel:
            intra = intra_chunk(scan, inputs, intra, is_kept=True)
        shape = (scan.rows, scan.tokens, scan.heads, scan.value_dim)
        grad_out = torch.zeros(shape, dtype=v.dtype, device=v.device) if grads[0] is None else grads[0]
        grad_out = grad_out.to(v.dtype).contiguous()
        grad_end = None if grads[1] is None else grads[1].to(torch.float32).contiguous()
        grad_x = torch.empty(shape, dtype=v.dtype, device=v.device)
        v_error = torch.empty_like(grad_x) if scan.kind.is_delta else v
        states, grad_states = q.new_empty(
            2, scan.rows, scan.chunks, scan.heads, scan.key_dim, scan.value_dim, dtype=_state_dtype(q)
        ).unbind()
        wants_state = first is not None and ctx.needs_input_grad[5]
        grad_state = torch.empty_like(first) if wants_state else None
        options = _inter_chunk_options(scan, scan.tiles.backward)
        grid = (2 * triton.cdiv(scan.value_dim, options["VALUES"]), scan.rows * scan.heads)
        linear_attention_backward_scan[grid](
            *(intra.q, intra.k, v, intra.k_ut, scores),
            *(intra.decay_from_start, intra.decay_to_end, intra.kept, inputs.beta, first),
            *(states, v_error, grad_out, grad_end, grad_x, grad_states, grad_state),
            *(scan.tokens, scan.heads, scan.repeat, *inputs.steps("q", "k", "v", "beta")),
            **options,
            HAS_FIRST=first is not None,
            HAS_STATE=wants_state,
            HAS_END=grad_end is not None,
        )
        inter_chunk = (states, grad_out, grad_x, grad_states)
        gradients = _channel_gradients if scan.kind.is_channel else _head_gradients
        grad_q, grad_k, *others = gradients(
            scan, inputs, v_error, intra, inter_chunk, ctx.needs_input_grad[3]
        )
        if scan.repeat > 1:
            grad_q, grad_k = (x.unflatten(2, (-1, scan.repeat)).sum(3) for x in (grad_q, grad_k))
        if grad_state is not None:
            grad_state = grad_state.to(ctx.state_dtype)
        return grad_q, grad_k, *others, grad_state, None, None


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32


def _inter_chunk_options(scan: Scan, part: Part) -> dict[str, Any]:
    options = scan.dims("V") | {"IS_CHANNEL": scan.kind.is_channel, "STAGES": scan.tiles.stages}
    return options | {"VALUES": scan.blocks(part)["VALUE_BLOCK"], "num_warps": part.warps}


def _head_gradients(
    scan: Scan,
    inputs: Inputs,
    v_error: Tensor,
    intra: IntraChunk,
    inter_chunk: tuple[Tensor, ...],
    is_learned: bool,
) -> tuple[Tensor | None, ...]:
    # Of q, k, v, log_decay and beta, after inter-chunk: one launch.
    q, k, _, log_decay, beta, document = inputs
    grad_q, grad_k = q.new_empty(2, scan.rows, scan.tokens, scan.heads, scan.key_dim).unbind()
    grad_v = torch.empty_like(inter_chunk[2]) if scan.kind.is_delta else inter_chunk[2]
    grad_decay = torch.empty_like(log_decay, memory_format=torch.contiguous_format) if is_learned else None
    grad_beta = None if beta is None else torch.empty_like(beta, memory_format=torch.contiguous_format)
    linear_attention_backward_head[(scan.chunks * scan.rows * scan.heads,)](
        *(
            q,
            k,
            v_error,
            log_decay,
            beta,
            document,
            intra.inverse,
            intra.decay_from_start,
            intra.decay_to_end,
        ),
        *(*inter_chunk, grad_q, grad_k, grad_v, grad_decay, grad_beta),
        *(scan.tokens, scan.chunks, scan.heads, scan.repeat, *inputs.steps("q", "k")),
        *(v_error.stride(1), v_error.stride(2), *inputs.steps("log_decay", "beta")),
        **scan.dims("V", "VALUES"),
        **scan.blocks(scan.tiles.gradients),
        HAS_DECAY=scan.kind.has_decay,
        HAS_DOCUMENT=document is not None,
        IS_LEARNED=is_learned,
        num_stages=1,
    )
    return grad_q, grad_k, grad_v, grad_decay, grad_beta


def _channel_gradients(
    scan: Scan,
    inputs: Inputs,
    v_error: Tensor,
    intra: IntraChunk,
    inter_chunk: tuple[Tensor, ...],
    is_learned: bool,
) -> tuple[Tensor | None, ...]:
    # Of q, k, v, log_decay and beta, after inter-chunk: two launches, and one for the parts of that of beta.
    q, k, _, log_decay, beta, document = inputs
    _, grad_out, grad_x, _ = inter_chunk
    assert log_decay is not None
    options = scan.dims("V", "VALUES") | scan.blocks(scan.tiles.gradients)
    options |= {"HAS_DOCUMENT": document is not None, "num_stages": 1}
    blocks = options["KEYS"] // options["KEY_BLOCK"]
    grad_q, grad_k = q.new_empty(2, scan.rows, scan.tokens, scan.heads, scan.key_dim).unbind()
    grad_scores, grad_system = torch.empty_like(intra.scores), torch.empty_like(intra.scores)
    grad_v, written, rates = grad_x, v_error, None
    if scan.kind.is_delta:
        grad_v, written = torch.empty_like(grad_x), torch.empty_like(v_error)
        shape = (1 + blocks, scan.rows, scan.tokens, scan.heads)
        rates = torch.empty(shape, dtype=torch.float32, device=q.device)
    grad_decay = torch.empty_like(log_decay, memory_format=torch.contiguous_format) if is_learned else None
    programs = scan.chunks * scan.rows * scan.heads
    linear_attention_backward_pairs[(programs,)](
        *(v_error, beta, document, intra.inverse, grad_out, grad_x),
        *(written, grad_scores, grad_system, grad_v, rates, scan.tokens, scan.chunks, scan.heads),
        *(v_error.stride(1), v_error.stride(2), *inputs.steps("beta")),
        **{name: option for name, option in options.items() if name not in ("K", "KEYS", "KEY_BLOCK")},
    )
    linear_attention_backward_channel[(programs * blocks,)](
        *(q, k, written, log_decay, beta, document, *inter_chunk, grad_scores, grad_system),
        *(grad_q, grad_k, grad_decay, rates, scan.tokens, scan.chunks, scan.heads, scan.repeat),
        *(*inputs.steps("q", "k"), written.stride(1), written.stride(2), *inputs.steps("log_decay", "beta")),
        **options,
        IS_LEARNED=is_learned,
    )
    grad_beta = None if rates is None or beta is None else rates.sum(0).to(beta.dtype)
    return grad_q, grad_k, grad_v, grad_decay, grad_beta


def linear_attention_triton(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"] | None = None,
    *,
    document: Int[Tensor, "B T"] | None = None,
    initial_state: Float[Tensor, "B H K V"] | None = None,
    tiles: Tiles | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """`kernels.linear_attention.linear_attention` in Triton; the final state is in float32."""
    return scan_triton(q, k, v, log_decay, None, document=document, initial_state=initial_state, tiles=tiles)


def scan_triton(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"] | None,
    beta: Float[Tensor, "B T H"] | None,
    *,
    document: Int[Tensor, "B T"] | None,
    initial_state: Float[Tensor, "B H K V"] | None,
    tiles: Tiles | None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """The delta rule where there is beta, else linear attention. Raises ValueError for no rows or no dims."""
    found = ScanTriton.apply(q, k, v, log_decay, beta, initial_state, document, tiles)
    return cast(tuple[Tensor, Tensor], found)
