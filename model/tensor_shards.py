"""Who has the other heads of a mixer, and the other rows of the vocabulary: nobody, in one process."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding

from kernels.cross_entropy import LossOptions, linear_cross_entropy


@runtime_checkable
class HeadShards(Protocol):
    """Who has the other heads of a mixer that is cut over ranks."""

    @property
    def rank(self) -> int:
        """Which share of the heads is here."""
        ...

    @property
    def size(self) -> int:
        """Into how many shares the heads are cut."""
        ...

    @property
    def kv_replicas(self) -> int:
        """How many neighbouring shares have the same key head, each with other query heads of its group."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """x summed over the shares; so is its gradient."""
        ...

    def sum_kv_replicas(self, x: Tensor) -> Tensor:
        """x summed over the ranks that replicate a key head; so is its gradient. All shares must call."""
        ...

    def join(self, x: Tensor, dim: int) -> Tensor:
        """The x of all shares along a dim, in order, without a gradient."""
        ...


class AllHeads:
    """All heads are here."""

    rank, size, kv_replicas = 0, 1, 1

    def sum(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def sum_kv_replicas(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def join(self, x: Tensor, dim: int) -> Tensor:
        """x itself."""
        return x


ALL_HEADS = AllHeads()


@runtime_checkable
class VocabShards(Protocol):
    """How tokens become vectors, and hidden states losses."""

    def embed(self, tokens: Int[Tensor, "B T"], weight: Float[Tensor, "M D"]) -> Float[Tensor, "B P D"]:
        """The embeddings of the tokens that are here."""
        ...

    def cross_entropy(
        self,
        x: Float[Tensor, "B P D"],
        weight: Float[Tensor, "M D"],
        targets: Int[Tensor, "B T"],
        form: LossOptions,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """`linear_cross_entropy` of the tokens that are here."""
        ...


class UnshardedVocab:
    """All tokens and the whole vocabulary are here."""

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """One row for each token."""
        return embedding(tokens, weight)

    def cross_entropy(
        self, x: Tensor, weight: Tensor, targets: Tensor, form: LossOptions
    ) -> tuple[Tensor, Tensor]:
        """Over all tokens."""
        return linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), form)
