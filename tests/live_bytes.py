"""Bytes of the storages that a computation makes and that are still in use, counted as they come and go."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts one kind of device while it is entered; tensors that were there before do not count."""

    def __init__(self, before: Iterable[Tensor], device: str = "cpu") -> None:
        super().__init__()
        self._device = device
        self.now = self.peak = 0
        # By the address of a storage's own record, which no other has while it lives.
        self._known = {x.untyped_storage()._cdata: 0 for x in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().device.type == self._device:
                self._count(x.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _count(self, storage: Any) -> None:
        at = storage._cdata
        if at not in self._known:
            self._known[at] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._forget, at)

    def _forget(self, at: int) -> None:
        self.now -= self._known.pop(at)
