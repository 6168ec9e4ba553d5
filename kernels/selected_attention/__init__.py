"""Softmax attention in which every query has its own list of keys."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import checked, require, require_within
from kernels.choose import takes_triton
from kernels.selected_attention.reference import selected_attention_gathered


@checked
def selected_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"] | int,
    selection: Int[Tensor, "B T k"],
    *,
    scale: float,
    sinks: Float[Tensor, "H"] | None = None,
) -> Float[Tensor, "B T H V"]:
    """Softmax attention of each query over its k chosen keys.

    v: values, or an integer V if they are the first V channels of the keys. selection: indices of keys in the
    row, each at most once, -1 for none; a query without keys gets zeros. It is taken as given: it must hold
    no later token and none of another document. Query head h reads key head h // (H / G). sinks: a logit per
    head that takes part in the softmax and has no value. Work is O(T k (K + V)) per head.
    DeepSeek-V3.2, arXiv 2512.02556, equation 2.

    Raises ValueError for an argument of the wrong shape or dtype.
    """
    _check(q, k, v, selection, sinks)
    if takes_triton("selected_attention", q):
        from kernels.selected_attention.triton import selected_attention_triton

        deterministic = torch.are_deterministic_algorithms_enabled()
        return selected_attention_triton(
            q, k, v, selection, scale=scale, sinks=sinks, is_deterministic=deterministic
        )[0]
    return selected_attention_gathered(q, k, _values(k, v), selection, scale=scale, sinks=sinks)[0]


@checked
def selected_attention_with_shares(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"] | int,
    selection: Int[Tensor, "B T k"],
    *,
    scale: float,
    sinks: Float[Tensor, "H"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T k"]]:
    """`selected_attention`, and the probability of each chosen key, summed over heads.

    The latter is in float32 at least and has no gradient.
    """
    _check(q, k, v, selection, sinks)
    if takes_triton("selected_attention", q):
        from kernels.selected_attention.triton import selected_attention_triton, shares_triton

        deterministic = torch.are_deterministic_algorithms_enabled()
        out, lse = selected_attention_triton(
            q, k, v, selection, scale=scale, sinks=sinks, is_deterministic=deterministic
        )
        return out, shares_triton(q, k, selection, lse, scale=scale)
    return selected_attention_gathered(q, k, _values(k, v), selection, scale=scale, sinks=sinks)


def _values(k: Tensor, v: Tensor | int) -> Tensor:
    return k[..., :v] if isinstance(v, int) else v


def _check(q: Tensor, k: Tensor, v: Tensor | int, selection: Tensor, sinks: Tensor | None) -> None:
    tokens, heads, key_dim = q.shape[1:]
    require(tokens > 0, "q", "at least one token", tuple(q.shape))
    require(heads % k.shape[2] == 0, "q", f"a multiple of {k.shape[2]} heads", heads)
    require(k.dtype == q.dtype, "k", f"dtype {q.dtype}, as q", k.dtype)
    if isinstance(v, int):
        require(0 < v <= key_dim, "v", f"1 to {key_dim} channels", v)
    else:
        require(v.dtype == q.dtype, "v", f"dtype {q.dtype}, as q", v.dtype)
    require_within("selection", selection, -1, k.shape[1])
