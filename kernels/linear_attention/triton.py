"""Linear attention in Triton: intra-chunk side by side, then inter-chunk one by one.

Letters: B rows, T tokens, N chunks, C chunk, G key heads, H value heads, K key dim, V value dim.
Forward is two launches. Backward decays q and k again (per channel alone), passes the chunks both ways in
one launch, and then finds the gradients of each chunk on its own.
"""

from typing import Any, cast

import torch
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
from kernels.linear_attention.triton_launch import (
    Part,
    Scan,
    Tiles,
    new,
    row_strided,
    scan_of,
    strided,
    tiles_of,
)
from kernels.linear_attention.triton_scan import linear_attention_backward_scan, linear_attention_forward
from kernels.linear_attention.triton_state import Decays, Gradients, InterChunk, IntraChunk


def _tiles(key_dim: int, value_dim: int, heads: int, is_channel: bool, dtype: torch.dtype) -> Tiles:
    # Two inter-chunk programs fit on a core.
    gradients = Part(32 if is_channel else 64, 64, 8)
    return tiles_of(key_dim, value_dim, heads, dtype, 256, Part(32, 64, 4), gradients)


class LinearAttentionTriton(torch.autograd.Function):
    """q, k, v, log_decay, first state, documents -> outputs and final state. All but q, k and v may be None.

    Keeps its inputs and, for each token and head, a row of scores.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        state: Tensor | None,
        document: Tensor | None,
        tiles: Tiles | None,
    ) -> tuple[Tensor, Tensor]:
        """Two launches."""
        ctx.set_materialize_grads(False)
        scan = scan_of(q, v, log_decay, tiles, _tiles)
        q, k, v, log_decay = cast(Any, map(row_strided, (q, k, v, log_decay)))
        document = None if document is None else document.contiguous()
        first = None if state is None else state.to(torch.float32).contiguous()
        intra = _intra_chunk(scan, q, k, log_decay, document)
        out, end = scan.outputs(v)
        grid, sizes, options = scan.inter_chunk(scan.tiles.forward, 1)
        linear_attention_forward[grid](
            intra,
            strided(v),
            first,
            out,
            end,
            None,
            sizes,
            HAS_STATE=first is not None,
            IS_OUTPUT=True,
            **options,
        )
        ctx.scan, ctx.state_dtype = scan, None if state is None else state.dtype
        kept = (intra.scores, intra.decays.from_start, intra.decays.to_end)
        ctx.save_for_backward(q, k, v, log_decay, document, first, *kept)
        return out, end

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Two launches; four with decays per channel."""
        scan: Scan = ctx.scan
        q, k, v, log_decay, document, first, scores, from_start, to_end = ctx.saved_tensors
        intra = IntraChunk(strided(q), strided(k), scores, Decays(from_start, to_end, None))
        if scan.is_channel:
            intra = _intra_chunk(scan, q, k, log_decay, document, scores)
        inter = scan.inter_chunk_buffers(v, grads[0])
        grad_end = None if grads[1] is None else grads[1].to(torch.float32).contiguous()
        wants_state = first is not None and ctx.needs_input_grad[4]
        grad_state = torch.empty_like(first) if wants_state else None
        grid, sizes, options = scan.inter_chunk(scan.tiles.backward, 2)
        linear_attention_backward_scan[grid](
            *(intra, inter, strided(v), first, grad_end, grad_state, sizes),
            HAS_FIRST=first is not None,
            HAS_STATE=wants_state,
            HAS_END=grad_end is not None,
            **options,
        )
        found = scan.gradients(q, inter.grad_x, log_decay if ctx.needs_input_grad[3] else None, None)
        _gradients(scan, (q, k, v, log_decay), document, intra, inter, found)
        if grad_state is not None:
            grad_state = grad_state.to(ctx.state_dtype)
        return *map(scan.per_key_head, found[:2]), found.v, found.log_decay, grad_state, None, None


def _intra_chunk(
    scan: Scan,
    q: Tensor,
    k: Tensor,
    log_decay: Tensor | None,
    document: Tensor | None,
    scores: Tensor | None = None,
) -> IntraChunk:
    # One launch; with scores, which only decays per channel take, all but those.
    is_scored = scores is None
    scores = new(q, scan.rows, scan.tokens, scan.heads, scan.tiles.chunk) if scores is None else scores
    options = scan.options(scan.tiles.intra_chunk, "K", "KEYS", "KEY_BLOCK")
    options["HAS_DOCUMENT"] = document is not None
    inputs = (strided(q), strided(k), strided(log_decay), document)
    if scan.is_channel:
        decayed = (strided(new(q, scan.rows, scan.tokens, scan.heads, scan.key_dim)) for _ in range(2))
        kept = q.new_empty(scan.rows, scan.chunks, scan.heads, scan.key_dim, dtype=torch.float32)
        found = IntraChunk(*decayed, scores, Decays(None, None, kept))
        linear_attention_intra_chunk_channel[(scan.programs,)](
            *inputs, found, scan.sizes, IS_SCORED=is_scored, **options
        )
        return found
    both = q.new_empty(2, scan.rows, scan.tokens, scan.heads, dtype=torch.float32)
    decays = Decays(*both.unbind(), None)
    linear_attention_intra_chunk_head[(scan.programs,)](
        *inputs, scores, decays, scan.sizes, HAS_DECAY=scan.has_decay, **options
    )
    return IntraChunk(strided(q), strided(k), scores, decays)


def _gradients(
    scan: Scan,
    inputs: tuple[Tensor | None, ...],
    document: Tensor | None,
    intra: IntraChunk,
    inter: InterChunk,
    found: Gradients,
) -> None:
    # One launch after inter-chunk, which found that of v; two with decays per channel.
    keys = scan.options(scan.tiles.gradients, "K", "KEYS", "KEY_BLOCK")
    options = scan.options(scan.tiles.gradients, "V", "VALUES", "VALUE_BLOCK")
    options["HAS_DOCUMENT"] = document is not None
    is_learned = found.log_decay is not None
    parts = (*map(strided, inputs), document)
    if not scan.is_channel:
        linear_attention_backward_head[(scan.programs,)](
            *(*parts, intra.decays, inter, found, scan.sizes),
            **options | keys,
            HAS_DECAY=scan.has_decay,
            IS_LEARNED=is_learned,
        )
        return
    grad_scores = torch.empty_like(intra.scores)
    linear_attention_backward_pairs[(scan.programs,)](
        strided(inputs[2]), document, inter, grad_scores, scan.sizes, **options
    )
    linear_attention_backward_channel[(scan.programs * (keys["KEYS"] // keys["KEY_BLOCK"]),)](
        *(*parts, inter, grad_scores, found, scan.sizes), **options | keys, IS_LEARNED=is_learned
    )


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
    found = LinearAttentionTriton.apply(q, k, v, log_decay, initial_state, document, tiles)
    return cast(tuple[Tensor, Tensor], found)
