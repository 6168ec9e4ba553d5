"""What backward needs of blocks waits in the memory of the host."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks

from model.block import Executor

# A smaller storage is not worth a transfer: to start a copy takes about as long as to copy so much.
LEAST_BYTES = 2**20


@dataclass
class HostCopy:
    """A storage in host memory, and the device that it comes back to.

    back is its last copy there, as long as anybody uses it.
    """

    copy: UInt8[Tensor, "bytes"]
    device: torch.device
    back: "weakref.ref[UntypedStorage] | None" = None

    def fetch(self) -> UntypedStorage:
        """The storage on its device; one copy for all views that are in use at a time."""
        storage = None if self.back is None else self.back()
        if storage is None:
            storage = self.copy.to(self.device, non_blocking=True).untyped_storage()
            self.back = weakref.ref(storage)
        return storage


class OffloadedTensor(NamedTuple):
    """A tensor whose storage is away."""

    away: HostCopy
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Offload:
    """Runs a function so that what it saves for backward is copied to host memory and freed on the device.

    Storages below `least_bytes` and parameters of `owner` stay. A storage moves whole and once, however many
    views of it are saved. Copies are in order with the computation around them; on a GPU the host's memory is
    pinned.
    """

    owner: nn.Module
    inner: Executor
    least_bytes: int = LEAST_BYTES

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """What `inner` gives for the function and its args."""
        if not torch.is_grad_enabled():
            return self.inner(function, *args)
        hooks = Hooks(parameters_of(self.owner), self.least_bytes)
        with saved_tensors_hooks(hooks.pack, hooks.unpack):
            return self.inner(function, *args)


def parameters_of(owner: nn.Module) -> Callable[[], list[nn.Parameter]]:
    """Gives the parameters that the module's parts hold at the time of each call.

    What is gathered is swapped in and out while a block runs, but always in the same parts: they are found
    once, since to walk the tree for every saved tensor takes longer than to compare addresses.
    """
    holders = [part._parameters for part in owner.modules() if part._parameters]
    return lambda: [held for holder in holders for held in holder.values() if held is not None]


@dataclass
class Hooks:
    """What is saved in one run, on its way to the host and back. parameters are those to leave alone."""

    parameters: Callable[[], Iterable[nn.Parameter]]
    least_bytes: int
    # What is already away, by address and version; the reference tells whether it still lies there.
    known: dict[tuple[int, int], tuple["weakref.ref[UntypedStorage]", HostCopy]] = field(default_factory=dict)

    def pack(self, x: Tensor) -> Tensor | OffloadedTensor:
        """x, or what brings it back."""
        storage = x.untyped_storage()
        if storage.nbytes() < max(1, self.least_bytes) or self._is_parameter(storage):
            return x
        key = storage.data_ptr(), x._version
        known = self.known.get(key)
        if known is None or known[0]() is None:
            source = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)
            copy = torch.empty_like(source, device="cpu", pin_memory=x.device.type != "cpu")
            known = weakref.ref(storage), HostCopy(copy.copy_(source, non_blocking=True), x.device)
            self.known[key] = known
        return OffloadedTensor(known[1], x.dtype, int(x.storage_offset()), x.shape, x.stride())

    @staticmethod
    def unpack(packed: Tensor | OffloadedTensor) -> Tensor:
        """The tensor with the strides that it had."""
        if isinstance(packed, Tensor):
            return packed
        away, dtype, *geometry = packed
        return torch.empty(0, dtype=dtype, device=away.device).set_(away.fetch(), *geometry)

    def _is_parameter(self, storage: UntypedStorage) -> bool:
        # Gathered weights are parameters only while their block runs.
        at = storage.data_ptr()
        return any(at == parameter.untyped_storage().data_ptr() for parameter in self.parameters())
