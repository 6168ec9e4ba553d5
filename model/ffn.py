"""Dense feed-forward: SwiGLU."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from model.linear import Linear


class SwiGlu(nn.Module):
    """down(silu(gate x) * up x); one projection makes gate and up."""

    def __init__(self, width: int, hidden: int, init_std: float, out_std: float) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * hidden, init_std)
        self.down = Linear(hidden, width, out_std)

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """Each token alone."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(silu(gate) * up)


def count_params(width: int, hidden: int) -> int:
    """Parameters of a SwiGlu."""
    return 3 * width * hidden


def activation_bytes(hidden: int, *, element_bytes: int = 2) -> int:
    """Bytes per token that a training step keeps for backward."""
    return 3 * hidden * element_bytes
