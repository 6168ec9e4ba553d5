"""The language model: embedding, blocks, norm, head, and MTP modules."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kernels.cross_entropy import LossOptions
from model.block import AuxOutputs, Block, Carry
from model.config import Architecture
from model.initial import float32_names
from model.layout import DENSE, NONE, Layer
from model.linear import Initial
from model.mixer import Sequence
from model.moe.router import Router
from model.mtp import MTPModule, shift_rows
from model.residual import build_collapse, build_norm, open_streams
from model.tensor_shards import UnshardedVocab, VocabShards


class Losses(NamedTuple):
    """Sums, not means: whoever knows the global counts divides.

    cross_entropy is summed over targets, in nats; mtp is that of each MTP module, over its own targets.
    logit_z, of the head and then of each MTP module, is what large logits cost: numbers without a gradient,
    which is in that of the losses that the logits were made for. auxiliary are the other losses by name,
    summed over tokens and layers, coefficients included. load [layers E] and entropy [layers] are those of
    the mixtures of experts, detached.
    """

    cross_entropy: Float[Tensor, ""]
    mtp: Float[Tensor, "P"]
    logit_z: Float[Tensor, "P1"]
    auxiliary: dict[str, Float[Tensor, ""]]
    load: Float[Tensor, "M E"]
    entropy: Float[Tensor, "M"]

    def parts(self) -> list[Tensor]:
        """All tensors, in an order of their own."""
        heads = [self.cross_entropy, self.mtp, self.logit_z]
        return [*heads, self.load, self.entropy, *self.auxiliary.values()]

    def with_parts(self, parts: list[Tensor]) -> "Losses":
        """The same with other tensors, in the order of `parts`."""
        cross_entropy, mtp, logit_z, load, entropy, *rest = parts
        auxiliary = dict(zip(self.auxiliary, rest, strict=True))
        return Losses(cross_entropy, mtp, logit_z, auxiliary, load, entropy)


class Embedding(nn.Module):
    """A vector for each token id."""

    def __init__(self, vocab_size: int, width: int, init_std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        self.initial = {"weight": Initial("normal", 0.0, init_std)}


class LMHead(Embedding):
    """A vector for each token id, whose product with a hidden state is that token's logit."""

    def __init__(self, vocab_size: int, width: int, init_std: float) -> None:
        super().__init__(vocab_size, width, init_std)
        self.initial = {"weight": self.initial["weight"]._replace(is_decayed=True)}


