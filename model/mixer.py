"""The contract of a token mixer: a config that builds, counts and describes it, and a module that runs it.

A mixer is one file in model/mixers/: a MixerConfig with its own literal `kind`, and a Mixer.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union

import torch
from jaxtyping import Float, Int, Shaped
from pydantic import BeforeValidator, Discriminator
from torch import Tensor, nn

import model.mixers
from conf.compose import Config


@dataclass(frozen=True)
class Sequence:
    """Where each token stands: its position in its document, and the document's number in the row.

    document is None when each row is one document, which lets kernels skip masks.
    """

    position: Int[Tensor, "B T"]
    document: Int[Tensor, "B T"] | None
    _tables: dict[tuple[int, float], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @staticmethod
    def whole(tokens: Shaped[Tensor, "B T"]) -> "Sequence":
        """Every row one document, from position 0."""
        position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return Sequence(position, None)

    def rotary_table(self, dim: int, theta: float) -> tuple[Float[Tensor, "B T R"], Float[Tensor, "B T R"]]:
        """Cosines and sines of the rotary angles in float32, R = dim / 2; computed once per sequence."""
        if (dim, theta) not in self._tables:
            exponents = torch.arange(0, dim, 2, device=self.position.device, dtype=torch.float64) / dim
            angles = (self.position[..., None].double() * theta**-exponents).float()
            self._tables[dim, theta] = (angles.cos(), angles.sin())
        return self._tables[dim, theta]


class Split(NamedTuple):
    """How a parameter may be cut over tensor-parallel ranks: along `dim`, between whole units of `unit`.

    `rows` are the lengths of the parts along `dim`, each cut by its own units; None is the whole dim.
    A dim of None keeps a copy on every rank.
    """

    dim: int | None
    unit: str = ""
    rows: tuple[int, ...] | None = None


class Context(NamedTuple):
    """How a mixer works on a sequence that is cut over ranks, and how many tokens it reads to the left.

    gather: keys and values of all ranks are brought together. state: a summary of each chunk is passed on.
    """

    exchange: Literal["gather", "state"]
    halo: int


class Flops(NamedTuple):
    """Forward floating-point operations per token: matrix products with weights, and the mixing itself."""

    projections: float
    core: float


class Mixer(nn.Module, ABC):
    """Mixes along the sequence; everything else in a block works on each token alone."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Float[Tensor, "B T D"]:
        """The mixed tokens; token t sees tokens up to t of its own document."""


class MixerConfig(Config, ABC):
    """Fields of one mixer, and what follows from them without building it.

    A subclass has a field `kind`, a literal of the mixer's name and its own default.
    """

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

    @abstractmethod
    def roles(self, width: int) -> Mapping[str, Split]:
        """For each parameter name of the built module, how it may be cut over tensor-parallel ranks."""

    @property
    @abstractmethod
    def context(self) -> Context:
        """How the mixer works on a sequence cut over ranks."""


@cache
def mixer_kinds() -> dict[str, type[MixerConfig]]:
    """Every mixer config by its kind: the files of model/mixers/."""
    for module in pkgutil.iter_modules(model.mixers.__path__):
        importlib.import_module(f"model.mixers.{module.name}")
    kinds = {}
    for config in _concrete(MixerConfig):
        kinds[config.model_fields["kind"].default] = config
    return dict(sorted(kinds.items()))


def _concrete(base: type[MixerConfig]) -> list[type[MixerConfig]]:
    found = []
    for child in base.__subclasses__():
        found += _concrete(child)
        if "build" not in child.__abstractmethods__:
            found.append(child)
    return found


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
    kinds = tuple(mixer_kinds().values())
    union = Annotated[Union[kinds], Discriminator("kind")]  # noqa: UP007 (the members are found at run time)
    return Annotated[dict[str, union], BeforeValidator(_name_is_kind)]
