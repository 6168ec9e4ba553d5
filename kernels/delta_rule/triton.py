"""The gated delta rule in Triton: intra-chunk side by side with the solve, then inter-chunk one by one.

Letters: B rows, T tokens, N chunks, C chunk, G key heads, H value heads, K key dim, V value dim.
Forward is two launches. Backward makes k_ut again, passes the chunks both ways in one launch, and then finds
the gradients of each chunk on its own.
"""

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.delta_rule.triton_channel import (
    delta_rule_backward_channel,
    delta_rule_backward_pairs,
    delta_rule_intra_chunk_channel,
)
from kernels.delta_rule.triton_head import delta_rule_backward_head, delta_rule_intra_chunk_head
from kernels.delta_rule.triton_scan import delta_rule_backward_scan, delta_rule_forward
from kernels.delta_rule.triton_solve import SolvedChunk
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
from kernels.linear_attention.triton_state import Decays, Gradients, InterChunk


def _tiles(key_dim: int, value_dim: int, heads: int, is_channel: bool, dtype: torch.dtype) -> Tiles:
    # One inter-chunk program fits on a core.
    intra_chunk, gradients = Part(32, 64, 8 if is_channel else 4), Part(64, 64, 8)
    return tiles_of(
        key_dim, value_dim, heads, dtype, 128, intra_chunk, Part(32, 64, 4) if is_channel else gradients
    )


class DeltaRuleTriton(torch.autograd.Function):
    """q, k, v, log_decay, beta, first state, documents -> outputs and final state. The last two may be None.

    Keeps its inputs and, for each token and head, a row of scores and of the inverse.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        state: Tensor | None,
        document: Tensor | None,
        tiles: Tiles | None,
    ) -> tuple[Tensor, Tensor]:
        """Two launches."""
        ctx.set_materialize_grads(False)
        scan = scan_of(q, v, log_decay, tiles, _tiles)
        q, k, v, log_decay, beta = cast(Any, map(row_strided, (q, k, v, log_decay, beta)))
        document = None if document is None else document.contiguous()
        first = None if state is None else state.to(torch.float32).contiguous()
        is_kept = any(ctx.needs_input_grad)
        intra = _intra_chunk(scan, (q, k, log_decay, beta), document, is_kept)
        out, end = scan.outputs(v)
        grid, sizes, options = scan.inter_chunk(scan.tiles.forward, 1)
        delta_rule_forward[grid](
            *(intra, strided(v), strided(beta), first, out, end, None, None, sizes),
            HAS_STATE=first is not None,
            IS_OUTPUT=True,
            **options,
        )
        ctx.scan, ctx.state_dtype = scan, None if state is None else state.dtype
        decays = () if scan.is_channel else intra.decays[:2]
        kept = (intra.scores, intra.inverse, *decays)
        ctx.save_for_backward(q, k, v, log_decay, beta, document, first, *kept)
        return out, end

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Three launches; four with decays per channel."""
        scan: Scan = ctx.scan
        q, k, v, log_decay, beta, document, first, *solved = ctx.saved_tensors
        inputs = (q, k, log_decay, beta)
        intra = _intra_chunk(scan, inputs, document, True, solved)
        inter = scan.inter_chunk_buffers(v, grads[0])
        v_error = torch.empty_like(inter.grad_x)
        grad_end = None if grads[1] is None else grads[1].to(torch.float32).contiguous()
        wants_state = first is not None and ctx.needs_input_grad[5]
        grad_state = torch.empty_like(first) if wants_state else None
        grid, sizes, options = scan.inter_chunk(scan.tiles.backward, 2)
        delta_rule_backward_scan[grid](
            *(intra, inter, strided(v), strided(beta), first, v_error, grad_end, grad_state, sizes),
            HAS_FIRST=first is not None,
            HAS_STATE=wants_state,
            HAS_END=grad_end is not None,
            **options,
        )
        learned = log_decay if ctx.needs_input_grad[3] else None
        found = scan.gradients(q, torch.empty_like(inter.grad_x), learned, beta)
        found = _gradients(scan, inputs, document, v_error, intra, inter, found)
        if grad_state is not None:
            grad_state = grad_state.to(ctx.state_dtype)
        return *map(scan.per_key_head, found[:2]), *found[2:], grad_state, None, None


