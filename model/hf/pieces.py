"""Where each number of our tensors stands in theirs: one description that reads and writes.

A piece pairs a view of one of our tensors with a view of one of theirs; copying one way imports, the other
way exports. Views only: reshaping, slicing and transposing, so nothing is computed and nothing is kept twice.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from conf.errors import CheckpointError

TensorView = Callable[[Tensor], Tensor]


def whole(x: Tensor) -> Tensor:
    """The tensor itself."""
    return x


class Piece(NamedTuple):
    """`ours_view` of our tensor and `theirs_view` of theirs hold the same numbers in the same shape.

    shape is that of their tensor; None is the shape of our view.
    """

    ours: str
    theirs: str
    ours_view: TensorView = whole
    theirs_view: TensorView = whole
    shape: tuple[int, ...] | None = None


PieceView = Callable[[Piece], Tensor]


def rows(*sizes: int) -> list[TensorView]:
    """A view for each run of rows, in order."""
    views, start = [], 0
    for size in sizes:
        views.append(_rows(start, start + size))
        start += size
    return views


def _rows(start: int, end: int) -> TensorView:
    return lambda x: x[start:end]


def head_rows(heads: int, stride: int, start: int, size: int, *, first: int = 0) -> TensorView:
    """From row `first` on, heads of `stride` rows; of each, `size` rows from `start`."""
    return lambda x: x[first : first + heads * stride].unflatten(0, (heads, stride))[:, start : start + size]


def entry(index: int, then: TensorView = whole) -> TensorView:
    """`then` of one entry along the first dim, such as one expert."""
    return lambda x: then(x[index])


class Mapped:
    """The pieces of a model, found by name, and checked to cover every tensor once on both sides.

    Buffers of ours that no piece names stay as they are.
    """

    def __init__(self, pieces: Iterable[Piece], ours: Mapping[str, Tensor]) -> None:
        """`ours` may be on the meta device: only shapes are read."""
        self.by_theirs: dict[str, list[Piece]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        covered = dict.fromkeys(ours, 0)
        for piece in pieces:
            view = piece.ours_view(ours[piece.ours])
            covered[piece.ours] += view.numel()
            shape = piece.shape or tuple(view.shape)
            assert self.shapes.setdefault(piece.theirs, shape) == shape, f"{piece=}"
            self.by_theirs.setdefault(piece.theirs, []).append(piece)
        wrong = [
            name
            for name, count in covered.items()
            if count != ours[name].numel() and (count or isinstance(ours[name], Parameter))
        ]
        assert not wrong, f"tensors of ours that are not covered once: {wrong}"
        self.uncovered = [name for name, count in covered.items() if not count]
        for name, parts in self.by_theirs.items():
            blank = torch.empty(self.shapes[name], device="meta")
            count = sum(part.theirs_view(blank).numel() for part in parts)
            assert count == blank.numel(), f"{name} is not covered once: {count} of {blank.numel()}"

    def read(self, name: str, theirs: Tensor, ours: Mapping[str, Tensor]) -> None:
        """Copies one of their tensors into ours. Mutates ours.

        Raises CheckpointError for another shape.
        """
        expected = self.shapes[name]
        if tuple(theirs.shape) != expected:
            raise CheckpointError(f"{name}: shape {tuple(theirs.shape)}, expected {expected}")
        for piece in self.by_theirs[name]:
            piece.ours_view(ours[piece.ours]).copy_(piece.theirs_view(theirs))

    def by_ours(self) -> dict[str, dict[str, list[Piece]]]:
        """For each of our tensors the pieces of it, by the tensor of theirs that holds them."""
        found: dict[str, dict[str, list[Piece]]] = {}
        for name, parts in self.by_theirs.items():
            for piece in parts:
                found.setdefault(piece.ours, {}).setdefault(name, []).append(piece)
        return found

    def dtype_of(
        self,
        name: str,
        ours: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        float32: Collection[str] = (),
    ) -> torch.dtype:
        """The dtype that `write` gives one of their tensors. `ours` may be on the meta device."""
        parts = self.by_theirs[name]
        widest = reduce(torch.promote_types, [ours[part.ours].dtype for part in parts])
        if dtype is None or not widest.is_floating_point:
            return widest
        is_kept = any(part.ours in float32 for part in parts)
        return torch.promote_types(dtype, torch.float32) if is_kept else dtype

    def write(
        self,
        name: str,
        ours: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        float32: Collection[str] = (),
        view: PieceView | None = None,
    ) -> Tensor:
        """One of their tensors, made from ours, whose widest dtype it has, or `dtype` if that is given.

        Of tensors of ours that `float32` names it has float32 at least. Where a `view` is given, it gives
        what a piece takes of ours, and `ours` may be on the meta device.
        """
        theirs = torch.empty(self.shapes[name], dtype=self.dtype_of(name, ours, dtype, float32))
        for piece in self.by_theirs[name]:
            own = piece.ours_view(ours[piece.ours]) if view is None else view(piece)
            piece.theirs_view(theirs).copy_(own)
        return theirs
