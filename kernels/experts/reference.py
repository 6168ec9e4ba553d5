"""Routed experts in plain torch: one token at a time, and the sorted, grouped form.

Letters: N tokens, D width, E experts, k experts per token, F expert hidden, H its columns before the
activation: 2 F for gated forms, else F.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag, grouped_mm, silu

from kernels.activation.reference import Kind, activate_direct


class ExpertForm(NamedTuple):
    """What an expert computes.

    kind, limit and clamps_product are those of the activation. With scales_input the weight of a choice
    multiplies what goes into the expert instead of what comes out (Llama-4).
    """

    kind: Kind = "swiglu"
    limit: float | None = None
    clamps_product: bool = False
    scales_input: bool = False


PLAIN = ExpertForm()


class ExpertBiases(NamedTuple):
    """Biases of both projections: up [E H], down [E D]."""

    up: Tensor
    down: Tensor


def experts_direct(
    x: Float[Tensor, "N D"],
    gate_up: Float[Tensor, "E H D"],
    down: Float[Tensor, "E D F"],
    chosen: Int[Tensor, "N k"],
    weights: Float[Tensor, "N k"],
    form: ExpertForm = PLAIN,
    biases: ExpertBiases | None = None,
) -> Float[Tensor, "N D"]:
    """Weighted sum of the chosen experts, one token and one expert at a time; ids from E on add nothing."""
    rows = []
    for token, ids, scales in zip(x, chosen.tolist(), weights, strict=True):
        total = torch.zeros_like(token)
        for expert, scale in zip(ids, scales, strict=True):
            if expert >= gate_up.shape[0]:
                continue
            hidden = gate_up[expert] @ (token * scale if form.scales_input else token)
            hidden = hidden + biases.up[expert] if biases else hidden
            active = activate_direct(hidden, form.kind, limit=form.limit, clamps_product=form.clamps_product)
            out = down[expert] @ active
            out = out + biases.down[expert] if biases else out
            total = total + (out if form.scales_input else scale * out)
        rows.append(total)
    return torch.stack(rows) if rows else x.new_zeros(x.shape)


def experts_grouped(
    x: Float[Tensor, "N D"],
    gate_up: Float[Tensor, "E H D"],
    down: Float[Tensor, "E D F"],
    chosen: Int[Tensor, "N k"],
    weights: Float[Tensor, "N k"],
    form: ExpertForm = PLAIN,
    biases: ExpertBiases | None = None,
    *,
    num_idle: int = 0,
) -> Float[Tensor, "N D"]:
    """The same sum: tokens sorted by expert, one grouped matrix product each way.

    Ids reach up to E + num_idle; those from E on are sorted behind all experts.
    """
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(flat.shape[0], device=order.device)
    experts = gate_up.shape[0]
    counts = flat.new_zeros(experts + num_idle).scatter_add_(0, flat, torch.ones_like(flat))
    ends = counts[:experts].cumsum(0).to(torch.int32)
    if form == PLAIN and biases is None and not num_idle:
        out = GroupedExperts.apply(x, gate_up, down, weights, order, back, ends)
        assert isinstance(out, Tensor), f"{type(out)=}"
        return out
    back = back.view_as(chosen)
    rows = SpreadRows.apply(x, order // weights.shape[1], back)
    scale = weights.flatten()[order][:, None]
    expert = flat[order].clamp(max=experts - 1)
    hidden = GroupedLinear.apply(rows * scale if form.scales_input else rows, gate_up, ends)
    hidden = hidden + biases.up[expert] if biases else hidden
    active = activate_direct(hidden, form.kind, limit=form.limit, clamps_product=form.clamps_product)
    out = GroupedLinear.apply(active, down, ends)
    out = out + biases.down[expert] if biases else out
    if biases and num_idle:
        out = out.masked_fill(_is_rest(out, ends), 0.0)
    return CollectRows.apply(out if form.scales_input else out * scale, order // weights.shape[1], back)


class SpreadRows(torch.autograd.Function):
    """x[token]; the gradient of a row is a sum over its k copies in a fixed order. back [N k]."""

    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, back: Tensor) -> Tensor:
        """One row for every choice, sorted by expert."""
        ctx.save_for_backward(back)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of x."""
        return _sum_of_rows(grads[0], *ctx.saved_tensors), None, None


class CollectRows(torch.autograd.Function):
    """Sums of k rows: the transpose of `SpreadRows`."""

    @staticmethod
    def forward(ctx, rows: Tensor, token: Tensor, back: Tensor) -> Tensor:
        """One row for every token."""
        ctx.save_for_backward(token)
        return _sum_of_rows(rows, back)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of rows."""
        return grads[0].index_select(0, *ctx.saved_tensors), None, None


class GroupedLinear(torch.autograd.Function):
    """Rows times the transposed weight of their group; rows behind the last group come out as zero."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """x [R I], weight [E O I] -> [R O]."""
        ctx.save_for_backward(x, weight, ends)
        return _rest_as_zero(matmul_by_group(x, weight.mT, ends), ends)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of x and weight."""
        x, weight, ends = ctx.saved_tensors
        grad_x = _rest_as_zero(matmul_by_group(grads[0], weight, ends), ends)
        return grad_x, outer_by_group(grads[0], x, ends), None


def _is_rest(x: Tensor, ends: Tensor) -> Tensor:
    return (torch.arange(x.shape[0], device=x.device) >= ends[-1])[:, None]


def _rest_as_zero(x: Tensor, ends: Tensor) -> Tensor:
    # A grouped product leaves the rows of no group as it found the memory.
    return torch.where(_is_rest(x, ends), 0.0, x)


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
    if x.is_meta:  # torch's grouped product has shapes for bfloat16 only
        return x.new_empty(x.shape[0], weight.shape[2])
    if x.dtype == torch.float64:  # torch's grouped product takes no doubles
        sizes = _sizes(ends)
        parts = zip(x[: sum(sizes)].split(sizes), weight, strict=True)
        rest = x.new_zeros(x.shape[0] - sum(sizes), weight.shape[2])
        return torch.cat([*(rows @ matrix for rows, matrix in parts), rest])
    return grouped_mm(_laid_out(x), _laid_out(weight), offs=ends)


def outer_by_group(
    x: Float[Tensor, "R K"], y: Float[Tensor, "R M"], ends: Int[Tensor, "E"]
) -> Float[Tensor, "E K M"]:
    """x^T y over the rows of each group."""
    if x.is_meta:
        return x.new_empty(ends.shape[0], x.shape[1], y.shape[1])
    if x.dtype == torch.float64:
        sizes = _sizes(ends)
        x, y = x[: sum(sizes)], y[: sum(sizes)]
        return torch.stack([a.T @ b for a, b in zip(x.split(sizes), y.split(sizes), strict=True)])
    return grouped_mm(_laid_out(x).T, _laid_out(y), offs=ends)


def _laid_out(x: Tensor) -> Tensor:
    """x in a layout that torch's grouped product takes: one of the last two dims without gaps."""
    return x if 1 in x.stride()[-2:] else x.contiguous()


def _sizes(ends: Int[Tensor, "E"]) -> list[int]:
    return torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
