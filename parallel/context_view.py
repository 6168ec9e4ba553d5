"""What a mixer sees of rows under the head-tail cut: whole rows of keys, neighbouring keys, and entries.

Letters: B rows, R ranks, c tokens of a chunk, T = 2 c tokens of a row on one rank, S = 2 R c tokens of a row,
U tokens before a chunk, X = 2 B rows of one chunk each, M and N slots of windows of such a row and of a whole
one.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from kernels.document_windows import document_windows
from model.cut import Compression, View
from parallel.axes import Axis
from parallel.chunks import join_chunks, split_chunks, tails_before, whole_row


class _Rows(NamedTuple):
    """Numbers of all tokens of rows, gathered once for the tensors that they are of.

    versions tell whether these were written to since.
    """

    sources: tuple[Tensor, Tensor | None]
    versions: tuple[int, ...]
    position: Int[Tensor, "B S"]
    document: Int[Tensor, "B S"] | None
    views: dict[int | None, View]
    compressions: dict[tuple[int, int, int], Compression]

    def are_of(self, position: Tensor, document: Tensor | None) -> bool:
        """Whether these are the rows of the given tensors."""
        is_same = self.sources[0] is position and self.sources[1] is document
        return is_same and self.versions == _versions(position, document)


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(-1 if x is None or x.is_inference() else x._version for x in tensors)


class ContextView:
    """`view` and `compression` of a head-tail cut along `axis`.

    Positions and documents of the last sequence are kept with all that follows from them: the ranks meet for
    these small numbers once for a sequence, and every layer finds them.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self._rows: _Rows | None = None

    def view(
        self, position: Int[Tensor, "B T"], document: Int[Tensor, "B T"] | None, reach: int | None
    ) -> View:
        """Whole rows for a reach of None; else each chunk a row behind `reach` tokens before it."""
        rows = self._known(position, document)
        if reach not in rows.views:
            rows.views[reach] = self._whole(rows) if reach is None else self._near(rows, reach)
        return rows.views[reach]

    def compression(
        self,
        position: Int[Tensor, "B T"],
        document: Int[Tensor, "B T"] | None,
        length: int,
        stride: int,
        before: int,
    ) -> Compression:
        """Entries are made behind a halo of length - 1 + before tokens and brought together slot by slot."""
        rows = self._known(position, document)
        key = length, stride, before
        if key not in rows.compressions:
            rows.compressions[key] = self._compression(rows, *key)
        return rows.compressions[key]

    def _known(self, position: Tensor, document: Tensor | None) -> _Rows:
        if self._rows is None or not self._rows.are_of(position, document):
            tensors = position, document
            whole = [None if x is None else whole_row(x, self.axis) for x in tensors]
            assert whole[0] is not None
            self._rows = _Rows(tensors, _versions(*tensors), whole[0], whole[1], {}, {})
        return self._rows

    def _starts(self, rows: _Rows) -> Int[Tensor, "2"]:
        # First tokens of this rank's two chunks.
        size, axis = rows.position.shape[1] // (2 * self.axis.size), self.axis
        chunks = axis.rank, 2 * axis.size - 1 - axis.rank
        return torch.tensor(chunks, device=rows.position.device) * size

    def _whole(self, rows: _Rows) -> View:
        size = rows.position.shape[1] // (2 * self.axis.size)
        places = (self._starts(rows)[:, None] + torch.arange(size, device=rows.position.device)).flatten()
        places = places.expand(rows.position.shape[0], -1).contiguous()

        def keys(x: Shaped[Tensor, "B T *E"]) -> Shaped[Tensor, "B S *E"]:
            return whole_row(x, self.axis)

        return View(rows.position, rows.document, places, _same, keys, _same)

    def _near(self, rows: _Rows, reach: int) -> View:
        size = rows.position.shape[1] // (2 * self.axis.size)
        token, is_token = self._tokens(rows, reach)
        position = rows.position[:, token].masked_fill(~is_token, 0).flatten(0, 1)
        if rows.document is None:
            document = torch.where(is_token, 0, -1).expand(rows.position.shape[0], -1, -1).flatten(0, 1)
        else:
            lower = rows.document[:, :1, None] - 1
            document = torch.where(is_token, rows.document[:, token], lower).flatten(0, 1)
        places = torch.arange(reach, reach + size, device=position.device).expand(position.shape[0], -1)
        return View(position, document, places.contiguous(), split_chunks, self._behind(reach), join_chunks)

    def _tokens(self, rows: _Rows, reach: int) -> tuple[Int[Tensor, "2 C"], Bool[Tensor, "2 C"]]:
        """The token of the row at each place of both chunks with `reach` before; False before the row."""
        size = rows.position.shape[1] // (2 * self.axis.size)
        token = self._starts(rows)[:, None] + torch.arange(-reach, size, device=rows.position.device)
        return token.clamp(min=0), token >= 0

    def _behind(self, reach: int) -> Callable[[Tensor], Tensor]:
        def keys(x: Shaped[Tensor, "B T *E"]) -> Shaped[Tensor, "X C *E"]:
            chunks = split_chunks(x)
            if reach == 0:
                return chunks
            return torch.cat((tails_before(x, self.axis, reach), chunks), 1)

        return keys

    def _compression(self, rows: _Rows, length: int, stride: int, before: int) -> Compression:
        reach = length - 1 + before
        size = rows.position.shape[1] // (2 * self.axis.size)
        token, is_token = self._tokens(rows, reach)
        position = rows.position[:, token].masked_fill(~is_token, 0).flatten(0, 1)
        whole, local = (document_windows(x, length, stride) for x in (rows.position, position))
        # A window is the chunk's that holds its last token; there it stands `reach` tokens further right.
        owner = torch.div(whole.last.clamp(min=0), size, rounding_mode="floor")
        slots = local.start.shape[1]
        slot = torch.div(whole.start - owner * size + reach, stride, rounding_mode="floor")
        index = torch.where(whole.is_filled, owner * slots + slot, 0)
        row = torch.arange(index.shape[0], device=index.device)[:, None]
        lines = (row * (2 * self.axis.size * slots) + index).flatten()

        def entries(x: Float[Tensor, "X M *E"]) -> Float[Tensor, "B N *E"]:
            made = whole_row(join_chunks(x), self.axis)
            return made.flatten(0, 1).index_select(0, lines).unflatten(0, index.shape)

        return Compression(whole, local, position, self._behind(reach), entries)


def _same(x: Tensor) -> Tensor:
    return x
