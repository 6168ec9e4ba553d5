"""Index scores, the entries of the highest scores, and pooled keys in plain torch.

Letters: B rows, T queries, S tokens, N index heads, D index dim, P entries, m tokens of an entry, C queries
of a chunk. Score, DeepSeek-V3.2, arXiv 2512.02556, equation 1: I_ts = sum_n w_tn relu(q_tn k_s); scale
factors are part of w.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kernels.query_index import at_queries, q_index_or_arange, queries_per_chunk

# Scores of all heads that are in memory at once.
SCORES = 2**22


def visible_entries(
    start: int,
    stop: int,
    last: Int[Tensor, "B P"],
    document: Int[Tensor, "B S"] | None,
    q_index: Int[Tensor, "B T"] | None = None,
) -> Bool[Tensor, "B C P"]:
    """Which entries the queries in [start, stop) see: those of their document that end by then."""
    if q_index is None:
        query = torch.arange(start, stop, device=last.device)[:, None]
    else:
        q_index = q_index[:, start:stop]
        query = q_index[..., None]
    visible = (last[:, None] >= 0) & (last[:, None] <= query)
    if document is not None:
        own = document[:, start:stop] if q_index is None else at_queries(document, q_index)
        owner = document.gather(1, last.clamp(min=0))
        visible = visible & (own[..., None] == owner[:, None])
    return visible


def last_tokens(k: Float[Tensor, "B P D"], last: Int[Tensor, "B P"] | None) -> Int[Tensor, "B P"]:
    """Index of the last token of each entry; for one entry per token that of the token."""
    return torch.arange(k.shape[1], device=k.device).expand(k.shape[:2]) if last is None else last


def index_scores(
    q: Float[Tensor, "B T N D"], k: Float[Tensor, "B P D"], weights: Float[Tensor, "B T N"]
) -> Float[Tensor, "B T P"]:
    """Scores of all pairs, in the caller's dtype."""
    return torch.einsum("btn,btnp->btp", weights, torch.einsum("btnd,bpd->btnp", q, k).relu())


def choose_directly(
    q: Float[Tensor, "B T N D"],
    k: Float[Tensor, "B P D"],
    weights: Float[Tensor, "B T N"],
    *,
    top_k: int,
    last: Int[Tensor, "B P"] | None = None,
    document: Int[Tensor, "B S"] | None = None,
    q_index: Int[Tensor, "B T"] | None = None,
) -> Int[Tensor, "B T k"]:
    """The best entries by a stable sort of all scores."""
    entries = k.shape[1]
    visible = visible_entries(0, q.shape[1], last_tokens(k, last), document, q_index)
    scores = index_scores(q, k, weights).masked_fill(~visible, float("-inf"))
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    chosen = torch.where(visible.gather(2, order), order, entries).sort(dim=-1).values
    return torch.where(chosen < entries, chosen, -1)


