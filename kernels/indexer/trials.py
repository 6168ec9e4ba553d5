"""The indexer on drawn inputs."""

import torch
from torch import Tensor

from kernels.attention.reference import attention_direct
from kernels.indexer import CASES, Case
from kernels.indexer.loss import index_loss_direct
from kernels.indexer.reference import choose_directly, entry_tokens, last_tokens, visible_entries
from kernels.indexer.triton import Tiles, index_select_triton
from kernels.indexer.triton_loss import ChosenTiles, index_loss_full_triton, index_loss_selected_triton
from kernels.trial import Setting, Subject, Trial, Work

# Two tokens to an entry, every other time.
POOL = 2


def _tiles(setting: Setting) -> Tiles | None:
    return Tiles(16, 16, 64, 16, 1) if setting.is_small else None


def _last(case: Case, setting: Setting, position: Tensor, *, pools: bool) -> Tensor | None:
    """The last tokens of pools of tokens, -1 in slots without one."""
    if not pools:
        return None
    slots = max(1, case.tokens // POOL)
    is_last = position % POOL == POOL - 1
    rank = torch.where(is_last, is_last.long().cumsum(1) - 1, slots)
    index = torch.arange(case.tokens, device=setting.device).expand(case.rows, -1)
    last = torch.full((case.rows, slots + 1), -1, dtype=torch.long, device=setting.device)
    return last.scatter_(1, rank, index)[:, :slots]


def draw_selection(case: Case, setting: Setting) -> Trial:
    """Small whole numbers: their scores are exact and often equal, so that ties count."""
    document, position = setting.documents(case.rows, case.tokens)
    last = _last(case, setting, position, pools=case.pools)
    count = case.tokens if last is None else last.shape[1]
    numbers = {"low": -2, "high": 3, "dtype": setting.dtype}
    inputs = {
        "q": setting.integers(case.rows, case.tokens, case.index_heads, case.index_dim, **numbers),
        "k": setting.integers(case.rows, count, case.index_dim, **numbers),
        "weights": setting.integers(case.rows, case.tokens, case.index_heads, **numbers),
    }
    options = {"top_k": case.top_k, "last": last, "document": document}
    return Trial(
        inputs,
        lambda q, k, weights: (index_select_triton(q, k, weights, **options, tiles=_tiles(setting)),),
        lambda q, k, weights: (choose_directly(q, k, weights, **options),),
    )


def draw_chosen(case: Case, setting: Setting, *, is_deterministic: bool = False) -> Trial:
    """Any entries of the row, some of none, some queries with nothing to learn from."""
    rows, tokens, count = case.rows, case.tokens, case.top_k
    inputs = {
        "q": setting.normal(rows, tokens, case.index_heads, case.index_dim),
        "k": setting.normal(rows, tokens, case.index_dim),
        "weights": setting.normal(rows, tokens, case.index_heads, scale=0.3),
    }
    if setting.device.type == "meta":
        entries = torch.empty(rows, tokens, count, dtype=torch.int64, device="meta")
    else:
        entries = setting.uniform(rows, tokens, max(tokens, count)).argsort(-1)[..., :count]
        entries = torch.where(entries < tokens, entries, -1)
        entries = entries.masked_fill(setting.integers(*entries.shape, low=0, high=5) == 0, -1)
    shares = setting.uniform(rows, tokens, count).masked_fill(entries < 0, 0.0)
    shares = shares * (setting.integers(rows, tokens, 1, low=0, high=5) > 0)

    def truth(q, k, weights):
        index = torch.where(entries < 0, tokens, entries)
        spread = torch.zeros(rows, tokens, tokens + 1, dtype=q.dtype)
        mass = spread.scatter(2, index, shares.to(q.dtype))[..., :tokens]
        visible = spread.scatter(2, index, 1.0)[..., :tokens] > 0
        return (index_loss_direct(q, k, weights, mass, visible),)

    tiles = ChosenTiles(16, 1) if setting.is_small else None
    options = {"is_deterministic": is_deterministic, "tiles": tiles}
    return Trial(
        inputs,
        lambda q, k, weights: (index_loss_selected_triton(q, k, weights, entries, shares, **options),),
        truth,
    )


def draw_chosen_in_order(case: Case, setting: Setting) -> Trial:
    """The same with sums in a fixed order."""
    return draw_chosen(case, setting, is_deterministic=True)


def draw_full(case: Case, setting: Setting) -> Trial:
    """All entries that a query sees, beside an attention of grouped heads."""
    rows, tokens, heads = case.rows, case.tokens, case.heads
    document, position = setting.documents(rows, tokens)
    last = _last(case, setting, position, pools=case.pools)
    size = POOL if case.pools else 1
    count = tokens if last is None else last.shape[1]
    groups = 1 if heads % 2 else heads // 2
    attention_q = setting.normal(rows, tokens, heads, case.key_dim)
    attention_k = setting.normal(rows, tokens, groups, case.key_dim)
    scale = case.key_dim**-0.5
    if setting.device.type == "meta":
        lse = torch.empty(rows, tokens, heads, device="meta")
    else:
        q, k = attention_q.double(), attention_k.double()
        lse = attention_direct(q, k, k, scale=scale, document=document)[1]
    inputs = {
        "q": setting.normal(rows, tokens, case.index_heads, case.index_dim),
        "k": setting.normal(rows, count, case.index_dim),
        "weights": setting.normal(rows, tokens, case.index_heads, scale=0.3),
    }
    options = {"scale": scale, "last": last, "size": size, "document": document}

    def truth(q, k, weights):
        keys = attention_k.double().repeat_interleave(heads // groups, dim=2)
        scores = torch.einsum("bthk,bshk->bhts", attention_q.double(), keys) * scale
        mass = (scores - lse.mT[..., None]).exp().sum(1)
        last_token = last_tokens(k, last)
        if last is not None:
            members = entry_tokens(last, size).flatten(1)[:, None].expand(-1, tokens, -1)
            mass = mass.gather(2, members).unflatten(2, (-1, size)).sum(3)
        visible = visible_entries(0, tokens, last_token, document)
        return (index_loss_direct(q, k, weights, mass.to(q.dtype), visible),)

    return Trial(
        inputs,
        lambda q, k, weights: (
            index_loss_full_triton(
                q, k, weights, attention_q, attention_k, lse.float(), **options, tiles=_tiles(setting)
            ),
        ),
        truth,
    )


def selection_work(case: Case) -> Work:
    """Products of all causal pairs, and their scores written and read once in float32."""
    pairs = case.rows * case.tokens**2 / 2
    return Work(2.0 * pairs * case.index_heads * case.index_dim, 8.0 * pairs, 0.0, 0.0)


def chosen_work(case: Case) -> Work:
    """Three products of chosen pairs, all of them in forward; bytes in bfloat16 of queries, twice."""
    lines = case.rows * case.tokens * case.index_heads * case.index_dim
    return Work(6.0 * lines * min(case.top_k, case.tokens), 4.0 * lines, 0.0, 4.0 * lines)


def full_work(case: Case) -> Work:
    """Products of all causal pairs: the attention's, and three of the indexer's, all in forward."""
    pairs = case.rows * case.tokens**2 / 2
    flops = 2.0 * pairs * (case.heads * case.key_dim + 3 * case.index_heads * case.index_dim)
    return Work(flops, 16.0 * pairs, 0.0, 0.0)


def dsa(tokens: int) -> Case:
    """DeepSeek-V3.2: 64 index heads of 128 dims beside 128 heads of 192."""
    return Case(1, tokens, 64, 128, 128, 192, min(2048, tokens))


# The interpreter takes a query at a time.
SMALL = tuple(Case(1, min(20, c.tokens), *c[2:]) for c in CASES)
SUBJECTS = (
    Subject("indexer.selection", SMALL, dsa, draw_selection, selection_work),
    Subject("indexer.chosen", SMALL, dsa, draw_chosen, chosen_work),
    Subject("indexer.chosen_in_order", SMALL[1:3], dsa, draw_chosen_in_order, chosen_work),
    Subject("indexer.full", CASES, dsa, draw_full, full_work),
)
