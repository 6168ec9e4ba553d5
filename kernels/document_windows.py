"""Windows of tokens aligned to document starts: where they are in packed rows, and which queries see them.

Only complete windows have a slot: all that a query sees before its own block is complete, and its own block
it reads token by token. So a row of T tokens needs T / stride slots, however it is packed.

Letters: B rows, T tokens, N slots, L tokens of a window, C queries, J selecting heads, n selected slots.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Windows(NamedTuple):
    """The complete windows of each row by slot; a window that starts at token s has slot s // stride.

    In a row of one document, slot n is its window n. start: index of the window's first token in the row.
    is_filled: whether the slot holds a window; if not, start means nothing.

    In the methods position is that of each query in its document, and q_index its index in the row, [1 C] or
    [B C]; None is 0, 1, 2, ...
    """

    start: Int[Tensor, "B N"]
    is_filled: Bool[Tensor, "B N"]
    length: int
    stride: int

    @property
    def last(self) -> Int[Tensor, "B N"]:
        """Index of the last token of each window, -1 in slots without one."""
        return torch.where(self.is_filled, self.start + self.length - 1, -1)

    def gather(self, x: Float[Tensor, "B T *E"], *, shift: int = 0) -> Float[Tensor, "B N L *E"]:
        """The tokens of each window, or those `shift` tokens later; any tokens where that leaves the row."""
        rows, tokens = x.shape[:2]
        offsets = torch.arange(shift, shift + self.length, device=x.device)
        index = (self.start[..., None] + offsets).clamp(0, tokens - 1).flatten(1)
        flat = x.reshape(rows, tokens, -1)
        taken = flat.gather(1, index[..., None].expand(-1, -1, flat.shape[2]))
        return taken.view(rows, self.start.shape[1], self.length, *x.shape[2:])

    def is_seen(
        self, position: Int[Tensor, "B C"], q_index: Int[Tensor, "#B C"] | None = None
    ) -> Bool[Tensor, "B C N"]:
        """Whether each query sees the whole window, which is of its document."""
        q_index = _arange(position) if q_index is None else q_index
        doc_start = (q_index - position)[..., None]
        start = self.start[:, None]
        return (
            self.is_filled[:, None] & (start >= doc_start) & (start + self.length <= q_index[..., None] + 1)
        )

    def is_past(
        self, position: Int[Tensor, "B C"], q_index: Int[Tensor, "#B C"] | None = None
    ) -> Bool[Tensor, "B C N"]:
        """Whether each window is of the query's document and before its own block; for stride = length."""
        q_index = _arange(position) if q_index is None else q_index
        doc_start, own_start = q_index - position, q_index - position % self.length
        start = self.start[:, None]
        return self.is_filled[:, None] & (start >= doc_start[..., None]) & (start < own_start[..., None])

    def choose(
        self,
        scores: Float[Tensor, "B C J N"],
        position: Int[Tensor, "B C"],
        q_index: Int[Tensor, "#B C"] | None = None,
        *,
        count: int,
        initial: int = 0,
        local: int = 0,
    ) -> Int[Tensor, "B C J n"]:
        """Slots of the `count` highest-scored blocks before the query's own, -1 where there are fewer.

        The first `initial` blocks of the document and the last `local` ones before the own block go first.
        """
        q_index = _arange(position) if q_index is None else q_index
        is_past = self.is_past(position, q_index)
        doc_start = q_index - position
        number = (self.start[:, None] - doc_start[..., None]) // self.length
        age = (position // self.length)[..., None] - number
        is_forced = (number < initial) | (age <= local)
        scores = scores.masked_fill((is_past & is_forced)[:, :, None], float("inf"))
        return top_slots(scores.masked_fill(~is_past[:, :, None], float("-inf")), count)


def _arange(position: Tensor) -> Tensor:
    return torch.arange(position.shape[1], device=position.device)[None]


def document_windows(position: Int[Tensor, "B T"], length: int, stride: int) -> Windows:
    """The complete windows of `length` tokens that start at each multiple of `stride` in their document.

    position is that of each token in its document; stride is at most length.
    """
    rows, tokens = position.shape
    count, starts = max(0, (tokens - length) // stride + 1), max(0, tokens - length + 1)
    first_position, last_position = position[:, :starts], position[:, length - 1 :]
    # The window is complete if its last token counts on from its first.
    is_start = (first_position % stride == 0) & (last_position - first_position == length - 1)
    padded = torch.nn.functional.pad(is_start, (0, count * stride - starts))
    by_slot = padded.view(rows, count, stride)
    # Starts are at least a stride apart, across documents too: a slot holds one at most.
    offset = by_slot.to(torch.int8).argmax(-1)
    start = torch.arange(0, count * stride, stride, device=position.device) + offset
    return Windows(start, by_slot.any(-1), length, stride)


def top_slots(scores: Float[Tensor, "*Q N"], count: int) -> Int[Tensor, "*Q n"]:
    """Slots of the `count` highest scores, -1 for scores of -inf; of equal scores the first slot."""
    values, slots = scores.sort(dim=-1, descending=True, stable=True)
    is_absent = values[..., :count] == float("-inf")
    return slots[..., :count].masked_fill(is_absent, -1)
