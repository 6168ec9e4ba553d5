"""What a chunk of the selective scan does to the state that enters it."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import checked, require, require_order
from kernels.selective_scan import selective_scan
from kernels.selective_scan.reference import initial_state_grad_chunked


class ScanSummary(NamedTuple):
    """final state = exp(-steps rate) * initial state + added, if no document starts after the first token."""

    steps: Float[Tensor, "B D"]
    added: Float[Tensor, "B D K"]


@checked
@torch.no_grad()
def selective_scan_summary(
    x: Float[Tensor, "B T D"],
    step: Float[Tensor, "B T D"],
    rate: Float[Tensor, "D K"],
    k: Float[Tensor, "B T K"],
    *,
    document: Int[Tensor, "B T"] | None = None,
) -> ScanSummary:
    """The sum of the steps, and the final state from a zero initial one, in float32 at least. No gradients.

    Steps say nothing of documents: where one starts after the first token, nothing of the initial
    state is left. Raises ValueError as `selective_scan`.
    """
    _, added = selective_scan(x, step, rate, k, torch.zeros_like(k), document=document)
    return ScanSummary(step.to(added.dtype).sum(1), added)


@checked
def selective_scan_initial_state_grad(
    grad_out: Float[Tensor, "B T D"],
    step: Float[Tensor, "B T D"],
    rate: Float[Tensor, "D K"],
    q: Float[Tensor, "B T K"],
    *,
    document: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B D K"]:
    """Gradient of the initial state from outputs alone: none of the final state.

    In float32 at least. Only the document of the first token reads that state. Work is O(T D K).

    Raises ValueError for an argument of the wrong shape or dtype.
    """
    require(q.shape[1] > 0, "q", "at least one token", tuple(q.shape))
    require_order("document", document)
    return initial_state_grad_chunked(grad_out, step, rate, q, document=document)
