"""What a chunk of linear attention does to the state that enters it."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kernels.arguments import checked, require, require_order


class DecaySummary(NamedTuple):
    """final state = factor * initial state + added; a factor is of a head, or of each of its key channels."""

    factor: Float[Tensor, "B H"] | Float[Tensor, "B H K"]
    added: Float[Tensor, "B H K V"]


@checked
@torch.no_grad()
def linear_attention_summary(
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"] | None = None,
    *,
    document: Int[Tensor, "B T"] | None = None,
) -> DecaySummary:
    """The affine map of the state over all tokens, in float32 at least. No gradients.

    Where a document starts after the first token, the factor is zero and only the last document is added.
    Sums of log decays run from the end, and no two are subtracted, so that -inf forgets all and no more.

    Raises ValueError for an argument of the wrong shape or dtype.
    """
    _require("k", k, v, document)
    dtype = torch.promote_types(v.dtype, torch.float32)
    last = None if document is None else document == document[:, -1:]
    if log_decay is None:
        factor, after = v.new_ones(v.shape[0], v.shape[2], dtype=dtype), None
    else:
        log_decay = log_decay.to(dtype)
        factor = log_decay.sum(1).exp()
        later = torch.nn.functional.pad(log_decay, (0, 0) * (log_decay.ndim - 2) + (0, 1))[:, 1:]
        after = later.flip(1).cumsum(1).flip(1).exp()
    if last is not None:
        factor = factor * _per_row(last[:, 0], factor)
    return DecaySummary(factor, _outer(k, v, after, last))


@checked
@torch.no_grad()
def linear_attention_initial_state_grad(
    grad_out: Float[Tensor, "B T H V"],
    q: Float[Tensor, "B T G K"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"] | None = None,
    *,
    document: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B H K V"]:
    """Gradient of the initial state from outputs alone: none of the final state.

    In float32 at least. Only the document of the first token reads that state.

    Raises ValueError for an argument of the wrong shape or dtype.
    """
    _require("q", q, grad_out, document)
    dtype = torch.promote_types(grad_out.dtype, torch.float32)
    until = None if log_decay is None else log_decay.to(dtype).cumsum(1).exp()
    return _outer(q, grad_out, until, None if document is None else document == document[:, :1])


def _require(name: str, keys: Tensor, values: Tensor, document: Tensor | None) -> None:
    require(keys.shape[1] > 0, name, "at least one token", tuple(keys.shape))
    divides = values.shape[2] % keys.shape[2] == 0
    require(divides, name, f"a divisor of {values.shape[2]} heads", keys.shape[2])
    require_order("document", document)


def _outer(
    keys: Float[Tensor, "B T G K"],
    values: Float[Tensor, "B T H V"],
    factor: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"] | None,
    counted: Bool[Tensor, "B T"] | None,
) -> Float[Tensor, "B H K V"]:
    # Sums over tokens of factor, key and value. A factor per head goes to the values: keys are of few heads.
    dtype = torch.promote_types(values.dtype, torch.float32)
    groups = keys.shape[2]
    keys, values = keys.to(dtype), values.to(dtype)
    if counted is not None:
        values = values * counted[..., None, None]
    if factor is not None and factor.ndim == 4:
        keys = keys.repeat_interleave(values.shape[2] // groups, dim=2) * factor
        return torch.einsum("bthk,bthv->bhkv", keys, values)
    if factor is not None:
        values = values * factor[..., None]
    return torch.einsum("btgk,btgrv->bgrkv", keys, values.unflatten(2, (groups, -1))).flatten(1, 2)


def _per_row(x: Bool[Tensor, "B"], like: Tensor) -> Tensor:
    return x.view(-1, *[1] * (like.ndim - 1))