class ModelPart(nn.Module):
    """Neighbouring layers of a decoder, with the embedding before the first and the head after the last.

    A plain single-device module; `dtype` is what it computes in. Names of parameters, and what depends on
    the depth, are those of the whole model. A part that ends the model holds a copy of the embedding where
    the head or a MTP module reads it.
    """

    def __init__(
        self, config: Architecture, dtype: torch.dtype = torch.float32, layers: Items[int] | None = None
    ) -> None:
        """`layers` are all by default, ascending; a rehearsal leaves out some that are like others."""
        super().__init__()
        self.config, self.dtype = config, dtype
        # Set from outside where ranks share out the vocabulary.
        self.vocabulary: VocabShards = UnshardedVocab()
        shape, residual = config.model, config.residual
        self.layers = range(shape.depth) if layers is None else layers
        self.is_first, self.is_last = self.layers[0] == 0, self.layers[-1] == shape.depth - 1
        size = (shape.vocab_size, shape.width, shape.init_std)
        reads_embedding = self.is_last and (shape.has_tied_embeddings or shape.mtp.depth > 0)
        self.embed = Embedding(*size) if self.is_first or reads_embedding else None
        self.blocks, names = nn.ModuleList(), config.layers
        for layer in self.layers:
            self.blocks.add_module(str(layer), Block(config, layer, names[layer]))
        self.collapse = build_collapse(shape.width, residual) if self.is_last else None
        self.norm = build_norm(shape.width, residual) if self.is_last else None
        self.head = LMHead(*size) if self.is_last and not shape.has_tied_embeddings else None
        offset = range(shape.mtp.depth if self.is_last else 0)
        self.mtp = nn.ModuleList(MTPModule(config, index) for index in offset)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ModelPart":
        """Every cast and move of torch's goes through here; what is declared float32 is never narrowed."""
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        kept = [tensors[name] for name in float32_names(self)]
        ids = {id(x) for tensor in kept for x in (tensor, tensor.grad)}

        def widened(x: Tensor) -> Tensor:
            y = fn(x)
            if id(x) not in ids or y.dtype == x.dtype:
                return y
            return x.to(y.device, torch.promote_types(y.dtype, torch.float32))

        return super()._apply(widened, recurse)

    def part_loss(
        self, stream: Float[Tensor, "B P *n D"] | None, targets: Int[Tensor, "B T"], sequence: Sequence
    ) -> tuple[Float[Tensor, "B P *n D"] | None, Losses]:
        """What the next part reads, None after the last, and the losses of this part as sums.

        stream is what the part before made, None before the first. Losses that arise elsewhere are zero.
        load and entropy have rows for this part's mixtures of experts alone.
        """
        stream, outputs = self._run(stream, sequence)
        depth = self.config.model.mtp.depth
        if not self.is_last:
            zero = stream.new_zeros((), dtype=torch.promote_types(stream.dtype, torch.float32))
            mtp, logit_z = zero.expand(depth), zero.expand(1 + depth)
            return stream, Losses(zero, mtp, logit_z, *_collected(outputs, zero))
        x = self._close(stream)
        predictions = [self._cross_entropy(x, targets)]
        for offset, module in enumerate(self.mtp, 1):
            assert isinstance(module, MTPModule), f"{type(module)=}"
            if sequence.shifted:
                shifted = sequence.shifted[offset - 1]
            else:
                shifted = shift_rows(sequence.tokens, targets, sequence.document, offset)
            x, aux = module(x, self._embed(shifted.tokens), sequence)
            outputs.append(aux)
            predictions.append(self._cross_entropy(x, shifted.targets))
        (cross_entropy, *mtp), logit_z = zip(*predictions, strict=True)
        ahead = torch.stack(mtp) if mtp else cross_entropy.new_zeros(0)
        collected = _collected(outputs, cross_entropy)
        return None, Losses(cross_entropy, ahead, torch.stack(logit_z), *collected)

    def _cross_entropy(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        form = LossOptions(self.config.model.logit_cap, self.config.model.z_loss)
        loss, z = self.vocabulary.cross_entropy(x, self._head_weight(), targets, form)
        return loss - z, z

    def _embed(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B P D"]:
        assert self.embed is not None, f"{self.layers=}"
        x = self.vocabulary.embed(tokens, self.embed.weight).to(self.dtype)
        scale = self.config.model.embedding_scale
        return x if scale == 1.0 else x * scale

    def _run(self, stream: Tensor | None, sequence: Sequence) -> tuple[Tensor, list[AuxOutputs]]:
        x = open_streams(self._embed(sequence.tokens), self.config.residual) if stream is None else stream
        carry, outputs = Carry(), []
        for block in self.blocks:
            x, carry, aux = block(x, sequence, carry)
            outputs.append(aux)
        return x, outputs

    def _close(self, stream: Float[Tensor, "B P *n D"]) -> Float[Tensor, "B P D"]:
        assert self.norm is not None, f"{self.layers=}"
        return self.norm(stream if self.collapse is None else self.collapse(stream))

    def _head_weight(self) -> Float[Tensor, "V D"]:
        table = self.embed if self.head is None else self.head
        assert table is not None, f"{self.layers=}"
        return table.weight.to(self.dtype)

    def part_logits(
        self,
        stream: Float[Tensor, "B P *n D"] | None,
        sequence: Sequence,
        pick: Callable[[Float[Tensor, "B P D"]], Tensor],
    ) -> Tensor:
        """What the next part reads; after the last one logits, of the hidden states that `pick` gives.

        stream is as in `part_loss`. Where ranks share out the vocabulary the logits are those that are here.
        """
        return self._logits(stream, sequence, pick)

    # Apart from the public one, which FSDP2 wraps as it does forward: one must not be called in the other.
    def _logits(self, stream: Tensor | None, sequence: Sequence, pick: Callable[[Tensor], Tensor]) -> Tensor:
        stream, _ = self._run(stream, sequence)
        if not self.is_last:
            return stream
        logits, cap = pick(self._close(stream)) @ self._head_weight().T, self.config.model.logit_cap
        return logits if cap is None else cap * (logits / cap).tanh()

    def routers(self) -> Iterator[Router]:
        """The routers in order of depth, those of the MTP modules last."""
        for block in [*self.blocks, *(module.block for module in self.mtp)]:
            assert isinstance(block, Block), f"{type(block)=}"
            if block.moe is not None:
                yield block.moe.router

    def update_expert_biases(self, load: Float[Tensor, "M E"]) -> None:
        """Moves every router's bias by its load over the whole global batch. Mutates the biases."""
        if self.config.moe.bias_rate:
            for router, counts in zip(self.routers(), load, strict=True):
                router.update_bias(counts)


class LanguageModel(ModelPart):
    """A decoder over tokens: all of its layers."""

    def forward(self, tokens: Int[Tensor, "B T"], sequence: Sequence | None = None) -> Float[Tensor, "B T V"]:
        """Logits of the next token at every position. Without `sequence` every row is one document."""
        return self._logits(None, sequence or Sequence.whole(tokens), lambda x: x)

    def loss(
        self, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"], sequence: Sequence | None = None
    ) -> Losses:
        """The training losses as sums. Targets of -100 count nothing."""
        return self.part_loss(None, targets, sequence or Sequence.whole(tokens))[1]


def loss_names(config: Architecture) -> list[str]:
    """The names of the auxiliary losses that a model has in training, sorted."""
    offset = config.model.mtp
    layers = [*config.layers, *[Layer(offset.mixer, offset.ffn)] * offset.depth]
    names = {name for layer in layers if layer.mixer != NONE for name in config.mixer[layer.mixer].losses}
    if any(layer.ffn not in (DENSE, NONE) for layer in layers):
        names |= {"balance", "router_z"}
    return sorted(names)


def _collected(outputs: list[AuxOutputs], like: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Auxiliary losses by name, loads and entropies of all layers."""
    auxiliary: dict[str, list[Tensor]] = {}
    routings = [aux.routing for aux in outputs if aux.routing is not None]
    for name, part in ((name, part) for aux in outputs for name, part in aux.losses.items()):
        auxiliary.setdefault(name, []).append(part)
    if not routings:
        sums = {name: torch.stack(parts).sum() for name, parts in auxiliary.items()}
        return sums, like.new_zeros(0, 0), like.new_zeros(0)
    auxiliary["balance"] = [routing.balance_loss for routing in routings]
    auxiliary["router_z"] = [routing.z_loss for routing in routings]
    sums = {name: torch.stack(parts).sum() for name, parts in auxiliary.items()}
    load = torch.stack([routing.load for routing in routings])
    return sums, load, torch.stack([routing.entropy for routing in routings])
