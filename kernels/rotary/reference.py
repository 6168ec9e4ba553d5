"""Rotary positions in plain torch. Letters: B rows, T tokens, H heads, K head dim, R angles."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

RotaryLayout = Literal["half_split", "interleaved"]


def rotate_direct(
    x: Float[Tensor, "B T H K"],
    cos: Float[Tensor, "#B T R"],
    sin: Float[Tensor, "#B T R"],
    layout: RotaryLayout,
    *,
    on_last: bool,
) -> Float[Tensor, "B T H K"]:
    """x with some of its dims turned, in the caller's dtype."""
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    turned = 2 * cos.shape[-1]
    sizes = [x.shape[-1] - turned, turned] if on_last else [turned, x.shape[-1] - turned]
    head, tail = x.split(sizes, dim=-1)
    if on_last:
        return torch.cat([head, _turn(tail, cos, sin, layout)], dim=-1)
    return torch.cat([_turn(head, cos, sin, layout), tail], dim=-1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, layout: RotaryLayout) -> Tensor:
    if layout == "half_split":
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
