"""How tokens reach the experts that they chose."""

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

# The weighted sum of the chosen experts of each token, ids counted within the experts at hand.
Compute: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
# What else there is to compute while tokens are on their way.
Overlapped: TypeAlias = Callable[[], Tensor | None]


@runtime_checkable
class Dispatch(Protocol):
    """Brings tokens to experts, lets them compute, and brings the results back."""

    def __call__(
        self,
        x: Float[Tensor, "N D"],
        chosen: Int[Tensor, "N k"],
        weights: Float[Tensor, "N k"],
        run: Compute,
        overlapped: Overlapped,
    ) -> tuple[Float[Tensor, "N D"], Tensor | None]:
        """Weighted sum of the chosen experts of each token, and what `overlapped` gives.

        Ids past the last expert add nothing.
        """
        ...


def local_dispatch(
    x: Float[Tensor, "N D"],
    chosen: Int[Tensor, "N k"],
    weights: Float[Tensor, "N k"],
    run: Compute,
    overlapped: Overlapped,
) -> tuple[Float[Tensor, "N D"], Tensor | None]:
    """All experts are at hand."""
    return run(x, chosen, weights), overlapped()
