"""Expert parallelism by DeepEP: a token travels once to each rank that holds experts of its choice.

Never run on a GPU, and so never with DeepEP's own kernels. Written against Megatron-Core 0.16.1, whose
differentiable calls (megatron.core.transformer.moe.fused_a2a) this drives, and the high-throughput kernels
(deep_ep.Buffer) of DeepEP 1.2.1. Tests run Megatron-Core's calls and what stands here on CPU ranks, over a
double of deep_ep that keeps its documented contract. What only a GPU can show is open: the streams, the
overlap, and the speed.
"""

import socket
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from conf.errors import ConfigError, Violation
from model.moe.dispatch import Compute, Overlapped
from parallel.config.deepep import NODE
from parallel.mesh.axes import Axis
from parallel.mesh.collectives import gathered


class Fused(NamedTuple):
    """Megatron-Core's dispatch and combine; the gradient of each is the other."""

    dispatch: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Any]]
    combine: Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True)
class DeepEP:
    """Dispatch over an axis whose ranks hold `held` experts each, in order.

    No token is dropped. Weights travel with tokens, in float32, and are applied at the experts: what comes
    back is summed over ranks as it is. The host waits once per layer, for the numbers of rows. On a GPU
    tokens leave on `stream`, so that the shared expert computes while they travel, and its gradients while
    theirs do; no parameter is used there, so that all their gradients stay on one stream.

    A layer that is computed again for backward must receive its tokens in the same order: DeepEP 1.2.1 puts
    them by source and slot.
    """

    axis: Axis
    held: int
    scales_input: bool
    fused: Fused
    stream: torch.cuda.Stream | None

    def __call__(
        self,
        x: Float[Tensor, "N D"],
        chosen: Int[Tensor, "N k"],
        weights: Float[Tensor, "N k"],
        run: Compute,
        overlapped: Overlapped,
    ) -> tuple[Float[Tensor, "N D"], Tensor | None]:
        """Weights are applied where the experts are, before them or after, as they want it."""
        experts = self.held * self.axis.size
        # To DeepEP -1 is a choice of no expert.
        ids, x, weights = chosen.masked_fill(chosen >= experts, -1), x.contiguous(), weights.float()
        self._fork()
        beside = overlapped()
        with torch.cuda.stream(self.stream):
            rows, ids, scales, counts, handle = self.fused.dispatch(
                x, ids, weights, experts, self.axis.group, async_finish=True, allocate_on_comm_stream=True
            )
        self._join(rows, ids, scales)
        # The counts of the held experts are on the host; what they sum to needs no wait.
        out = self._at_experts(rows, ids, scales, int(counts.sum()), run)
        out, _ = self.fused.combine(
            out, self.axis.group, handle, async_finish=True, allocate_on_comm_stream=True
        )
        return out, beside

    def _at_experts(
        self,
        rows: Float[Tensor, "M D"],
        ids: Int[Tensor, "M k"],
        scales: Float[Tensor, "M k"],
        total: int,
        run: Compute,
    ) -> Float[Tensor, "M D"]:
        """What the experts held here add to each token that came, of `total` choices of them."""
        is_held = ids >= 0
        choice = torch.nonzero_static(is_held.flatten(), size=total).squeeze(1)
        token, counts = choice // ids.shape[1], is_held.sum(1)
        starts = counts.cumsum(0) - counts
        # A weight that is not taken gets no gradient here, as the ranks' gradients are summed.
        scale = scales.flatten()[choice, None].to(rows.dtype)
        spread = cast(Tensor, _Spread.apply(rows, token, starts))
        spread = spread * scale if self.scales_input else spread
        out = run(spread, ids.flatten()[choice, None], spread.new_ones(total, 1))
        return cast(Tensor, _Collect.apply(out if self.scales_input else out * scale, token, starts))

    def _fork(self) -> None:
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    def _join(self, *arrived: Tensor) -> None:
        if self.stream is not None:
            current = torch.cuda.current_stream(self.stream.device)
            current.wait_stream(self.stream)
            for part in arrived:
                # DeepEP allocates on a stream of its own and knows of this one alone.
                part.record_stream(current)


class _Spread(torch.autograd.Function):
    """x[token], where the rows of a token are neighbours; its gradient is their sum in their order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(starts)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _sum_from(grads[0], *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    """Sums of neighbouring rows: the transpose of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return _sum_from(rows, starts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, *ctx.saved_tensors), None, None


def _sum_from(rows: Float[Tensor, "R D"], starts: Int[Tensor, "M"]) -> Float[Tensor, "M D"]:
    """Sums of the rows from each start to the next, in float32 at least and without a copy of them."""
    slot = torch.arange(rows.shape[0], device=rows.device)
    return embedding_bag(slot, rows.contiguous(), starts, mode="sum")


def open_deepep(axis: Axis, device: torch.device) -> Callable[[Axis, int, bool], DeepEP]:
    """Makes the dispatch of a layer from the axis, the experts held and where weights go. Collective.

    Imports Megatron-Core, for seconds.

    Raises ConfigError where it cannot import deep_ep, and where neighbours on the axis are on other nodes
    than DeepEP takes them to be.
    """
    from megatron.core.transformer.moe import fused_a2a

    if fused_a2a.fused_dispatch is None or fused_a2a.fused_combine is None:
        release = version("megatron-core")
        message = (
            f"deepep: Megatron-Core {release} cannot import deep_ep; see what `python -c 'import deep_ep'` "
            f"says, or set all_to_all"
        )
        raise ConfigError([Violation("parallel.ep_dispatch", message)])
    _check_nodes(axis, device)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    fused = Fused(fused_a2a.fused_dispatch, fused_a2a.fused_combine)
    return partial(DeepEP, fused=fused, stream=stream)


def _check_nodes(axis: Axis, device: torch.device) -> None:
    own = torch.tensor([zlib.crc32(socket.gethostname().encode())], device=device)
    hosts = gathered(own, axis).tolist()
    together = min(axis.size, NODE)
    for first in range(0, axis.size, together):
        if len(set(hosts[first : first + together])) > 1:
            ranks = axis.ranks[first : first + together]
            message = (
                f"parallel.ep_dispatch=deepep wants ranks {ranks[0]} to {ranks[-1]} on one node; start "
                f"multiples of {together} processes on each, or set parallel.ep_dispatch=all_to_all"
            )
            raise ConfigError([Violation("parallel.ep", message)])
