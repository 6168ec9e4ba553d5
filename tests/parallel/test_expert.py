"""What is computed while tokens travel to experts, and while their gradients travel back."""

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.config.degrees import Degrees
from parallel.mesh.axes import open_axes
from parallel.shard.expert import AllToAll
from tests.closeness import assert_close
from tests.worlds import run_world

EXPERTS = 4


class Noted(torch.autograd.Function):
    """x, noting when it is computed, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, events: list[str]) -> Tensor:
        ctx.events = events
        events.append("shared")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.events.append("shared gradient")
        return grads[0], None


class NotedWork:
    """An exchange under way, noting when it is waited for."""

    def __init__(self, work: dist.Work, events: list[str]) -> None:
        self.work, self.events = work, events

    def wait(self) -> None:
        self.work.wait()
        self.events.append("wait")


def on_rank(rank: int, size: int) -> list[str]:
    events: list[str] = []
    stock = dist.all_to_all_single

    def noted(out: Tensor, x: Tensor, *rest: Any, async_op: bool = False, **more: Any) -> Any:
        if out.is_floating_point():
            events.append("start" if async_op else "exchange")
        work = stock(out, x, *rest, async_op=async_op, **more)
        return NotedWork(work, events) if async_op else work

    axis = open_axes(Degrees(dp_shard=size, ep=size), rank).ep
    dispatch = AllToAll(axis, EXPERTS // size, scales_input=False)
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    # The first rank gets most of the rows.
    chosen, weights = torch.tensor([[0, 1]] * 4 + [[0, 3], [2, 1]]), torch.rand(6, 2).double()
    with patch.object(dist, "all_to_all_single", noted):
        routed, shared = dispatch(
            x, chosen, weights, lambda rows, ids, scale: 3.0 * rows, lambda: Noted.apply(x, events)
        )
        assert shared is not None
        (routed.sum() + shared.sum()).backward()
    assert x.grad is not None
    # Every choice comes back three times as large, weighed.
    expected = 3.0 * weights.sum(1, keepdim=True)
    assert_close([routed, x.grad], [expected * x, 1.0 + expected.expand_as(x)], 1e-14)
    return events


def test_shared_experts_are_computed_while_rows_travel() -> None:
    forward = ["start", "shared", "wait", "exchange"]
    backward = ["exchange", "start", "shared gradient", "wait"]
    assert run_world(2, on_rank) == [forward + backward] * 2
