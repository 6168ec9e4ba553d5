"""How tokens reach the experts that they chose."""

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

# The weighted sum of the chosen experts of each token, ids counted within the experts at hand.
Compute: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


@runtime_checkable
class Dispatch(Protocol):
    """Brings tokens to experts, lets them compute, and brings the results back."""

    def __call__(
        self, x: Float[Tensor, "N D"], chosen: Int[Tensor, "N k"], weights: Float[Tensor, "N k"], run: Compute
    ) -> Float[Tensor, "N D"]:
        """Weighted sum of the chosen experts of each token. Ids past the last expert add nothing."""
        ...


def here(
    x: Float[Tensor, "N D"], chosen: Int[Tensor, "N k"], weights: Float[Tensor, "N k"], run: Compute
) -> Float[Tensor, "N D"]:
    """All experts are at hand."""
    return run(x, chosen, weights)
