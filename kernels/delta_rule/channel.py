"""Gated delta rule with a decay per key channel, in plain torch: the chunkwise form.

Letters: B rows, T tokens, G key heads, H value heads, K key dim, V value dim, C chunk, N chunks.
Recurrence, Kimi Delta Attention, arXiv 2510.26692 equation 1, with the state laid out as keys by values:

    S_t = D_t S_{t-1} + k_t n_t^T      n_t = beta_t (v_t - (D_t S_{t-1})^T k_t)      o_t = S_t^T q_t

with D_t = diag(exp(log_decay_t)).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.linear_attention.channel import channel_factors, pair_products
from kernels.linear_attention.chunks import from_chunks, per_head, to_chunks

CHUNK = 32


def channel_delta_rule_chunked(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H K"],
    beta: Float[Tensor, "B T H"],
    *,
    document: Int[Tensor, "B T"] | None = None,
    initial_state: Float[Tensor, "B H K V"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Outputs and final state, in chunks of CHUNK tokens: what training on CPU uses.

    Computes in float32 at least; outputs take v's dtype, the state keeps the precision of the computation.
    The WY form of `gated_delta_rule_chunked`, with the decay of every channel inside A.
    """
    rows, length, heads = v.shape[:3]
    dtype, out_dtype = torch.promote_types(v.dtype, torch.float32), v.dtype
    factor = channel_factors(log_decay.to(dtype), document, CHUNK)
    q, k = (per_head(to_chunks(x.to(dtype), CHUNK), heads) for x in (q, k))
    v, beta = to_chunks(v.to(dtype), CHUNK), to_chunks(beta.to(dtype)[..., None], CHUNK)
    products, decay_from_start, decay_to_end = pair_products(torch.stack([q, k], dim=-2), k, factor)
    scores = products[..., 0, :] + (q * k).sum(-1).diag_embed()
    a = products[..., 1, :] * beta
    unit = torch.eye(CHUNK, dtype=dtype, device=v.device).expand_as(a)
    inverse = torch.linalg.solve_triangular(a, unit, upper=False, unitriangular=True)
    u, w = inverse @ (v * beta), inverse @ (k * decay_from_start * beta)
    kg_transposed, chunk_decay = (k * decay_to_end).mT.contiguous(), decay_from_start[..., -1, :, None]
    state = v.new_zeros(rows, heads, k.shape[-1], v.shape[-1])
    state = state if initial_state is None else initial_state.to(dtype)
    v_new, states = [], []
    # Unbound at once: the gradient of one chunk alone would be a tensor of zeros for all the others.
    chunks = (x.unbind() for x in (u, w, kg_transposed, chunk_decay))
    for u_n, w_n, kg_n, decay in zip(*chunks, strict=True):
        states.append(state)
        v_new.append(u_n - w_n @ state)
        state = torch.addcmul(kg_n @ v_new[-1], state, decay)
    outputs = (q * decay_from_start) @ torch.stack(states) + scores @ torch.stack(v_new)
    return from_chunks(outputs, length).to(out_dtype), state
