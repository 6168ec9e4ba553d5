"""Compressors in plain torch: one window at a time, and all windows gathered at once.

Letters: B rows, T tokens, N slots of windows, G heads, K dim of an entry, L or C tokens of a window, F inner
dim, E channels.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import silu

from kernels.document_windows import Windows


def mean_compress_direct(x: Float[Tensor, "B T G K"], windows: Windows) -> Float[Tensor, "B N G K"]:
    """One window at a time, in the caller's dtype; zero in slots without a window."""
    out = x.new_zeros(*windows.start.shape, *x.shape[2:])
    for b, n in windows.is_filled.nonzero().tolist():
        start = int(windows.start[b, n])
        out[b, n] = x[b, start : start + windows.length].mean(0)
    return out


def mlp_compress_direct(
    x: Float[Tensor, "B T G K"],
    position_encoding: Float[Tensor, "G L K"],
    first: Float[Tensor, "G F E"],
    second: Float[Tensor, "G K F"],
    windows: Windows,
) -> Float[Tensor, "B N G K"]:
    """One window and one head at a time, in the caller's dtype; zero in slots without a window."""
    rows, slots = windows.start.shape
    out = x.new_zeros(rows, slots, *x.shape[2:])
    for b, n in windows.is_filled.nonzero().tolist():
        start = int(windows.start[b, n])
        for g in range(x.shape[2]):
            tokens = x[b, start : start + windows.length, g] + position_encoding[g]
            out[b, n, g] = second[g] @ silu(first[g] @ tokens.flatten())
    return out


def mlp_compress_gathered(
    x: Float[Tensor, "B T G K"],
    position_encoding: Float[Tensor, "G L K"],
    first: Float[Tensor, "G F E"],
    second: Float[Tensor, "G K F"],
    windows: Windows,
) -> Float[Tensor, "B N G K"]:
    """All windows at once."""
    tokens = windows.gather(x).transpose(2, 3) + position_encoding
    inner = torch.einsum("bnge,gfe->bngf", tokens.flatten(3), first)
    return torch.einsum("bngf,gkf->bngk", silu(inner), second)


def gated_compress_direct(
    values: Float[Tensor, "B T E"],
    gates: Float[Tensor, "B T E"],
    bias: Float[Tensor, "C E"],
    windows: Windows,
    *,
    position: Int[Tensor, "B T"],
    is_overlapping: bool,
) -> Float[Tensor, "B N K"]:
    """One window at a time, in the caller's dtype; zero in slots without a window."""
    rows, slots = windows.start.shape
    size, dim = windows.length, values.shape[-1] // (1 + is_overlapping)
    out = values.new_zeros(rows, slots, dim)
    for b, n in windows.is_filled.nonzero().tolist():
        start = int(windows.start[b, n])
        taken = [(s, s - start, dim * is_overlapping) for s in range(start, start + size)]
        if is_overlapping and position[b, start] > 0:
            taken += [(s, s - start + size, 0) for s in range(start - size, start)]
        gate = torch.stack([gates[b, s, e : e + dim] + bias[c, e : e + dim] for s, c, e in taken])
        value = torch.stack([values[b, s, e : e + dim] for s, _, e in taken])
        out[b, n] = (gate.softmax(0) * value).sum(0)
    return out


def gated_compress_gathered(
    values: Float[Tensor, "B T E"],
    gates: Float[Tensor, "B T E"],
    bias: Float[Tensor, "C E"],
    windows: Windows,
    *,
    position: Int[Tensor, "B T"],
    is_overlapping: bool,
) -> Float[Tensor, "B N K"]:
    """All windows at once; the softmax and the sum in float32 at least."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    if not is_overlapping:
        gate = (windows.gather(gates) + bias).to(dtype)
        return (gate.softmax(2) * windows.gather(values)).sum(2).to(values.dtype)
    dim, shift = values.shape[-1] // 2, -windows.length
    gate = torch.cat(
        [
            windows.gather(gates[..., :dim], shift=shift) + bias[:, :dim],
            windows.gather(gates[..., dim:]) + bias[:, dim:],
        ],
        dim=2,
    ).to(dtype)
    value = torch.cat(
        [windows.gather(values[..., :dim], shift=shift), windows.gather(values[..., dim:])], dim=2
    )
    offset = torch.arange(shift, windows.length, device=values.device)
    opening = position.gather(1, windows.start.clamp(max=position.shape[1] - 1))
    is_first = (opening == 0)[..., None] & (offset < 0)
    weights = gate.masked_fill(is_first[..., None], float("-inf")).softmax(2)
    return (weights * value).sum(2).to(values.dtype)
