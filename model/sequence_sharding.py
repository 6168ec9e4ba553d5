"""How a mixer meets a row of tokens that may be sharded over ranks.

One process holds whole rows, and everything here is the identity. Context parallelism puts another
`SequenceSharding` into the `Sequence`: a rank then holds some chunks of each row, and what a mixer needs of
the others comes through it. A mixer is written once, for both.

Letters: B rows, T tokens of a row on this rank, S tokens that a view reaches, X rows of a view.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from kernels.document_windows import Windows, document_windows
from model.recurrence import Recurrence


@dataclass(frozen=True)
class AttentionView:
    """Queries beside the keys that they may reach, as rows that a kernel takes.

    Of [B T ...] tensors of this rank, `queries` makes [X Q ...], `keys` makes [X S ...], and `restore` makes
    [B T ...] of a kernel's [X Q ...]. position and document are those of the keys; q_index says where the
    queries stand among the keys, ascending in each chunk, None where queries and keys are the same tokens.
    All three functions carry gradients.
    """

    position: Int[Tensor, "X S"]
    document: Int[Tensor, "X S"] | None
    q_index: Int[Tensor, "X Q"] | None
    queries: Callable[[Tensor], Tensor]
    keys: Callable[[Tensor], Tensor]
    restore: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Compression:
    """The complete windows of whole rows, and the rows of this rank whose tokens its own windows lie in.

    Of [B T ...] tensors of this rank, `tokens` makes the [X C ...] that `local` are windows of and `position`
    the positions of; in front of each window of this rank stand the tokens that were asked for. Of the
    entries [X M ...] made of these, by slot of `local`, `entries` makes those of whole rows [B N ...], by
    slot of `whole`; anything in slots without a window. Both functions carry gradients.
    """

    whole: Windows
    local: Windows
    position: Int[Tensor, "X C"]
    tokens: Callable[[Tensor], Tensor]
    entries: Callable[[Tensor], Tensor]


class SequenceSharding(ABC):
    """How the rows of a sequence are sharded over ranks."""

    @abstractmethod
    def view(
        self, position: Int[Tensor, "B T"], document: Int[Tensor, "B T"] | None, reach: int | None
    ) -> AttentionView:
        """What queries meet that reach so many tokens to the left.

        None reaches to the start of the row: then keys are whole rows and queries stay as they are, X = B.
        position and document are those of this rank's tokens. Before the start of a row stand keys in a
        document of their own, at position 0.
        """

    @abstractmethod
    def compression(
        self,
        position: Int[Tensor, "B T"],
        document: Int[Tensor, "B T"] | None,
        length: int,
        stride: int,
        before: int,
    ) -> Compression:
        """Windows as of `document_windows`, made where their last token is, with `before` tokens more."""

    @abstractmethod
    def before(self, x: Float[Tensor, "B T *E"], count: int) -> Float[Tensor, "X U *E"] | None:
        """The U = count tokens before each chunk of `chunks(x)`; None where a row starts there."""

    @abstractmethod
    def chunks(self, x: Tensor) -> Tensor:
        """[B T ...] as [X C ...]: each chunk of consecutive tokens a row of its own."""

    @abstractmethod
    def restore(self, x: Tensor) -> Tensor:
        """[X C ...] back as [B T ...]."""

    @abstractmethod
    def recur(
        self,
        recurrence: Recurrence,
        inputs: tuple[Tensor, ...],
        position: Int[Tensor, "B T"],
        document: Int[Tensor, "B T"] | None,
    ) -> Float[Tensor, "B T *E"]:
        """Outputs of a recurrence of inputs [B T ...] along whole rows; every document starts from zero."""


def _same(x: Tensor) -> Tensor:
    return x


class Unsharded(SequenceSharding):
    """Rows that are whole on this rank."""

    def view(
        self, position: Int[Tensor, "B T"], document: Int[Tensor, "B T"] | None, reach: int | None
    ) -> AttentionView:
        """Queries and keys are the same tokens."""
        return AttentionView(position, document, None, _same, _same, _same)

    def compression(
        self,
        position: Int[Tensor, "B T"],
        document: Int[Tensor, "B T"] | None,
        length: int,
        stride: int,
        before: int,
    ) -> Compression:
        """Tokens and entries are where they belong."""
        windows = document_windows(position, length, stride)
        return Compression(windows, windows, position, _same, _same)

    def before(self, x: Tensor, count: int) -> None:
        """Nothing: rows start here."""
        return

    def chunks(self, x: Tensor) -> Tensor:
        """The rows."""
        return x

    def restore(self, x: Tensor) -> Tensor:
        """The rows."""
        return x

    def recur(
        self,
        recurrence: Recurrence,
        inputs: tuple[Tensor, ...],
        position: Int[Tensor, "B T"],
        document: Int[Tensor, "B T"] | None,
    ) -> Tensor:
        """The recurrence as it is."""
        return recurrence.run(inputs, document, None)[0]


UNSHARDED = Unsharded()
