"""Dense feed-forward: two projections with an activation between them."""

from jaxtyping import Float
from torch import Tensor, nn

from kernels.activation import activate
from model.linear import Linear
from model.shape import ActivationConfig


class FeedForward(nn.Module):
    """down(act(gate_up x)); one projection makes gates and ups."""

    def __init__(
        self, width: int, hidden: int, activation: ActivationConfig, layer: int, stds: tuple[float, float]
    ) -> None:
        """`stds` are the initial standard deviations into and out of the hidden layer."""
        super().__init__()
        self.activation, self.limit = activation, activation.limit_at(layer)
        self.gate_up = Linear(width, activation.factors * hidden, stds[0])
        self.down = Linear(hidden, width, stds[1])

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """Each token alone."""
        kind, clamps_product = self.activation.kind, self.activation.clamps_product
        return self.down(activate(self.gate_up(x), kind, limit=self.limit, clamps_product=clamps_product))


def count_params(width: int, hidden: int, activation: ActivationConfig) -> int:
    """Parameters of a FeedForward."""
    return (activation.factors + 1) * width * hidden


def activation_bytes(hidden: int, activation: ActivationConfig, *, element_bytes: int = 2) -> int:
    """Bytes per token that a training step keeps for backward."""
    return (activation.factors + 1) * hidden * element_bytes
