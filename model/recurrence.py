"""Linear recurrences along a row, in the parts that a row cut into chunks needs.

A state enters a chunk and another leaves it, an affine map of the first: final = M initial + added. A cut row
runs every chunk by itself, once it knows the state that enters it from the maps of the chunks before.

Letters: X chunks, C tokens of a chunk, H heads (or channels), K key dim, V value dim, *S dims of one head's
state, *M dims of what stands for one head's M, J chunks of a row.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.delta_rule import gated_delta_rule
from kernels.delta_rule.summary import delta_rule_initial_state_grad, delta_rule_summary
from kernels.linear_attention import linear_attention
from kernels.linear_attention.summary import linear_attention_initial_state_grad, linear_attention_summary
from kernels.selective_scan import selective_scan
from kernels.selective_scan.summary import selective_scan_initial_state_grad, selective_scan_summary


class Summary(NamedTuple):
    """The affine map of chunks.

    transition is what stands for M, [X H *M] in the dtype of added, [X H *S], float32 at least. Where a
    document starts in the chunk M is zero, which transition need not say. kept is what `initial_state_grad`
    takes.
    """

    transition: Tensor
    added: Tensor
    kept: tuple[Tensor | None, ...]


class Recurrence(ABC):
    """One kind of recurrence; `inputs` are its tensors per token, [X C ...]."""

    # The family of kernels that computes it.
    family: ClassVar[str]
    # Whether M is a matrix K x K of a head; if not, it is factors of the numbers of the state.
    is_matrix: ClassVar[bool] = False

    @abstractmethod
    def run(
        self, inputs: tuple[Tensor, ...], document: Int[Tensor, "X C"] | None, initial_state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Outputs [X C H ...] and the final states. initial_state is of the document of the first token."""

    @abstractmethod
    def summarize(self, inputs: tuple[Tensor, ...], document: Int[Tensor, "X C"] | None) -> Summary:
        """The affine map of every chunk. No gradients."""

    @staticmethod
    @abstractmethod
    def initial_state_grad(grad_out: Tensor, *kept: Tensor | None) -> Tensor:
        """Gradient of the initial states [X H *S], if none of the final states have any."""

    @abstractmethod
    def factor(self, transition: Float[Tensor, "J h B *M"], heads: slice) -> Tensor:
        """M of some heads: [J h B K K] if it is a matrix, else what [J h B *S] is multiplied with."""


class DeltaRule(Recurrence):
    """`gated_delta_rule` of q, k, v, log_decay, beta."""

    family = "delta_rule"
    is_matrix = True

    def run(
        self, inputs: tuple[Tensor, ...], document: Int[Tensor, "X C"] | None, initial_state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Outputs [X C H V] and final states [X H K V]."""
        q, k, v, log_decay, beta = inputs
        return gated_delta_rule(q, k, v, log_decay, beta, document=document, initial_state=initial_state)

    def summarize(self, inputs: tuple[Tensor, ...], document: Int[Tensor, "X C"] | None) -> Summary:
        """transition is M."""
        q, k, v, log_decay, beta = inputs
        transition, added, reads = delta_rule_summary(q, k, v, log_decay, beta, document=document)
        return Summary(transition, added, (reads,))

    @staticmethod
    def initial_state_grad(grad_out: Tensor, *kept: Tensor | None) -> Tensor:
        """Work is K V per token."""
        (reads,) = kept
        assert reads is not None, "the delta rule keeps what tokens read of the initial state"
        return delta_rule_initial_state_grad(grad_out, reads)

    def factor(self, transition: Float[Tensor, "J h B *M"], heads: slice) -> Tensor:
        """M as it is."""
        return transition


class LinearAttention(Recurrence):
    """`linear_attention` of q, k, v, log_decay."""

    family = "linear_attention"

    def run(
        self, inputs: tuple[Tensor, ...], document: Int[Tensor, "X C"] | None, initial_state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Outputs [X C H V] and final states [X H K V]."""
        q, k, v, log_decay = inputs
        return linear_attention(q, k, v, log_decay, document=document, initial_state=initial_state)

    def summarize(self, inputs: tuple[Tensor, ...], document: Int[Tensor, "X C"] | None) -> Summary:
        """transition is a factor per head or per key channel."""
        q, k, v, log_decay = inputs
        factor, added = linear_attention_summary(k, v, log_decay, document=document)
        return Summary(factor, added, (q, log_decay, document))

    @staticmethod
    def initial_state_grad(grad_out: Tensor, *kept: Tensor | None) -> Tensor:
        """Work is K V per token."""
        q, log_decay, document = kept
        assert q is not None, "linear attention keeps its queries"
        return linear_attention_initial_state_grad(grad_out, q, log_decay, document=document)

    def factor(self, transition: Float[Tensor, "J h B *M"], heads: slice) -> Tensor:
        """Of a head, or of each row of its state."""
        return transition[..., None] if transition.ndim == 4 else transition[..., None, None]


class SelectiveScan(Recurrence):
    """`selective_scan` of x, step, k, q; each channel is a head with a state of K numbers."""

    family = "selective_scan"

    def __init__(self, rate: Float[Tensor, "D K"]) -> None:
        self.rate = rate

    def run(
        self, inputs: tuple[Tensor, ...], document: Int[Tensor, "X C"] | None, initial_state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Outputs [X C D] and final states [X D K]."""
        x, step, k, q = inputs
        return selective_scan(x, step, self.rate, k, q, document=document, initial_state=initial_state)

    def summarize(self, inputs: tuple[Tensor, ...], document: Int[Tensor, "X C"] | None) -> Summary:
        """transition is the sum of the steps, one number for the K of a channel."""
        x, step, k, q = inputs
        steps, added = selective_scan_summary(x, step, self.rate, k, document=document)
        return Summary(steps, added, (step, self.rate.detach(), q, document))

    @staticmethod
    def initial_state_grad(grad_out: Tensor, *kept: Tensor | None) -> Tensor:
        """Work is K per token and channel."""
        step, rate, q, document = kept
        assert step is not None, "the selective scan keeps its steps"
        assert rate is not None, "the selective scan keeps its rates"
        assert q is not None, "the selective scan keeps its queries"
        return selective_scan_initial_state_grad(grad_out, step, rate, q, document=document)

    def factor(self, transition: Float[Tensor, "J h B *M"], heads: slice) -> Tensor:
        """exp(-steps rate) of each number of the state."""
        rate = self.rate.detach()[heads, None]
        return torch.exp(-transition[..., None] * rate.to(transition.dtype))
