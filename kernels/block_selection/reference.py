"""Block selection in plain torch: the direct form with all scores, and the form by slabs of queries.

Letters: B rows, T tokens, H query heads, G key heads, J selecting heads, K key dim, C tokens of a block, N
slots, n selected blocks, Q queries of a slab, S keys beside a slab.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.document_windows import Windows, document_windows
from kernels.places import Span, at_places, queries_at_once, query_tokens, spans

# Elements of the scores that a slab of queries may hold: bounds memory, not the result.
SLAB = 1 << 22


@torch.no_grad()
def select_by_mean_direct(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    *,
    block: int,
    count: int,
    position: Int[Tensor, "B T"],
) -> Int[Tensor, "B T H n"]:
    """The selection, one query at a time, in the caller's dtype."""
    rows, tokens, heads, _ = q.shape
    chosen = torch.full((rows, tokens, heads, min(count, tokens // block)), -1, device=q.device)
    for b, t, h in _queries(rows, tokens, heads):
        own = t - int(position[b, t]) % block
        starts = range(t - int(position[b, t]), own, block)
        head = h // (heads // k.shape[2])
        scores = [float(q[b, t, h] @ k[b, s : s + block, head].mean(0)) for s in starts]
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
        for place, i in enumerate(best):
            chosen[b, t, h, place] = starts[i] // block
    return chosen


@torch.no_grad()
def select_by_peak_direct(
    q: Float[Tensor, "B T J K"],
    k: Float[Tensor, "B T 1 K"],
    *,
    block: int,
    count: int,
    local: int,
    position: Int[Tensor, "B T"],
) -> tuple[Int[Tensor, "B T J n"], Int[Tensor, "B T J m"]]:
    """The selection and its best keys, one query at a time, in the caller's dtype."""
    rows, tokens, heads, _ = q.shape
    width = min(count, tokens // block)
    chosen = torch.full((rows, tokens, heads, width), -1, device=q.device)
    peaks = torch.zeros(rows, tokens, heads, width + 1, dtype=torch.long, device=q.device)
    for b, t, h in _queries(rows, tokens, heads):
        scores = [float(q[b, t, h] @ k[b, s, 0]) for s in range(t + 1)]
        own = t - int(position[b, t]) % block
        starts = list(range(t - int(position[b, t]), own, block))
        best = [max(range(s, s + block), key=lambda i: scores[i]) for s in starts]
        order = sorted(
            range(len(starts)), key=lambda i: (-float(starts[i] >= own - local * block), -scores[best[i]])
        )
        peaks[b, t, h, 0] = max(range(own, t + 1), key=lambda i: scores[i])
        for place, i in enumerate(order[:count]):
            chosen[b, t, h, place], peaks[b, t, h, place + 1] = starts[i] // block, best[i]
    return chosen, peaks


def _queries(rows: int, tokens: int, heads: int) -> list[tuple[int, int, int]]:
    return [(b, t, h) for b in range(rows) for t in range(tokens) for h in range(heads)]


@torch.no_grad()
def select_by_mean_slabs(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    *,
    block: int,
    count: int,
    position: Int[Tensor, "B S"],
    places: Int[Tensor, "B T"] | None = None,
) -> Int[Tensor, "B T H n"]:
    """The selection, a slab of queries at a time; means and scores in float32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    windows = document_windows(position, block, block)
    means = windows.gather(k.to(dtype)).mean(2)
    token, position = query_tokens(places, q.shape[1], q), at_places(position, places)
    chosen = []
    for a, b, *_ in _slabs(q, windows.start.shape[1], None):
        grouped = q[:, a:b].to(dtype).unflatten(2, (k.shape[2], -1))
        scores = torch.einsum("bqgrk,bngk->bqgrn", grouped, means).flatten(2, 3)
        chosen.append(windows.choose(scores, position[:, a:b], token[:, a:b], count=count))
    return torch.cat(chosen, dim=1)


@torch.no_grad()
def select_by_peak_slabs(
    q: Float[Tensor, "B T J K"],
    k: Float[Tensor, "B S 1 K"],
    *,
    block: int,
    count: int,
    local: int,
    position: Int[Tensor, "B S"],
    places: Int[Tensor, "B T"] | None = None,
) -> tuple[Int[Tensor, "B T J n"], Int[Tensor, "B T J m"]]:
    """The selection and its best keys, a slab of queries at a time; scores in float32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(dtype), k[:, :, 0].to(dtype)
    windows = document_windows(position, block, block)
    in_blocks = windows.gather(k).flatten(1, 2)
    token, position = query_tokens(places, q.shape[1], q), at_places(position, places)
    chosen, peaks = [], []
    for span in _slabs(q, k.shape[1], places):
        a, b = span.start, span.stop
        scores = torch.einsum("bqjk,bsk->bqjs", q[:, a:b], in_blocks)
        best, place = scores.unflatten(-1, (windows.start.shape[1], block)).max(-1)
        slots = windows.choose(best, position[:, a:b], token[:, a:b], count=count, local=local)
        chosen.append(slots)
        own = _own_peak(q[:, a:b], k, position[:, a:b] % block, token[:, a:b], span, block)
        peaks.append(torch.cat([own, _peaks(windows, place, slots)], -1))
    return torch.cat(chosen, dim=1), torch.cat(peaks, dim=1)


def _own_peak(q: Tensor, k: Tensor, inside: Tensor, token: Tensor, span: Span, block: int) -> Tensor:
    first = max(0, span.low - block + 1)
    key = torch.arange(first, span.high, device=q.device)
    query = token[..., None]
    is_own = (key <= query) & (key >= query - inside[..., None])
    scores = torch.einsum("bqjk,bsk->bqjs", q, k[:, first : span.high])
    return scores.masked_fill(~is_own[:, :, None], float("-inf")).argmax(-1, keepdim=True) + first


def _peaks(windows: Windows, place: Tensor, slots: Tensor) -> Tensor:
    if slots.shape[-1] == 0:
        return slots
    slots = slots.clamp(min=0)
    start = windows.start[:, None, None].expand(-1, *place.shape[1:3], -1)
    return start.gather(-1, slots) + place.gather(-1, slots)


def _slabs(q: Tensor, keys: int, places: Tensor | None) -> list[Span]:
    rows, tokens, heads, _ = q.shape
    return spans(places, tokens, queries_at_once(q, rows * heads * keys, SLAB))
