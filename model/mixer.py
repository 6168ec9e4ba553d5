"""The contract of a token mixer: a config that builds, counts and describes it, and a module that runs it.

A mixer is one file in model/mixers/: a MixerConfig with its own literal `kind`, and a Mixer.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import BeforeValidator
from torch import Tensor, nn

import model.mixers
from conf.compose import Config
from conf.kinds import kinds_in, one_of
from model.rotary import RotaryScaling, rotary_table
from model.sequence_sharding import UNSHARDED, AttentionView, Compression, SequenceSharding
from model.tensor_shards import ALL_HEADS, HeadShards


class ShiftedTokens(NamedTuple):
    """For each token the one some tokens later in the row, and what is to be predicted there."""

    tokens: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]


@dataclass(frozen=True)
class Sequence:
    """The tokens, each one's position in its document, and the document's number in the row.

    document is None when each row is one document, which lets kernels skip masks. tokens are the ids, for
    what goes by them. uniform is a random number in [0, 1), new for each training step and the same for all
    layers and ranks, for what goes by chance; None outside training. sharding says which tokens of the rows
    are on this rank; all else is of this rank's tokens. shifted is what MTP modules read, where it does not
    follow from these tokens alone.
    """

    position: Int[Tensor, "B T"]
    document: Int[Tensor, "B T"] | None
    tokens: Int[Tensor, "B T"]
    uniform: float | None = None
    shifted: tuple[ShiftedTokens, ...] = ()
    _tables: dict[tuple[int, float, RotaryScaling | None], tuple[Tensor, Tensor]] = field(
        default_factory=dict, repr=False
    )
    sharding: SequenceSharding = UNSHARDED

    @staticmethod
    def whole(tokens: Int[Tensor, "B T"]) -> "Sequence":
        """Every row one document, from position 0."""
        position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return Sequence(position, None, tokens)

    def view(self, reach: int | None = None) -> AttentionView:
        """Queries beside the keys of so many tokens to the left; None reaches to the start of the row."""
        return self.sharding.view(self.position, self.document, reach)

    def compression(self, length: int, stride: int, before: int = 0) -> Compression:
        """The complete windows of the documents; an entry reads `before` tokens before its window."""
        return self.sharding.compression(self.position, self.document, length, stride, before)

    def rotary_table(
        self, dim: int, theta: float, scaling: RotaryScaling | None = None
    ) -> tuple[Float[Tensor, "B T R"], Float[Tensor, "B T R"]]:
        """Cosines and sines of the rotary angles in float32, R = dim / 2; computed once per sequence."""
        key = (dim, theta, scaling)
        if key not in self._tables:
            self._tables[key] = rotary_table(self.position, *key)
        return self._tables[key]


class TPShard(NamedTuple):
    """How a parameter may be sharded over tensor-parallel ranks: along `dim`, between whole units.

    `rows` are the lengths of the parts along `dim`, each cut by its own units; None is the whole dim.
    A dim of None keeps a copy on every rank.
    """

    dim: int | None
    rows: tuple[int, ...] | None = None


class Flops(NamedTuple):
    """Forward floating-point operations per token: matrix products with weights, and the mixing itself."""

    projections: float
    core: float


class Mixed(NamedTuple):
    """What a mixer returns when it has more to say than the mixed tokens.

    losses: training losses of its own by name, summed over tokens, coefficients included. selection: for each
    query the indices in the row of the k keys that it chose, -1 where there are fewer, for layers that share
    them.
    """

    out: Float[Tensor, "B T D"]
    losses: dict[str, Float[Tensor, ""]] | None = None
    selection: Int[Tensor, "B T k"] | None = None


class Mixer(nn.Module, ABC):
    """Mixes along the sequence; everything else in a block works on each token alone."""

    # Set from outside where other ranks hold other heads of the same tokens.
    head_shards: HeadShards = ALL_HEADS

    # Methods that a compiler may take as one graph each; modules inside may name theirs too. They work on
    # tensors and each token alone, exchange nothing, and call no mixer kernel and no other module that needs
    # full precision: what others put around such calls would be in the graph.
    fusible: ClassVar[tuple[str, ...]] = ()

    # Whether forward takes the selection of an earlier layer as its third argument.
    shares_selection = False

    @abstractmethod
    def forward(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Float[Tensor, "B T D"] | Mixed:
        """The mixed tokens; token t sees tokens up to t of its own document."""


class MixerConfig(Config, ABC):
    """Fields of one mixer, and what follows from them without building it.

    A subclass has a field `kind`, a literal of the mixer's name and its own default.
    """

    # Fields that count what tensor parallelism shares out, and those of which ranks may share one.
    sharded_fields: ClassVar[tuple[str, ...]] = ()
    replicable_fields: ClassVar[tuple[str, ...]] = ()

    def per_rank(self, degree: int) -> "MixerConfig":
        """The config of what one of `degree` ranks of the tensor axis computes.

        Raises ValueError where the degree does not fit, with the degrees that do.
        """
        legal = [n for n in range(1, self._most_ranks() + 1) if self._can_be_cut(n)]
        if degree not in legal:
            counts = ", ".join(
                f"{name} {getattr(self, name)}" for name in (*self.sharded_fields, *self.replicable_fields)
            )
            raise ValueError(f"{degree} ranks cannot share {counts}; legal are {', '.join(map(str, legal))}")
        parts = {
            name: max(1, getattr(self, name) // degree)
            for name in (*self.sharded_fields, *self.replicable_fields)
        }
        return self.model_copy(update=parts)

    def kv_replicas(self, degree: int) -> int:
        """How many neighbouring ranks of `degree` have the same one of what ranks may share."""
        return max([1, *(degree // getattr(self, name) for name in self.replicable_fields)])

    def _most_ranks(self) -> int:
        return min((getattr(self, name) for name in self.sharded_fields), default=1)

    def _can_be_cut(self, degree: int) -> bool:
        counts = (getattr(self, name) for name in self.replicable_fields)
        is_even = all(getattr(self, name) % degree == 0 for name in self.sharded_fields)
        return is_even and all(count % degree == 0 or degree % count == 0 for count in counts)

    @abstractmethod
    def build(self, width: int, layer: int, depth: int, init_std: float) -> Mixer:
        """The module for absolute layer index `layer` of `depth`."""

    @abstractmethod
    def count_params(self, width: int) -> int:
        """Number of parameters of the built module."""

    @abstractmethod
    def flops(self, width: int, context: int) -> Flops:
        """Useful forward operations per token, averaged over a sequence of `context` tokens."""

    @abstractmethod
    def cache_bytes(self, context: int, *, element_bytes: int = 2) -> int:
        """Bytes that decoding keeps for one sequence of `context` tokens; states are float32."""

    @abstractmethod
    def activation_bytes(self, width: int, *, element_bytes: int = 2) -> int:
        """Bytes per token that a training step keeps for backward, norms and residual left out."""

    def cut_activation_bytes(self, *, element_bytes: int = 2) -> int:
        """Bytes per token that it keeps beyond `activation_bytes` where rows are sharded over ranks."""
        return 0

    @abstractmethod
    def tp_plan(self, width: int) -> Mapping[str, TPShard]:
        """For each parameter name of the built module, how it may be sharded over tensor-parallel ranks."""

    @property
    @abstractmethod
    def context_exchange(self) -> Literal["gather", "state"]:
        """What the mixer does on a sequence sharded over ranks.

        gather: keys and values of all ranks are brought together. state: each chunk's summary is passed on.
        """

    @property
    def selection(self) -> Literal["makes", "reads"] | None:
        """Whether the module chooses keys that later layers may share, or reads the last choice."""
        return None

    @property
    def losses(self) -> tuple[str, ...]:
        """The names of the losses that the module reports in training."""
        return ()


@cache
def mixer_kinds() -> dict[str, type[MixerConfig]]:
    """Every mixer config by its kind: the files of model/mixers/."""
    return kinds_in(model.mixers, MixerConfig)


def _name_is_kind(entries: Any) -> Any:
    # An entry without a kind is of the kind that it is named after.
    if not isinstance(entries, Mapping):
        return entries
    return {
        name: {"kind": name, **entry} if isinstance(entry, Mapping) else entry
        for name, entry in entries.items()
    }


def mixer_entries_type() -> Any:
    """The pydantic type of the `mixer` node: names to configs, told apart by `kind`."""
    return Annotated[dict[str, one_of(mixer_kinds())], BeforeValidator(_name_is_kind)]
