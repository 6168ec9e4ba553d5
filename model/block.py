"""One layer: a token mixer and a feed-forward around the residual stream."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from model.config import Architecture
from model.ffn import FeedForward
from model.layout import DENSE, HASH, NONE, SHORTCUT, Layer
from model.mixer import Mixed, Mixer, Sequence
from model.moe.layer import Moe
from model.moe.router import Routing
from model.residual import build_residual


class Carry(NamedTuple):
    """What a layer hands to the next beside the residual stream.

    selection: the keys that a sparse mixer chose, for layers that share them. shortcut [B T D]: the output of
    a mixture of experts that joins the stream at the end of the next layer.
    """

    selection: Tensor | None = None
    shortcut: Tensor | None = None


class Notes(NamedTuple):
    """What a layer reports: its routing if it has experts, and its own losses, summed over tokens."""

    routing: Routing | None
    losses: dict[str, Tensor]


class Block(nn.Module):
    """A mixer half and a feed-forward half; either may be absent.

    A `shortcut` layer has a dense feed-forward and, from the same input, a mixture of experts that joins the
    stream a layer later, so that its communication has a mixer and a feed-forward to hide behind
    (LongCat-Flash).
    """

    def __init__(self, config: Architecture, layer: int, names: Layer) -> None:
        super().__init__()
        self.layer, self.names = layer, names
        shape, width = config.model, config.model.width
        # Outputs that add to the residual stream start smaller, so that its scale does not grow with depth.
        stds = (shape.init_std, shape.init_std / (2 * shape.depth) ** 0.5)
        self.mixer: Mixer | None = None
        self.ffn: FeedForward | None = None
        self.moe: Moe | None = None
        if names.mixer != NONE:
            self.mixer = config.mixer[names.mixer].build(width, layer, shape.depth, shape.init_std)
            self.mixer_residual = build_residual(width, config.residual)
        if names.ffn in (DENSE, SHORTCUT):
            self.ffn = FeedForward(width, shape.ffn_hidden, shape.activation, layer, stds)
        if names.ffn not in (DENSE, NONE):
            hashed = shape.vocab_size if names.ffn == HASH else None
            self.moe = Moe(config.moe, width, layer, stds, hashed)
        if names.ffn != NONE:
            self.ffn_residual = build_residual(width, config.residual)

    def forward(
        self, stream: Float[Tensor, "B T *n D"], sequence: Sequence, carry: Carry
    ) -> tuple[Float[Tensor, "B T *n D"], Carry, Notes]:
        """The next residual stream, what the next layer gets beside it, and what happened."""
        stream, selection, losses = self._mix(stream, sequence, carry.selection)
        if self.ffn is None and self.moe is None:
            return stream, Carry(selection, carry.shortcut), Notes(None, losses)
        x, kept = self.ffn_residual.read(stream)
        parts, routing, shortcut = [], None, None
        if self.ffn is not None:
            parts.append(self.ffn(x))
        if self.moe is not None:
            out, routing = self.moe(x, sequence.tokens)
            if self.ffn is None:
                parts.append(out)
            else:
                shortcut = out
        if carry.shortcut is not None:
            parts.append(carry.shortcut)
        stream = self.ffn_residual.write(kept, parts[0] if len(parts) == 1 else parts[0] + parts[1])
        return stream, Carry(selection, shortcut), Notes(routing, losses)

    def _mix(
        self, stream: Tensor, sequence: Sequence, selection: Tensor | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        if self.mixer is None:
            return stream, selection, {}
        x, kept = self.mixer_residual.read(stream)
        mixed = self.mixer(x, sequence, selection) if self.mixer.shares_selection else self.mixer(x, sequence)
        if isinstance(mixed, Tensor):
            mixed = Mixed(mixed)
        selection = selection if mixed.selection is None else mixed.selection
        return self.mixer_residual.write(kept, mixed.out), selection, mixed.losses or {}
