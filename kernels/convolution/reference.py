"""Short causal convolution in plain torch: the direct sum, and the form with its own backward.

Letters: B rows, T tokens, D channels, W taps. Tap W - 1 weighs the token itself.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad, silu


def tap_masks(document: Int[Tensor, "B T"], taps: int) -> list[Bool[Tensor, "B T 1"]]:
    """For each shift 0 to taps - 1: whether the token so far back is of the same document."""
    masks = []
    for shift in range(taps):
        earlier = pad(document[:, : document.shape[1] - shift], (shift, 0), value=-1)
        masks.append((earlier == document)[..., None])
    return masks


def convolution_direct(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    *,
    document: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T D"]:
    """SiLU of the sum over taps, one token and one tap at a time."""
    rows, length, _ = x.shape
    taps = weight.shape[1]
    out = []
    for t in range(length):
        total = torch.zeros_like(x[:, 0])
        for shift in range(min(taps, t + 1)):
            same = torch.ones(rows, dtype=torch.bool, device=x.device)
            if document is not None:
                same = document[:, t] == document[:, t - shift]
            total = total + torch.where(same[:, None], x[:, t - shift], 0.0) * weight[:, taps - 1 - shift]
        out.append(silu(total))
    return torch.stack(out, dim=1)


class ShortConvolution(torch.autograd.Function):
    """SiLU(conv(x)); saves x and the sum, and walks the taps again in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, document: Tensor | None) -> Tensor:
        """Shapes as `convolution_direct`."""
        masks = None if document is None else tap_masks(document, weight.shape[1])
        total = _sum_of_taps(x, weight, masks)
        ctx.save_for_backward(x, weight, total, *(masks or ()))
        return silu(total)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of x and weight."""
        x, weight, total, *masks = ctx.saved_tensors
        sigmoid = total.sigmoid()
        grad_total = grads[0] * sigmoid * (1 + total * (1 - sigmoid))
        length, taps = x.shape[1], weight.shape[1]
        grad_x = torch.zeros_like(x)
        grad_weight = torch.zeros_like(weight)
        for shift in range(min(taps, length)):
            grad = grad_total if not masks else grad_total * masks[shift]
            tap, kept = taps - 1 - shift, length - shift
            grad_x[:, :kept].addcmul_(grad[:, shift:], weight[:, tap].expand_as(grad[:, shift:]))
            grad_weight[:, tap] = (grad[:, shift:] * x[:, :kept]).sum((0, 1))
        return grad_x, grad_weight, None


def _sum_of_taps(x: Tensor, weight: Tensor, masks: list[Tensor] | None) -> Tensor:
    length, taps = x.shape[1], weight.shape[1]
    total = x * weight[:, taps - 1]
    for shift in range(1, min(taps, length)):
        earlier = x[:, : length - shift]
        if masks is not None:
            earlier = earlier * masks[shift][:, shift:]
        total[:, shift:].addcmul_(earlier, weight[:, taps - 1 - shift].expand_as(earlier))
    return total