@torch.no_grad()
def choose_chunked(
    q: Float[Tensor, "B T N D"],
    k: Float[Tensor, "B P D"],
    weights: Float[Tensor, "B T N"],
    *,
    top_k: int,
    last: Int[Tensor, "B P"] | None = None,
    document: Int[Tensor, "B S"] | None = None,
    q_index: Int[Tensor, "B T"] | None = None,
) -> Int[Tensor, "B T k"]:
    """The same, a chunk of queries at a time and in float32 at least; memory is linear in T."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, weights = (x.detach().to(dtype) for x in (q, k, weights))
    rows, tokens, heads, _ = q.shape
    entries, lasts = k.shape[1], last_tokens(k, last)
    count = min(top_k, entries)
    turned = k.mT.contiguous()
    chosen = torch.empty(rows, tokens, count, dtype=torch.long, device=q.device)
    if count == 0:
        return chosen
    step = queries_per_chunk(q, rows * heads * entries, SCORES)
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        scores = torch.bmm(q[:, start:stop].flatten(1, 2), turned).relu_().view(-1, heads, entries)
        scores = torch.bmm(weights[:, start:stop].reshape(-1, 1, heads), scores)
        visible = visible_entries(start, stop, lasts, document, q_index)
        scores = scores.view_as(visible).masked_fill_(~visible, float("-inf"))
        chosen[:, start:stop] = _best(scores, visible, count)
    return chosen


def _best(scores: Tensor, visible: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest, rising; of equals the first, which topk alone does not promise."""
    threshold = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above = scores > threshold
    ties = (scores == threshold) & visible
    room = count - above.sum(-1, keepdim=True)
    is_chosen = above | (ties & (ties.cumsum(-1) <= room))
    # Each chosen index goes to its rank; all others go to one column more, which is cut off.
    rank = torch.where(is_chosen, is_chosen.cumsum(-1) - 1, count)
    index = torch.arange(scores.shape[-1], device=scores.device).expand_as(rank)
    out = torch.full((*scores.shape[:-1], count + 1), -1, dtype=torch.long, device=scores.device)
    return out.scatter_(-1, rank, index)[..., :count]


def pool_keys(
    k: Float[Tensor, "B S D"],
    gates: Float[Tensor, "B S D"],
    position_bias: Float[Tensor, "m D"],
    position: Int[Tensor, "B S"],
) -> tuple[Float[Tensor, "B P D"], Int[Tensor, "B P"]]:
    """One key for every m tokens of a document, and the index of its last token, -1 for slots left over.

    For each channel the mean of the tokens weighted by softmax(gates + position_bias), with a bias for each
    of the m tokens. The last tokens of a document that fill no entry are in none (GLM-5.3-Flash).
    """
    size, (rows, tokens) = position_bias.shape[0], position.shape
    slots = max(1, tokens // size)
    is_last = position % size == size - 1
    rank = torch.where(is_last, is_last.long().cumsum(1) - 1, slots)
    index = torch.arange(tokens, device=k.device).expand(rows, -1)
    last = torch.full((rows, slots + 1), -1, dtype=torch.long, device=k.device)
    last = last.scatter_(1, rank, index)[:, :slots]
    members = entry_tokens(last, size).flatten(1)[..., None].expand(-1, -1, k.shape[2])
    keys, gates = (x.gather(1, members).unflatten(1, (slots, size)) for x in (k, gates))
    dtype = torch.promote_types(k.dtype, torch.float32)
    weights = (gates.to(dtype) + position_bias.to(dtype)).softmax(dim=2)
    return (weights * keys.to(dtype)).sum(2).to(k.dtype), last


def entry_tokens(last: Int[Tensor, "B P"], size: int) -> Int[Tensor, "B P m"]:
    """Indices of the tokens of each entry; of no entry, of the first tokens of the row."""
    return (last[..., None] - torch.arange(size - 1, -1, -1, device=last.device)).clamp(min=0)


def pool_selection(
    entries: Int[Tensor, "B T k"],
    last: Int[Tensor, "B P"],
    position: Int[Tensor, "B T"],
    size: int,
    q_index: Int[Tensor, "B T"] | None = None,
) -> Int[Tensor, "B T K"]:
    """Indices of the tokens of the chosen entries, then of the query's own unfinished entry; -1 for none.

    position: that of each query in its document. q_index as in `kernels.indexer.index_select`.
    """
    ends = last[:, None].expand(-1, entries.shape[1], -1).gather(2, entries.clamp(min=0))
    offsets = torch.arange(size - 1, -1, -1, device=last.device)
    tokens = torch.where(entries[..., None] >= 0, ends[..., None] - offsets, -1).flatten(2)
    count = ((position + 1) % size)[..., None]
    own = q_index_or_arange(q_index, position.shape[1], position)[..., None] - offsets[1:]
    tail = torch.where(offsets[1:] < count, own, -1)
    return torch.cat([tokens, tail], dim=2)
