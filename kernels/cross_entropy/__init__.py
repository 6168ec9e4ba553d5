"""Cross entropy of a linear projection, without the logits of all tokens in memory at once."""

from typing import cast

from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import checked, require, require_within
from kernels.choose import takes_triton
from kernels.cross_entropy.reference import IGNORED, PLAIN, LinearCrossEntropy, LossOptions

__all__ = ["IGNORED", "PLAIN", "LossOptions", "linear_cross_entropy"]


@checked
def linear_cross_entropy(
    x: Float[Tensor, "N D"],
    weight: Float[Tensor, "M D"],
    targets: Int[Tensor, "N"],
    form: LossOptions = PLAIN,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sum over tokens of -log softmax(x weight^T)[target] + z lse^2, and the squares in it; at least float32.

    In nats. With `form.cap` the logits are cap tanh(logits / cap) (Gemma 2); z is `form.z`, lse the
    log-sum-exp of a token's logits (PaLM, arXiv 2204.02311, section 5); the second result has no gradient.
    Targets equal to IGNORED count nothing. Gradients are computed in forward: call it once per backward.
    Memory is O(D (N + M)) beside the inputs.

    Raises ValueError for an argument of the wrong shape, dtype or range.
    """
    require(weight.dtype == x.dtype, "weight", f"dtype {x.dtype}, as x", weight.dtype)
    require(form.cap is None or form.cap > 0, "form.cap", "None or above 0", form.cap)
    require(form.z >= 0, "form.z", "at least 0", form.z)
    require_within("targets", targets, 0, weight.shape[0], ignored=IGNORED)
    if takes_triton("cross_entropy", x):
        from kernels.cross_entropy.triton import linear_cross_entropy_triton

        return linear_cross_entropy_triton(x, weight, targets, form)
    return cast(tuple[Tensor, Tensor], LinearCrossEntropy.apply(x, weight, targets, form))
