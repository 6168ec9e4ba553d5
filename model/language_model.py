"""The language model: embedding, blocks, norm, head."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding

from kernels.cross_entropy import linear_cross_entropy
from model.block import Block
from model.config import Architecture
from model.linear import Initial, RMSNorm
from model.mixer import Sequence
from model.moe.layer import Moe
from model.moe.router import Router, Routing


class Losses(NamedTuple):
    """Sums, not means: whoever knows the global counts divides.

    cross_entropy is summed over targets, in nats. balance is summed over rows and layers, coefficient
    included. load [layers E] and entropy [layers] are those of the mixtures of experts, detached.
    """

    cross_entropy: Float[Tensor, ""]
    balance: Float[Tensor, ""]
    load: Float[Tensor, "M E"]
    entropy: Float[Tensor, "M"]


class Table(nn.Module):
    """A vocabulary-sized matrix: the embedding, or the head."""

    def __init__(self, vocab_size: int, width: int, init_std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        self.initial = {"weight": Initial("normal", 0.0, init_std)}


class LanguageModel(nn.Module):
    """A decoder over tokens. A plain single-device module; `dtype` is what it computes in."""

    def __init__(self, config: Architecture, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        shape = config.model
        self.embed = Table(shape.vocab_size, shape.width, shape.init_std)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(shape.depth))
        residual = config.residual
        is_zero_centered = residual.has_zero_centered_norm
        self.norm = RMSNorm(shape.width, residual.norm_eps, is_zero_centered=is_zero_centered)
        self.head = (
            None if shape.has_tied_embeddings else Table(shape.vocab_size, shape.width, shape.init_std)
        )

    def forward(self, tokens: Int[Tensor, "B T"], sequence: Sequence | None = None) -> Float[Tensor, "B T V"]:
        """Logits of the next token at every position. Without `sequence` every row is one document."""
        x, _ = self._hidden(tokens, sequence)
        return x @ self._head_weight().T

    def loss(
        self, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"], sequence: Sequence | None = None
    ) -> Losses:
        """The training losses as sums. Targets of -100 count nothing."""
        x, routings = self._hidden(tokens, sequence)
        cross_entropy = linear_cross_entropy(x.flatten(0, 1), self._head_weight(), targets.flatten())
        if not routings:
            zero = cross_entropy.new_zeros(())
            return Losses(cross_entropy, zero, zero.new_zeros(0, 0), zero.new_zeros(0))
        balance = torch.stack([routing.balance_loss for routing in routings]).sum()
        load = torch.stack([routing.load for routing in routings])
        entropy = torch.stack([routing.entropy for routing in routings])
        return Losses(cross_entropy, balance, load, entropy)

    def _hidden(
        self, tokens: Int[Tensor, "B T"], sequence: Sequence | None
    ) -> tuple[Float[Tensor, "B T D"], list[Routing]]:
        sequence = sequence or Sequence.whole(tokens)
        x = embedding(tokens, self.embed.weight).to(self.dtype)
        routings = []
        for block in self.blocks:
            x, routing = block(x, sequence)
            if routing is not None:
                routings.append(routing)
        return self.norm(x), routings

    def _head_weight(self) -> Float[Tensor, "V D"]:
        table = self.embed if self.head is None else self.head
        return table.weight.to(self.dtype)

    def routers(self) -> Iterator[Router]:
        """The routers in order of depth."""
        for block in self.blocks:
            assert isinstance(block, Block), f"{type(block)=}"
            if isinstance(block.ffn, Moe):
                yield block.ffn.router

    def update_expert_biases(self, load: Float[Tensor, "M E"]) -> None:
        """Moves every router's bias by its load over the whole global batch. Mutates the biases."""
        if self.config.moe.bias_rate:
            for router, counts in zip(self.routers(), load, strict=True):
                router.update_bias(counts)
