"""Routed experts in plain torch: one token at a time, and the sorted, grouped form.

Letters: N tokens, D width, E experts, k experts per token, F expert hidden.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag, grouped_mm, silu


def experts_direct(
    x: Float[Tensor, "N D"],
    gate_up: Float[Tensor, "E F2 D"],
    down: Float[Tensor, "E D F"],
    chosen: Int[Tensor, "N k"],
    weights: Float[Tensor, "N k"],
) -> Float[Tensor, "N D"]:
    """Weighted sum of the chosen experts' SwiGLU, one token and one expert at a time."""
    rows = []
    for token, ids, scales in zip(x, chosen.tolist(), weights, strict=True):
        total = torch.zeros_like(token)
        for expert, scale in zip(ids, scales, strict=True):
            gate, up = (gate_up[expert] @ token).chunk(2)
            total = total + scale * (down[expert] @ (silu(gate) * up))
        rows.append(total)
    return torch.stack(rows) if rows else x.new_zeros(x.shape)


def experts_grouped(
    x: Float[Tensor, "N D"],
    gate_up: Float[Tensor, "E F2 D"],
    down: Float[Tensor, "E D F"],
    chosen: Int[Tensor, "N k"],
    weights: Float[Tensor, "N k"],
) -> Float[Tensor, "N D"]:
    """The same sum: tokens sorted by expert, one grouped matrix product each way."""
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(flat.shape[0], device=order.device)
    ends = torch.bincount(flat, minlength=gate_up.shape[0]).cumsum(0).to(torch.int32)
    out = GroupedExperts.apply(x, gate_up, down, weights, order, back, ends)
    assert isinstance(out, Tensor), f"{type(out)=}"
    return out


class GroupedExperts(torch.autograd.Function):
    """The grouped form with its own backward, which only gathers: sums over k stay in a fixed order.

    order sorts the N k choices by expert, back undoes it, ends are the last rows of the experts plus one.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        weights: Tensor,
        order: Tensor,
        back: Tensor,
        ends: Tensor,
    ) -> Tensor:
        """Shapes as `experts_grouped`."""
        token = order // weights.shape[1]
        hidden = matmul_by_group(x.index_select(0, token), gate_up.mT, ends)
        gate, up = hidden.chunk(2, dim=-1)
        # The weight goes in before the second product, where rows are narrower than after it.
        active = (silu(gate) * up).mul_(weights.flatten()[order][:, None])
        out = matmul_by_group(active, down.mT, ends)
        ctx.save_for_backward(x, gate_up, down, weights, order, back, ends, hidden)
        return _sum_of_rows(out, back.view_as(weights))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, gate_up, down and weights."""
        x, gate_up, down, weights, order, back, ends, hidden = ctx.saved_tensors
        token = order // weights.shape[1]
        scale = weights.flatten()[order][:, None]
        grad_rows = grads[0].index_select(0, token)
        grad_active = matmul_by_group(grad_rows, down, ends)
        gate, up = hidden.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        swish = gate * sigmoid
        active = swish * up
        grad_weights = (grad_active * active).sum(-1)[back].view_as(weights)
        grad_down = outer_by_group(grad_rows, active.mul_(scale), ends)
        grad_active.mul_(scale)
        grad_hidden = torch.empty_like(hidden)
        grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
        torch.mul(grad_active, swish, out=grad_up)
        # d silu(g) / dg = sigmoid (1 + g - g sigmoid)
        torch.mul(grad_active.mul_(up), sigmoid.mul_(1 + gate - swish), out=grad_gate)
        grad_gate_up = outer_by_group(grad_hidden, x.index_select(0, token), ends)
        grad_x = _sum_of_rows(matmul_by_group(grad_hidden, gate_up, ends), back.view_as(weights))
        return grad_x, grad_gate_up, grad_down, grad_weights, None, None, None


def _sum_of_rows(x: Float[Tensor, "R D"], rows: Int[Tensor, "N k"]) -> Float[Tensor, "N D"]:
    """Sum of k rows of x for each token, in their order, without a copy of them."""
    return embedding_bag(rows, x, mode="sum")


def matmul_by_group(
    x: Float[Tensor, "R K"], weight: Float[Tensor, "E K M"], ends: Int[Tensor, "E"]
) -> Float[Tensor, "R M"]:
    """Rows up to ends[0] times weight[0], the next up to ends[1] times weight[1], and so on."""
    if x.dtype == torch.float64:  # torch's grouped product takes no doubles
        parts = zip(x.split(_sizes(ends)), weight, strict=True)
        return torch.cat([rows @ matrix for rows, matrix in parts])
    return grouped_mm(x, weight, offs=ends)


def outer_by_group(
    x: Float[Tensor, "R K"], y: Float[Tensor, "R M"], ends: Int[Tensor, "E"]
) -> Float[Tensor, "E K M"]:
    """x^T y over the rows of each group."""
    if x.dtype == torch.float64:
        sizes = _sizes(ends)
        return torch.stack([a.T @ b for a, b in zip(x.split(sizes), y.split(sizes), strict=True)])
    return grouped_mm(x.T, y, offs=ends)


def _sizes(ends: Int[Tensor, "E"]) -> list[int]:
    return torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
