"""Embedding and loss over a vocabulary that is cut over the ranks of the tensor axis."""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding

from kernels.cross_entropy import IGNORED, LossOptions
from parallel.mesh.axes import Axis
from parallel.mesh.collectives import gather, reduce_scatter

# Tokens whose logits are in memory at a time.
CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class ShardedVocab:
    """Each rank has the rows of one part of the vocabulary, in order, and one part of the tokens."""

    axis: Axis

    def embed(self, tokens: Int[Tensor, "B T"], weight: Float[Tensor, "M D"]) -> Float[Tensor, "B P D"]:
        """The embeddings of this rank's P of the T tokens. Every rank is given all tokens."""
        inside = tokens - self.axis.rank * weight.shape[0]
        is_here = (inside >= 0) & (inside < weight.shape[0])
        rows = embedding(inside.clamp(0, weight.shape[0] - 1), weight)
        return reduce_scatter(rows.masked_fill(~is_here[..., None], 0.0), self.axis, 1)

    def cross_entropy(
        self,
        x: Float[Tensor, "B P D"],
        weight: Float[Tensor, "M D"],
        targets: Int[Tensor, "B T"],
        form: LossOptions,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """`linear_cross_entropy` of this rank's tokens over the whole vocabulary.

        x are this rank's tokens, targets those of all ranks.
        """
        every = gather(x, self.axis, 1).flatten(0, 1)
        own = torch.zeros_like(targets, dtype=torch.bool)
        own.view(targets.shape[0], self.axis.size, -1)[:, self.axis.rank] = True
        out = CutCrossEntropy.apply(every, weight, targets.flatten(), own.flatten(), form, self.axis)
        return cast(tuple[Tensor, Tensor], out)


class CutCrossEntropy(torch.autograd.Function):
    """x [N D], weight [M D], targets [N], own [N] -> the sum of the losses of own tokens, and their z part.

    Gradients are computed in forward, from a chunk of logits at a time, for the tokens of all ranks: each
    rank's objective has the loss of its own, and the logits of all ranks go into it. They hold for a gradient
    of the loss that is the same on every rank, as the sum over ranks has it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, own: Tensor, form: LossOptions, axis: Axis
    ) -> tuple[Tensor, Tensor]:
        """Sums in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        totals = x.new_zeros(2, dtype=dtype)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=dtype)
        for start in range(0, len(x), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            losses, z, grad = _of_chunk(x[rows], weight, targets[rows], form, axis)
            counted = own[rows] & (targets[rows] != IGNORED)
            totals += torch.stack((losses, z)).masked_fill(~counted, 0.0).sum(1)
            grad_x[rows] = grad.to(x.dtype) @ weight
            grad_weight += (grad.to(x.dtype).T @ x[rows]).to(dtype)
        ctx.save_for_backward(grad_x, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(totals[1])
        return totals[0] + totals[1], totals[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of forward, scaled."""
        grad_x, grad_weight = ctx.saved_tensors
        return (
            grad_x * grads[0].to(grad_x.dtype),
            grad_weight * grads[0].to(grad_weight.dtype),
            None,
            None,
            None,
            None,
        )


def _of_chunk(
    x: Float[Tensor, "C D"],
    weight: Float[Tensor, "M D"],
    targets: Int[Tensor, "C"],
    form: LossOptions,
    axis: Axis,
) -> tuple[Float[Tensor, "C"], Float[Tensor, "C"], Float[Tensor, "C M"]]:
    """Loss without z and z part of each token, and the gradient of both by this rank's logits."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = (x @ weight.T).to(dtype)
    slope = None
    if form.cap is not None:
        bounded = (logits / form.cap).tanh_()
        slope, logits = 1 - bounded.square(), form.cap * bounded
    inside = targets - axis.rank * weight.shape[0]
    is_here = (inside >= 0) & (inside < weight.shape[0])
    index = inside.clamp(0, weight.shape[0] - 1)[:, None]
    most = logits.amax(1)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=axis.group)
    target = logits.gather(1, index)[:, 0] * is_here
    sums = torch.stack(((logits - most[:, None]).exp().sum(1), target))
    dist.all_reduce(sums, group=axis.group)
    lse = sums[0].log() + most
    share = (logits - lse[:, None]).exp_()
    grad = share * (1 + 2 * form.z * lse)[:, None]
    grad.scatter_add_(1, index, -is_here.to(dtype)[:, None])
    grad.mul_((targets != IGNORED)[:, None])
    return lse - sums[1], form.z * lse.square(), grad if slope is None else grad.mul_(slope)
