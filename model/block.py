"""One layer: a token mixer and a feed-forward around the residual stream."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import dropout

from model.config import Architecture
from model.ffn import SwiGlu
from model.layout import NONE
from model.linear import RMSNorm
from model.mixer import Mixer, Sequence
from model.moe.layer import Moe
from model.moe.router import Routing
from model.shape import ResidualConfig


class Block(nn.Module):
    """x + mixer(norm(x)), then the same with the feed-forward; either half may be absent."""

    def __init__(self, config: Architecture, layer: int) -> None:
        super().__init__()
        width, depth, init_std = config.model.width, config.model.depth, config.model.init_std
        names = config.layers[layer]
        # Outputs that add to the residual stream start smaller, so that its scale does not grow with depth.
        out_std = init_std / (2 * depth) ** 0.5
        self.residual: ResidualConfig = config.residual
        self.mixer: Mixer | None = None
        self.ffn: Moe | SwiGlu | None = None
        if names.mixer != NONE:
            self.mixer_norm = self._norm(width)
            self.mixer = config.mixer[names.mixer].build(width, layer, depth, init_std)
        if names.ffn == "moe":
            self.ffn = Moe(config.moe, width, init_std, out_std)
        elif names.ffn == "dense":
            self.ffn = SwiGlu(width, config.model.ffn_hidden, init_std, out_std)
        if self.ffn is not None:
            self.ffn_norm = self._norm(width)

    def _norm(self, width: int) -> RMSNorm:
        residual = self.residual
        return RMSNorm(width, residual.norm_eps, is_zero_centered=residual.has_zero_centered_norm)

    def forward(
        self, x: Float[Tensor, "B T D"], sequence: Sequence
    ) -> tuple[Float[Tensor, "B T D"], Routing | None]:
        """The next residual stream, and the routing if the feed-forward is a mixture of experts."""
        routing = None
        if self.mixer is not None:
            x = x + self._drop(self.mixer(self.mixer_norm(x), sequence))
        if isinstance(self.ffn, Moe):
            out, routing = self.ffn(self.ffn_norm(x))
            x = x + self._drop(out)
        elif self.ffn is not None:
            x = x + self._drop(self.ffn(self.ffn_norm(x)))
        return x, routing

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.residual.dropout, self.training) if self.residual.dropout else x
