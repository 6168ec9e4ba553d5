"""Gated delta rule: a linear-time mixer core whose state forgets by gates and overwrites by key."""

from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import checked, require, require_order
from kernels.choose import takes_triton
from kernels.delta_rule.channel import channel_delta_rule_chunked
from kernels.delta_rule.reference import gated_delta_rule_chunked


@checked
def gated_delta_rule(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"],
    beta: Float[Tensor, "B T H"],
    *,
    document: Int[Tensor, "B T"] | None = None,
    initial_state: Float[Tensor, "B H K V"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Decay the state, erase what it holds along k, write v there and read with q, for every token.

    Value head h reads key head h // (H / G). log_decay is a natural logarithm, at most 0, per head or per key
    channel; -inf forgets all. beta is in [0, 2]. q is used as given: scale it before. document numbers the
    documents of a row in order; the state is zero at the start of each, and initial_state is of the document
    of the first token. The second result is the final state. Work is O(T K V) per head.

    Raises ValueError for an argument of the wrong shape, dtype or device.
    Gated DeltaNet, arXiv 2412.06464, equation 10; per channel Kimi Delta Attention, 2510.26692, equation 1.
    """
    tokens, key_heads, value_heads = *q.shape[1:3], v.shape[2]
    require(tokens > 0, "q", "at least one token", tuple(q.shape))
    require_order("document", document)
    require(value_heads % key_heads == 0, "v", f"a multiple of {key_heads} heads", value_heads)
    for name, x in (("k", k), ("v", v)):
        require(x.dtype == q.dtype, name, f"dtype {q.dtype}, as q", x.dtype)
    if takes_triton("delta_rule", q):
        from kernels.delta_rule.triton import gated_delta_rule_triton

        return gated_delta_rule_triton(
            q, k, v, log_decay, beta, document=document, initial_state=initial_state
        )
    if log_decay.ndim == 4:
        return channel_delta_rule_chunked(
            q, k, v, log_decay, beta, document=document, initial_state=initial_state
        )
    return gated_delta_rule_chunked(q, k, v, log_decay, beta, document=document, initial_state=initial_state)
