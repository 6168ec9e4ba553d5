"""Selective scan: a diagonal linear state space per channel whose step depends on the token."""

from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import checked, require, require_order
from kernels.selective_scan.reference import selective_scan_chunked


@checked
def selective_scan(
    x: Float[Tensor, "B T D"],
    step: Float[Tensor, "B T D"],
    rate: Float[Tensor, "D K"],
    k: Float[Tensor, "B T K"],
    q: Float[Tensor, "B T K"],
    *,
    document: Int[Tensor, "B T"] | None = None,
    initial_state: Float[Tensor, "B D K"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D K"]]:
    """Decay the state of each channel, add step times x along k, read with q, for every token.

    A channel forgets by exp(-step rate); steps and rates are at least 0. document numbers the documents of a
    row in order; the state is zero at the start of each, and initial_state is of the
    document of the first token. The second result is the final state. Work is O(T D K).

    Raises ValueError for an argument of the wrong shape or dtype.
    Mamba, arXiv 2312.00752, algorithm 2; rate is -A, k is B, q is C.
    """
    require(x.shape[1] > 0, "x", "at least one token", tuple(x.shape))
    require_order("document", document)
    for name, part in (("k", k), ("q", q)):
        require(part.dtype == x.dtype, name, f"dtype {x.dtype}, as x", part.dtype)
    return selective_scan_chunked(x, step, rate, k, q, document=document, initial_state=initial_state)
