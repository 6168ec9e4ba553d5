"""Cross entropy of a linear projection, without the logits of all tokens in memory at once."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import require
from kernels.cross_entropy.reference import IGNORED, LinearCrossEntropy

__all__ = ["CASES", "IGNORED", "Case", "linear_cross_entropy"]


class Case(NamedTuple):
    """One shape that tests and benchmarks share."""

    tokens: int
    width: int
    vocabulary: int


CASES = (Case(1, 4, 2), Case(17, 8, 33), Case(513, 8, 40))


def linear_cross_entropy(
    x: Float[Tensor, "N D"], weight: Float[Tensor, "M D"], targets: Int[Tensor, "N"], cap: float | None = None
) -> Float[Tensor, ""]:
    """Sum over tokens of -log softmax(x weight^T)[target], in nats, at least in float32.

    With `cap` the logits are cap tanh(logits / cap) (Gemma 2).
    Targets equal to IGNORED count nothing; others are trusted to lie in [0, M). Gradients are computed in
    forward: call it once per backward. Memory is O(D (N + M)) beside the inputs.

    Raises ValueError for an argument of the wrong shape or dtype.
    """
    require(x.shape[1] == weight.shape[1], "weight", f"width {x.shape[1]}", tuple(weight.shape))
    require(targets.shape == x.shape[:1], "targets", tuple(x.shape[:1]), tuple(targets.shape))
    require(weight.dtype == x.dtype, "weight", f"dtype {x.dtype}, as x", weight.dtype)
    require(cap is None or cap > 0, "cap", "None or above 0", cap)
    out = LinearCrossEntropy.apply(x, weight, targets, cap)
    assert isinstance(out, Tensor), f"{type(out)=}"
    return out
