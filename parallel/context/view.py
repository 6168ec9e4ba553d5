"""What a mixer sees of rows under the head-tail sharding: whole rows of keys, neighbouring keys, and entries.

Letters: B rows, R ranks, c tokens of a chunk, T = 2 c tokens of a row on one rank, S = 2 R c tokens of a row,
U tokens before a chunk, X = 2 B rows of one chunk each, M and N slots of windows of such a row and of a whole
one.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from kernels.document_windows import document_windows
from model.sequence_sharding import AttentionView, Compression
from parallel.context.chunks import join_chunks, split_chunks, tails_before, whole_row
from parallel.mesh.axes import Axis


class HeadTailViews:
    """`view` and `compression` of rows of which this rank holds a head-tail sharding along `axis`.

    position and document are those of the whole rows, which the loader gives every rank: nothing is exchanged
    for them. What follows from them is kept, and every layer finds it. What methods are given of this rank's
    tokens, as of any sharding, is a part of these and not looked at.
    """

    def __init__(self, axis: Axis, position: Int[Tensor, "B S"], document: Int[Tensor, "B S"] | None) -> None:
        self.axis = axis
        self._position = position
        self._document = document
        self._views: dict[int | None, AttentionView] = {}
        self._compressions: dict[tuple[int, int, int], Compression] = {}

    def view(
        self, position: Int[Tensor, "B T"], document: Int[Tensor, "B T"] | None, reach: int | None
    ) -> AttentionView:
        """Whole rows for a reach of None; else each chunk a row behind `reach` tokens before it."""
        if reach not in self._views:
            self._views[reach] = self._whole() if reach is None else self._near(reach)
        return self._views[reach]

    def compression(
        self,
        position: Int[Tensor, "B T"],
        document: Int[Tensor, "B T"] | None,
        length: int,
        stride: int,
        before: int,
    ) -> Compression:
        """Entries are made behind a halo of length - 1 + before tokens and brought together slot by slot."""
        key = length, stride, before
        if key not in self._compressions:
            self._compressions[key] = self._compression(*key)
        return self._compressions[key]

    def _starts(self) -> Int[Tensor, "2"]:
        # First tokens of this rank's two chunks.
        size, axis = self._position.shape[1] // (2 * self.axis.size), self.axis
        chunks = axis.rank, 2 * axis.size - 1 - axis.rank
        return torch.tensor(chunks, device=self._position.device) * size

    def _whole(self) -> AttentionView:
        size = self._position.shape[1] // (2 * self.axis.size)
        q_index = (self._starts()[:, None] + torch.arange(size, device=self._position.device)).flatten()
        q_index = q_index.expand(self._position.shape[0], -1).contiguous()

        def keys(x: Shaped[Tensor, "B T *E"]) -> Shaped[Tensor, "B S *E"]:
            return whole_row(x, self.axis)

        return AttentionView(self._position, self._document, q_index, _same, keys, _same)

    def _near(self, reach: int) -> AttentionView:
        size = self._position.shape[1] // (2 * self.axis.size)
        token, is_token = self._tokens(reach)
        position = self._position[:, token].masked_fill(~is_token, 0).flatten(0, 1)
        if self._document is None:
            document = torch.where(is_token, 0, -1).expand(self._position.shape[0], -1, -1).flatten(0, 1)
        else:
            lower = self._document[:, :1, None] - 1
            document = torch.where(is_token, self._document[:, token], lower).flatten(0, 1)
        q_index = torch.arange(reach, reach + size, device=position.device).expand(position.shape[0], -1)
        return AttentionView(
            position, document, q_index.contiguous(), split_chunks, self._behind(reach), join_chunks
        )

    def _tokens(self, reach: int) -> tuple[Int[Tensor, "2 C"], Bool[Tensor, "2 C"]]:
        """The token of the row at each slot of both chunks with `reach` before; False before the row."""
        size = self._position.shape[1] // (2 * self.axis.size)
        token = self._starts()[:, None] + torch.arange(-reach, size, device=self._position.device)
        return token.clamp(min=0), token >= 0

    def _behind(self, reach: int) -> Callable[[Tensor], Tensor]:
        def keys(x: Shaped[Tensor, "B T *E"]) -> Shaped[Tensor, "X C *E"]:
            chunks = split_chunks(x)
            if reach == 0:
                return chunks
            return torch.cat((tails_before(x, self.axis, reach), chunks), 1)

        return keys

    def _compression(self, length: int, stride: int, before: int) -> Compression:
        reach = length - 1 + before
        size = self._position.shape[1] // (2 * self.axis.size)
        token, is_token = self._tokens(reach)
        position = self._position[:, token].masked_fill(~is_token, 0).flatten(0, 1)
        whole, local = (document_windows(x, length, stride) for x in (self._position, position))
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
