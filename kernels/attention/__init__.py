"""Causal softmax attention with grouped heads, sliding windows, sinks, a logit cap and packed documents."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import checked, require, require_order
from kernels.attention.reference import Pattern, attention_blocked, attention_fused
from kernels.choose import takes_triton
from kernels.query_index import require_q_index

# Up to so many tokens one mask over all pairs of a row costs less than one chunk of queries at a time.
MASKED_TOKENS = 2048


@checked
def attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    *,
    scale: float,
    window: int | None = None,
    block: int = 1,
    first: int = 0,
    sinks: Float[Tensor, "H"] | None = None,
    logit_cap: float | None = None,
    document: Int[Tensor, "B S"] | None = None,
    position: Int[Tensor, "B S"] | None = None,
    q_index: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T H V"]:
    """Softmax attention of each query over the keys of its own document up to itself, softmax(scale q k) v.

    Query head h reads key head h // (H / G), as in grouped-query attention (arXiv 2305.13245). logit_cap c
    turns a score s into c tanh(s / c) (Gemma 2, arXiv 2408.00118). sinks: a logit per head that takes part in
    the softmax and has no value (gpt-oss, arXiv 2508.10925).

    window: how many keys a query sees, itself included. block: the window consists of whole blocks of so many
    tokens, counted from the start of the document, the last of which holds the query. first: how many tokens
    at the start of its document a query sees besides.

    document: number of each token's document, never falling along a row; position: that of each token in its
    document. q_index: index of each query in its row of keys, rising along the row; None where queries and
    keys are the same T = S tokens. A row of keys may begin inside a document if no query reaches further
    back; with `first` it must hold the start of each document.

    Work is O(T min(S, window) (K + V)) per head. Raises ValueError for an argument of the wrong shape, dtype,
    device or range.
    """
    options = {"sinks": sinks, "logit_cap": logit_cap, "q_index": q_index}
    options |= {"document": document, "position": position}
    return _attention(q, k, v, scale, Pattern(window, block, first), options, needs_lse=False)[0]


@checked
def attention_with_lse(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    *,
    scale: float,
    window: int | None = None,
    block: int = 1,
    first: int = 0,
    sinks: Float[Tensor, "H"] | None = None,
    logit_cap: float | None = None,
    document: Int[Tensor, "B S"] | None = None,
    position: Int[Tensor, "B S"] | None = None,
    q_index: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"]]:
    """`attention`, and the log-sum-exp of each query's scores and sink, in float32 at least."""
    options = {"sinks": sinks, "logit_cap": logit_cap, "q_index": q_index}
    options |= {"document": document, "position": position}
    out, lse = _attention(q, k, v, scale, Pattern(window, block, first), options, needs_lse=True)
    assert lse is not None
    return out, lse


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    pattern: Pattern,
    options: dict[str, Any],
    *,
    needs_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    tokens, heads, key_dim = q.shape[1:]
    document, position, q_index = options["document"], options["position"], options["q_index"]
    sinks, logit_cap = options["sinks"], options["logit_cap"]
    require(tokens > 0, "q", "at least one token", tuple(q.shape))
    require_order("document", document)
    require_q_index(q_index, tokens, k.shape[1])
    require(heads % k.shape[2] == 0, "q", f"a multiple of {k.shape[2]} heads", heads)
    require(q.dtype == k.dtype == v.dtype, "k, v", f"dtype {q.dtype}, as q", (k.dtype, v.dtype))
    window, block, first = pattern
    require(window is None or window > 0, "window", "None or at least 1", window)
    require(block > 0 and (window or 0) % block == 0, "block", f"a divisor of the window {window}", block)
    require(first >= 0, "first", "at least 0", first)
    require(logit_cap is None or logit_cap > 0, "logit_cap", "None or above 0", logit_cap)
    is_local = window is not None and (block > 1 or first > 0)
    require(
        position is not None or document is None or not is_local, "position", "given with documents", position
    )
    if takes_triton("attention", q):
        from kernels.attention.triton import attention_triton

        return attention_triton(q, k, v, scale=scale, pattern=pattern, **options)
    is_plain = not (is_local or needs_lse) and sinks is None and logit_cap is None and v.shape[3] == key_dim
    is_plain = is_plain and q_index is None
    is_masked = window is not None or document is not None
    if is_plain and (not is_masked or tokens <= min(MASKED_TOKENS, 4 * (window or tokens))):
        return attention_fused(q, k, v, scale=scale, pattern=pattern, document=document), None
    return attention_blocked(q, k, v, scale=scale, pattern=pattern, **options)
