"""The lightning indexer: cheap scores that choose keys, and the loss that teaches it what attention reads."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import checked, require, require_order, require_within
from kernels.choose import takes_triton
from kernels.indexer.loss import index_loss_full, index_loss_selected
from kernels.indexer.reference import choose_in_blocks, pool_keys, pool_selection
from kernels.places import require_places

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
    places: Int[Tensor, "B T"] | None = None,
) -> Int[Tensor, "B T k"]:
    """For each query its best min(top_k, P) entries, in order of place, -1 for those it has fewer.

    The score of an entry is sum_n weights_n relu(q_n k). last is the last token of each entry in the row, -1
    for no entry; None is one entry per token. An entry can be chosen from its last token on, in its own
    document. Of equal scores the earlier entry wins. No gradient. places: where the queries stand in the row
    of S tokens that entries and documents are of, rising along a row; None is T = S, all tokens in order.

    Raises ValueError for an argument of the wrong shape or range.
    """
    require(q.shape[1] > 0, "q", "at least one token", tuple(q.shape))
    require_order("document", document)
    _require_row(q, k, last, places, ("document", None if document is None else document.shape[1]))
    require(top_k > 0, "top_k", "at least 1", top_k)
    options: dict[str, Any] = {"top_k": top_k, "last": last, "document": document, "places": places}
    if takes_triton("indexer", q):
        from kernels.indexer.triton import index_select_triton

        return index_select_triton(q, k, weights, **options)
    return choose_in_blocks(q, k, weights, **options)


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
    places: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """KL(p || softmax of scores) over all entries that a query can see, summed over queries.

    p is what the attention takes of each entry of `size` tokens, over all its heads, normalised over the
    entries; it gets no gradient. lse is the attention's own log-sum-exp. A query that sees no entry counts
    nothing. places as in `index_select`; the attention's keys are the tokens of the row. Memory is linear in
    T and in S.

    Raises ValueError for an argument of the wrong shape.
    """
    require(q.shape[1] > 0, "q", "at least one token", tuple(q.shape))
    require_order("document", document)
    _require_row(q, k, last, places, ("attention_k", attention_k.shape[1]))
    heads, key_heads = attention_q.shape[2], attention_k.shape[2]
    require(heads % key_heads == 0, "attention_k", f"a divisor of {heads} heads", key_heads)
    require(last is not None or size == 1, "last", f"given with entries of {size} tokens", last)
    options: dict[str, Any] = {"scale": scale, "last": last, "size": size, "document": document}
    options["places"] = places
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
    """`index_loss` over the chosen entries alone; shares is what the attention takes of each, unnormalised.

    Raises ValueError for an argument of the wrong shape.
    """
    require(q.shape[1] > 0, "q", "at least one token", tuple(q.shape))
    require_within("entries", entries, -1, k.shape[1])
    if entries.shape[2] == 0:
        # Nothing to learn from, but all of it takes part in the graph.
        parts = (x.to(torch.promote_types(x.dtype, torch.float32)).sum() for x in (q, k, weights))
        return 0.0 * torch.stack(list(parts)).sum()
    if takes_triton("indexer", q):
        from kernels.indexer.triton_loss import index_loss_selected_triton

        deterministic = torch.are_deterministic_algorithms_enabled()
        return index_loss_selected_triton(q, k, weights, entries, shares, is_deterministic=deterministic)
    return index_loss_selected(q, k, weights, entries, shares)


def _require_row(
    q: Tensor, k: Tensor, last: Tensor | None, places: Tensor | None, row: tuple[str, int | None]
) -> None:
    """Refuses entries and places that do not fit the row; `row` names an argument of its tokens, if any."""
    name, length = row
    if last is None:
        require(length in (None, k.shape[1]), name, f"{k.shape[1]} tokens, as k has entries", length)
        name, length = "k", k.shape[1]
    if length is not None:
        require_places(places, q.shape[1], length, name)
    else:
        require_order("places", places)
