"""The lightning indexer of DeepSeek-V3.2: cheap scores that choose keys, and the loss that trains them."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import checked, require, require_order, require_within
from kernels.choose import takes_triton
from kernels.indexer.loss import index_loss_full, index_loss_selected
from kernels.indexer.reference import choose_chunked, pool_keys, pool_selection
from kernels.query_index import require_q_index

__all__ = ["index_loss", "index_loss_of_chosen", "index_select", "pool_keys", "pool_selection"]


@checked
def index_select(
    q: Float[Tensor, "B T N D"],
    k: Float[Tensor, "B P D"],
    weights: Float[Tensor, "B T N"],
    *,
    top_k: int,
    last: Int[Tensor, "B P"] | None = None,
    document: Int[Tensor, "B S"] | None = None,
    q_index: Int[Tensor, "B T"] | None = None,
) -> Int[Tensor, "B T k"]:
    """For each query the min(top_k, P) entries of the highest score, rising, then -1 if it has fewer.

    The score of an entry is sum_n weights_n relu(q_n k). last: index in the row of the last token of each
    entry, -1 for no entry; None is one entry per token. A query sees the entries of its document that end at
    its token or before. Of equal scores the first entry wins. No gradient.
    q_index: index of each query in the row of S tokens that entries and documents are of, rising along the
    row; None where T = S and queries are all of them.
    DeepSeek-V3.2, arXiv 2512.02556, equation 1.

    Raises ValueError for an argument of the wrong shape or range.
    """
    require(q.shape[1] > 0, "q", "at least one token", tuple(q.shape))
    require_order("document", document)
    _require_row(q, k, last, q_index, ("document", None if document is None else document.shape[1]))
    require(top_k > 0, "top_k", "at least 1", top_k)
    options: dict[str, Any] = {"top_k": top_k, "last": last, "document": document, "q_index": q_index}
    if takes_triton("indexer", q):
        from kernels.indexer.triton import index_select_triton

        return index_select_triton(q, k, weights, **options)
    return choose_chunked(q, k, weights, **options)


@checked
def index_loss(
    q: Float[Tensor, "B T N D"],
    k: Float[Tensor, "B P D"],
    weights: Float[Tensor, "B T N"],
    attention_q: Float[Tensor, "B T H K"],
    attention_k: Float[Tensor, "B S G K"],
    lse: Float[Tensor, "B T H"],
    *,
    scale: float,
    last: Int[Tensor, "B P"] | None = None,
    size: int = 1,
    document: Int[Tensor, "B S"] | None = None,
    q_index: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """KL(p || softmax(scores)) over all entries that a query sees, in nats, summed over queries.

    p: attention probability of each entry of `size` tokens, summed over heads and normalised over entries;
    without gradient. lse: the log-sum-exp of that attention, whose keys are the tokens of the row. A query
    that sees no entry adds zero. q_index as in `index_select`. Memory is linear in T and in S.
    DeepSeek-V3.2, arXiv 2512.02556, equation 3.

    Raises ValueError for an argument of the wrong shape.
    """
    require(q.shape[1] > 0, "q", "at least one token", tuple(q.shape))
    require_order("document", document)
    _require_row(q, k, last, q_index, ("attention_k", attention_k.shape[1]))
    heads, key_heads = attention_q.shape[2], attention_k.shape[2]
    require(heads % key_heads == 0, "attention_k", f"a divisor of {heads} heads", key_heads)
    require(last is not None or size == 1, "last", f"given with entries of {size} tokens", last)
    options: dict[str, Any] = {"scale": scale, "last": last, "size": size, "document": document}
    options["q_index"] = q_index
    if takes_triton("indexer", q):
        from kernels.indexer.triton_loss import index_loss_full_triton

        return index_loss_full_triton(q, k, weights, attention_q, attention_k, lse, **options)
    return index_loss_full(q, k, weights, attention_q, attention_k, lse, **options)


@checked
def index_loss_of_chosen(
    q: Float[Tensor, "B T N D"],
    k: Float[Tensor, "B P D"],
    weights: Float[Tensor, "B T N"],
    entries: Int[Tensor, "B T k"],
    shares: Float[Tensor, "B T k"],
) -> Float[Tensor, ""]:
    """`index_loss` over the chosen entries alone. shares: attention probability of each, summed over heads.

    DeepSeek-V3.2, arXiv 2512.02556, equation 4.

    Raises ValueError for an argument of the wrong shape.
    """
    require(q.shape[1] > 0, "q", "at least one token", tuple(q.shape))
    require_within("entries", entries, -1, k.shape[1])
    if entries.shape[2] == 0:
        # No loss, but the inputs are part of the graph.
        parts = (x.to(torch.promote_types(x.dtype, torch.float32)).sum() for x in (q, k, weights))
        return 0.0 * torch.stack(list(parts)).sum()
    if takes_triton("indexer", q):
        from kernels.indexer.triton_loss import index_loss_selected_triton

        deterministic = torch.are_deterministic_algorithms_enabled()
        return index_loss_selected_triton(q, k, weights, entries, shares, is_deterministic=deterministic)
    return index_loss_selected(q, k, weights, entries, shares)


def _require_row(
    q: Tensor, k: Tensor, last: Tensor | None, q_index: Tensor | None, row: tuple[str, int | None]
) -> None:
    """Refuses entries and a q_index that do not fit the row; row: name of an argument of S tokens, and S."""
    name, length = row
    if last is None:
        require(length in (None, k.shape[1]), name, f"{k.shape[1]} tokens, as k has entries", length)
        name, length = "k", k.shape[1]
    if length is not None:
        require_q_index(q_index, q.shape[1], length, name)
    else:
        require_order("q_index", q_index)
