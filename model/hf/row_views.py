"""What a piece takes of one of our tensors, read by the rows that it touches and no others."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from model.hf.pieces import Piece

# Rows `first` to `stop` of one of our tensors by its name, in one piece of memory; a scalar is one row.
ReadRows = Callable[[str, int, int], Tensor]


class RowViews:
    """The `view` of `Mapped.write` where our tensors are elsewhere, such as in the files of a checkpoint."""

    def __init__(self, ours: Mapping[str, Tensor], read: ReadRows) -> None:
        """`ours` may be on the meta device: only shapes are read."""
        self._shapes = {name: tensor.shape for name, tensor in ours.items()}
        self._read = read

    def __call__(self, piece: Piece) -> Tensor:
        """The same numbers as `piece.ours_view` of the whole tensor, in the same shape."""
        # Where a view lies in its tensor shows on one without memory.
        blank = torch.empty(self._shapes[piece.ours], device="meta")
        view = piece.ours_view(blank)
        is_view = view.untyped_storage()._cdata == blank.untyped_storage()._cdata
        assert is_view, f"{piece=} makes a copy of ours"
        width = math.prod(blank.shape[1:])
        start = int(view.storage_offset())
        if view.numel() == 0:
            return self._read(piece.ours, 0, 0).new_empty(view.shape)
        last = start + sum((size - 1) * step for size, step in zip(view.shape, view.stride(), strict=True))
        first, stop = start // width, last // width + 1
        found = self._read(piece.ours, first, stop)
        return found.as_strided(view.shape, view.stride(), start - first * width)
