"""Multi-token prediction: each module predicts one token further than the one before it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kernels.cross_entropy import IGNORED
from model.block import AuxOutputs, Block, Carry
from model.config import Architecture
from model.layout import Layer
from model.linear import Linear
from model.mixer import Sequence, ShiftedTokens
from model.residual import build_collapse, build_norm, open_streams


class MTPModule(nn.Module):
    """Predicts one token further: a projection of hidden state and next embedding, a block, a norm.

    DeepSeek-V3, arXiv 2412.19437 equations 21 to 23; embedding and head are the model's own.
    """

    def __init__(self, config: Architecture, offset: int) -> None:
        super().__init__()
        shape, settings = config.model, config.model.mtp
        self.puts_hidden_first = settings.puts_hidden_first
        self.embed_norm = build_norm(shape.width, config.residual)
        self.hidden_norm = build_norm(shape.width, config.residual)
        self.in_proj = Linear(2 * shape.width, shape.width, shape.init_std)
        self.block = Block(config, shape.depth + offset, Layer(settings.mixer, settings.ffn))
        self.residual = config.residual
        self.collapse = build_collapse(shape.width, config.residual)
        self.norm = build_norm(shape.width, config.residual)

    def forward(
        self, hidden: Float[Tensor, "B T D"], embedded: Float[Tensor, "B T D"], sequence: Sequence
    ) -> tuple[Float[Tensor, "B T D"], AuxOutputs]:
        """What the head reads to predict one token further than `hidden` does.

        embedded are the tokens that `hidden` predicts.
        """
        parts = [self.embed_norm(embedded), self.hidden_norm(hidden)]
        if self.puts_hidden_first:
            parts.reverse()
        stream = open_streams(self.in_proj(torch.cat(parts, dim=-1)), self.residual)
        stream, _, aux = self.block(stream, sequence, Carry())
        return self.norm(stream if self.collapse is None else self.collapse(stream)), aux


def shift_rows(
    tokens: Int[Tensor, "B T"],
    targets: Int[Tensor, "B T"],
    document: Int[Tensor, "B T"] | None,
    offset: int,
) -> ShiftedTokens:
    """What whole rows have `offset` tokens later; targets are IGNORED where the document ends before."""
    shifted = torch.full_like(targets, IGNORED)
    shifted[:, :-offset] = targets[:, offset:]
    if document is not None:
        same = document[:, offset:] == document[:, :-offset]
        shifted[:, :-offset] = shifted[:, :-offset].masked_fill(~same, IGNORED)
    # The last tokens of a row have no next one here; nothing is predicted from them.
    return ShiftedTokens(tokens.roll(-offset, dims=1), shifted)
