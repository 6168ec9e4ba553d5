"""Linear attention with decay: a state that forgets by a factor per head or per key channel."""

from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import checked, require, require_order
from kernels.choose import takes_triton
from kernels.linear_attention.channel import linear_attention_by_channel
from kernels.linear_attention.reference import linear_attention_chunked


@checked
def linear_attention(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"] | None = None,
    *,
    document: Int[Tensor, "B T"] | None = None,
    initial_state: Float[Tensor, "B H K V"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Decay the state, add k times v, read with q, for every token.

    Value head h reads key head h // (H / G). log_decay is a natural logarithm, at most 0, per head or per key
    channel; None is no decay, -inf forgets all. q is used as given: scale it before. document numbers the
    documents of a row in order; the state is zero at the start of each, and initial_state is of the document
    of the first token. The second result is the final state. Work is O(T K V) per head.

    Raises ValueError for an argument of the wrong shape or dtype.
    Gated linear attention, arXiv 2312.06635, equation 3; per head the recurrence of Mamba-2, 2405.21060.
    """
    tokens, key_heads, value_heads = *q.shape[1:3], v.shape[2]
    require(tokens > 0, "q", "at least one token", tuple(q.shape))
    require_order("document", document)
    require(value_heads % key_heads == 0, "v", f"a multiple of {key_heads} heads", value_heads)
    for name, x in (("k", k), ("v", v)):
        require(x.dtype == q.dtype, name, f"dtype {q.dtype}, as q", x.dtype)
    if takes_triton("linear_attention", q):
        from kernels.linear_attention.triton import linear_attention_triton

        return linear_attention_triton(q, k, v, log_decay, document=document, initial_state=initial_state)
    if log_decay is not None and log_decay.ndim == 4:
        return linear_attention_by_channel(q, k, v, log_decay, document=document, initial_state=initial_state)
    return linear_attention_chunked(q, k, v, log_decay, document=document, initial_state=initial_state)
