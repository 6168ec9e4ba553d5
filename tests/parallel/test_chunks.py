"""Chunks of rows on many ranks are those of one process, and so are their gradients."""

import pytest
import torch
from torch import Tensor

from parallel.config.degrees import Degrees, grid_lines
from parallel.context.chunks import cut_row, join_chunks, split_chunks, tails_before, whole_row
from parallel.mesh.axes import Axes, open_axes
from parallel.mesh.collectives import exchange, gather, reduce_scatter, sum_over
from tests.worlds import run_world

ROWS, CHUNK = 2, 3


def axes_of(rank: int, degrees: Degrees) -> Axes:
    return open_axes(degrees, rank)


def rows_of(size: int) -> Tensor:
    return torch.randn(ROWS, 2 * size * CHUNK, 4, generator=torch.Generator().manual_seed(1)).double()


def chunked(rank: int, size: int, count: int) -> dict[str, Tensor]:
    axis = axes_of(rank, Degrees(cp=size)).cp
    x = rows_of(size)
    local = cut_row(x, axis).requires_grad_()
    assert torch.equal(join_chunks(split_chunks(local)), local)
    row = whole_row(local, axis)
    tails = tails_before(local, axis, count)
    # Every rank's terms differ, so that an average or a missing sum would show.
    ((rank + 1.0) * (row.square().sum() + (tails * tails.abs()).sum())).backward()
    assert local.grad is not None
    return {"row": row.detach(), "tails": tails.detach(), "grad": whole_row(local.grad, axis)}


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("size", [2, 3])
def test_rows_tails_and_their_gradients(size: int, count: int) -> None:
    found = run_world(size, chunked, count)
    x = rows_of(size).requires_grad_()
    padded = torch.cat((x.new_zeros(ROWS, count, 4), x), 1)
    total = x.new_zeros(())
    for rank in range(size):
        starts = (rank * CHUNK, (2 * size - 1 - rank) * CHUNK)
        tails = torch.stack([padded[:, start : start + count] for start in starts], 1).flatten(0, 1)
        assert torch.equal(found[rank]["tails"], tails)
        assert torch.equal(found[rank]["row"], x)
        total = total + (rank + 1.0) * (x.square().sum() + (tails * tails.abs()).sum())
    total.backward()
    assert x.grad is not None
    for part in found:
        # Ranks add in another order: some roundings of float64.
        torch.testing.assert_close(part["grad"], x.grad, rtol=1e-14, atol=1e-14)


def collected(rank: int, size: int) -> list[Tensor]:
    axis = axes_of(rank, Degrees(dp_shard=size)).dp_shard
    x = torch.arange(12.0, dtype=torch.float64).view(4, 3) + 10 * rank
    sent = [[1, 3], [0, 4]][rank]
    received = [[1, 0], [3, 4]][rank]
    results = []
    for function in (
        lambda part: gather(part, axis, 1),
        lambda part: reduce_scatter(part, axis),
        lambda part: sum_over(part, axis),
        lambda part: exchange(part, axis, sent, received),
    ):
        part = x.clone().requires_grad_()
        out = function(part)
        weight = torch.arange(1.0, out.numel() + 1).double().view_as(out) * (rank + 1)
        (out * weight).sum().backward()
        assert part.grad is not None
        results += [out.detach(), part.grad, x, weight]
    return results


def test_the_adjoint_of_every_collective_is_exact() -> None:
    # <A x, w> summed over ranks is <x, A* w>: the gradient is the adjoint, for all maps that are linear.
    found = run_world(2, collected)
    for start in range(0, len(found[0]), 4):
        forward = sum(float((part[start] * part[start + 3]).sum()) for part in found)
        backward = sum(float((part[start + 1] * part[start + 2]).sum()) for part in found)
        assert forward == pytest.approx(backward, rel=1e-14)


def test_every_rank_is_once_on_every_axis() -> None:
    degrees = Degrees(pp=2, dp_replicate=2, dp_shard=2, cp=2, tp=2, ep=4)
    for along in (("pp",), ("tp",), ("dp_replicate", "dp_shard"), ("dp_shard", "cp")):
        lines = grid_lines(degrees, along)
        assert sorted(rank for line in lines for rank in line) == list(range(32))
    opened = [open_axes(degrees, rank, lambda *_: None) for rank in range(32)]
    for rank, axes in enumerate(opened):
        for name in (
            "pp",
            "dp_replicate",
            "dp_shard",
            "cp",
            "tp",
            "ep",
            "edp",
            "batch",
            "sequence",
            "shard",
            "tokens",
        ):
            axis = getattr(axes, name)
            assert axis.ranks[axis.rank] == rank
            assert all(getattr(opened[peer], name).ranks == axis.ranks for peer in axis.ranks)
        assert (axes.ep.size, axes.edp.size, axes.tokens.size) == (4, 2, 16)
        # Experts are spread over neighbours and copied across them, within one pipeline stage.
        assert len({*axes.ep.ranks} & {*axes.edp.ranks}) == 1
