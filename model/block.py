"""One layer: a token mixer and a feed-forward around the residual stream."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

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


class AuxOutputs(NamedTuple):
    """What a layer reports: its routing if it has experts, and its own losses, summed over tokens."""

    routing: Routing | None
    losses: dict[str, Tensor]


# Calls a function with the arguments that follow it, the residual stream first, and gives what it gives.
Executor: TypeAlias = Callable[..., Any]


def directly(function: Callable[..., Any], *args: Any) -> Any:
    """The function's own result."""
    return function(*args)


class Block(nn.Module):
    """A mixer half and a feed-forward half; either may be absent.

    A `shortcut` layer has a dense feed-forward and, from the same input, a mixture of experts that joins the
    stream a layer later, so that its communication has a mixer and a feed-forward to hide behind
    (LongCat-Flash).
    """

    def __init__(self, config: Architecture, layer: int, names: Layer) -> None:
        super().__init__()
        self.layer, self.names = layer, names
        # Set from outside where backward is to find less of what a half, or the whole block, computed.
        self.run: Executor = directly
        self.run_mixer: Executor = directly
        self.run_ffn: Executor = directly
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
    ) -> tuple[Float[Tensor, "B T *n D"], Carry, AuxOutputs]:
        """The next residual stream, what the next layer gets beside it, and what happened."""
        return self.run(self._both, stream, sequence, *carry)

    def _both(
        self, stream: Tensor, sequence: Sequence, selection: Tensor | None, shortcut: Tensor | None
    ) -> tuple[Tensor, Carry, AuxOutputs]:
        losses, routing = {}, None
        if self.mixer is not None:
            stream, selection, losses = self.run_mixer(self._mix, stream, sequence, selection)
        if self.ffn is not None or self.moe is not None:
            stream, shortcut, routing = self.run_ffn(self._feed, stream, sequence, shortcut)
        return stream, Carry(selection, shortcut), AuxOutputs(routing, losses)

    def _mix(
        self, stream: Tensor, sequence: Sequence, selection: Tensor | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """The next stream, the keys that were chosen last, and the mixer's own losses."""
        mixer = self.mixer
        assert mixer is not None, f"{self.names=}"
        x, kept = self.mixer_residual.read(stream)
        mixed = mixer(x, sequence, selection) if mixer.shares_selection else mixer(x, sequence)
        if isinstance(mixed, Tensor):
            mixed = Mixed(mixed)
        selection = selection if mixed.selection is None else mixed.selection
        return self.mixer_residual.write(kept, mixed.out), selection, mixed.losses or {}

    def _feed(
        self, stream: Tensor, sequence: Sequence, joins: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Routing | None]:
        """The next stream, what joins it a layer later, and how tokens were routed."""
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
        if joins is not None:
            parts.append(joins)
        stream = self.ffn_residual.write(kept, parts[0] if len(parts) == 1 else parts[0] + parts[1])
        return stream, shortcut, routing
