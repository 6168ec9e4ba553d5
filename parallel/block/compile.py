"""What blocks do to each token alone becomes one compiled graph per method, by torch.compile.

Modules name such methods in `fusible`. Between them everything runs as without a compiler: kernels of the
mixers, dispatch to experts, exchanges between ranks, hooks of data and tensor parallelism. A method that
does not become one whole graph is an error; nothing falls back. Where no gradients are taken, in evaluation
and sampling, methods run as they are: rows have any length there.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from model.block import Block

# What torch.compile takes: the name of a compiler, or a function of a graph and its example inputs.
Backend: TypeAlias = str | Callable[..., Any]


class Group(NamedTuple):
    """Methods that share what is compiled: of the same part of blocks with mixers of the same name."""

    part: str
    mixer: str
    owner: type[nn.Module]
    method: str


@dataclass(frozen=True)
class Fused:
    """A method of one module, compiled where gradients are taken."""

    owner: nn.Module
    plain: Callable[..., Any]
    compiled: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """What the method gives."""
        run = self.compiled if torch.is_grad_enabled() else self.plain
        return run(self.owner, *args)


@dataclass(frozen=True)
class Fuser:
    """Replaces methods by compiled ones. Layers of one kind share a graph."""

    backend: Backend = "inductor"
    groups: dict[Group, Callable[..., Any]] = field(default_factory=dict)

    def __call__(self, model: nn.Module) -> None:
        """Of all its blocks. Mutates them, not their parameters or their names."""
        for block in model.modules():
            if isinstance(block, Block):
                self._fuse(block)

    def _fuse(self, block: Block) -> None:
        for part, module in block.named_modules():
            # Layers with the same mixer have the same modules; nothing else of a block depends on the layer.
            mixer = block.names.mixer if part.startswith("mixer.") or part == "mixer" else ""
            for method in getattr(module, "fusible", ()):
                plain = getattr(type(module), method)
                group = Group(part, mixer, type(module), method)
                if group not in self.groups:
                    self.groups[group] = self._compiled(plain, group)
                setattr(module, method, Fused(module, plain, self.groups[group]))

    def _compiled(self, plain: Callable[..., Any], group: Group) -> Callable[..., Any]:
        own = own_copy(plain, f"{group.owner.__name__}_{group.method}_{group.mixer or group.part}")
        return torch.compile(own, fullgraph=True, dynamic=False, backend=self.backend)


def own_copy(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same function with code of its own.

    What is compiled is kept, and counted against a limit of eight, by the code: methods that many classes of
    layers share would use the limit up together.
    """
    assert isinstance(function, FunctionType), f"{function=}"
    code = function.__code__.replace(co_name=name.replace(".", "_"))
    copy = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def fused_methods(modules: Iterable[nn.Module]) -> Iterator[Fused]:
    """Every compiled method of the modules."""
    for module in modules:
        for method in getattr(module, "fusible", ()):
            if isinstance(fused := vars(module).get(method), Fused):
                yield fused


def describe(modules: Iterable[nn.Module]) -> str:
    """One line that says what is compiled and how often it is there; the rest is not."""
    names = Counter(fused.plain.__qualname__ for fused in fused_methods(modules))
    parts = ", ".join(f"{name} x {count}" if count > 1 else name for name, count in sorted(names.items()))
    return f"compiled, one graph each: {parts or 'nothing, the blocks have no such methods'}"