def _intra_chunk(
    scan: Scan,
    inputs: tuple[Tensor, ...],
    document: Tensor | None,
    is_kept: bool,
    solved: list[Tensor] | None = None,
) -> SolvedChunk:
    # One launch; with scores, inverse and decays as `solved` only what follows from the inverse.
    q = inputs[0]
    square = (scan.rows, scan.tokens, scan.heads, scan.tiles.chunk)
    scores = solved[0] if solved else new(q, *square)
    inverse = solved[1] if solved else new(q, *square) if is_kept else scores
    keys = (scan.rows, scan.tokens, scan.heads, scan.key_dim)
    if scan.is_channel:
        kept = q.new_empty(scan.rows, scan.chunks, scan.heads, scan.key_dim, dtype=torch.float32)
        decays, decayed = Decays(None, None, kept), [strided(new(q, *keys)) for _ in range(2)]
    else:
        both = solved[2:] if solved else q.new_empty(2, *keys[:3], dtype=torch.float32).unbind()
        decays, decayed = Decays(*both, None), [strided(x) for x in inputs[:2]]
    found = SolvedChunk(*decayed, new(q, *keys), scores, inverse, decays)
    kernel = delta_rule_intra_chunk_channel if scan.is_channel else delta_rule_intra_chunk_head
    kernel[(scan.programs,)](
        *(*map(strided, inputs), document, found, scan.sizes),
        **scan.options(scan.tiles.intra_chunk, "K", "KEYS", "KEY_BLOCK"),
        HAS_DOCUMENT=document is not None,
        IS_SOLVED=solved is not None,
        IS_KEPT=is_kept,
    )
    return found


def _gradients(
    scan: Scan,
    inputs: tuple[Tensor, ...],
    document: Tensor | None,
    v_error: Tensor,
    intra: SolvedChunk,
    inter: InterChunk,
    found: Gradients,
) -> Gradients:
    # One launch after inter-chunk; with decays per channel two, and one for the parts of that of beta.
    q, k, log_decay, beta = map(strided, inputs)
    keys = scan.options(scan.tiles.gradients, "K", "KEYS", "KEY_BLOCK")
    options = scan.options(scan.tiles.gradients, "V", "VALUES", "VALUE_BLOCK")
    options["HAS_DOCUMENT"] = document is not None
    is_learned = found.log_decay is not None
    if not scan.is_channel:
        delta_rule_backward_head[(scan.programs,)](
            *(q, k, v_error, log_decay, beta, document, intra, inter, found, scan.sizes),
            **options | keys,
            IS_LEARNED=is_learned,
        )
        return found
    blocks = keys["KEYS"] // keys["KEY_BLOCK"]
    shape = (1 + blocks, scan.rows, scan.tokens, scan.heads)
    rates = torch.empty(shape, dtype=torch.float32, device=v_error.device)
    grad_scores, grad_system = torch.empty_like(intra.scores), torch.empty_like(intra.scores)
    written, parts = torch.empty_like(v_error), found._replace(beta=rates)
    pairs = (written, grad_scores, grad_system)
    delta_rule_backward_pairs[(scan.programs,)](
        *(v_error, beta, document, intra, inter, *pairs, parts, scan.sizes), **options
    )
    delta_rule_backward_channel[(scan.programs * blocks,)](
        *(q, k, written, log_decay, beta, document, inter, grad_scores, grad_system, parts, scan.sizes),
        **options | keys,
        IS_LEARNED=is_learned,
    )
    return found._replace(beta=rates.sum(0).to(inputs[3].dtype))


def gated_delta_rule_triton(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"],
    beta: Float[Tensor, "B T H"],
    *,
    document: Int[Tensor, "B T"] | None = None,
    initial_state: Float[Tensor, "B H K V"] | None = None,
    tiles: Tiles | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """`kernels.delta_rule.gated_delta_rule` in Triton; the final state is in float32."""
    found = DeltaRuleTriton.apply(q, k, v, log_decay, beta, initial_state, document, tiles)
    return cast(tuple[Tensor, Tensor], found)
