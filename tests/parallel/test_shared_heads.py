"""Ranks that share a key head, each with some of its query heads, train as one process does."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from parallel.config.degrees import Degrees
from parallel.mesh.axes import Axis
from parallel.mesh.collectives import sum_neighbours
from tests.parallel.equality import LIMIT, Job, Run, compare, config_of, on_rank
from tests.worlds import run_world

MIXERS = ("nsa", "msa", "ssa", "mamba2")
FAULTS = dict.fromkeys(MIXERS, "sums of a group") | {"gdn": "gradients of copies"}


def job_of(mixers: Sequence[str], key_heads: int, degrees: Degrees, dataset: Path, fault: str = "") -> Job:
    """Four query heads each. One block of a choice is free, in rows of many blocks."""
    heads = [f"mixer.{mixer}.num_key_heads={key_heads}" for mixer in mixers]
    keys = ["data.sequence_length=64"]
    keys += [
        f"mixer.{mixer}.{key}" for mixer in ("nsa", "ssa") for key in ("num_blocks=3", "num_local_blocks=1")
    ]
    return Job(config_of(" ".join(mixers), "float64", dataset, *keys, *heads), degrees, fault)


def run_beside_one_process(jobs: list[Job]) -> list[tuple[Run, list[Run]]]:
    """For each job the run of one process, and those of all ranks."""
    (alone,) = run_world(1, on_rank, [Job(job.config, Degrees()) for job in jobs], timeout=400)
    ranks = run_world(jobs[0].degrees.size, on_rank, jobs, timeout=400)
    return list(zip(alone, map(list, zip(*ranks, strict=True)), strict=True))


def assert_equal(jobs: list[Job]) -> None:
    found = [compare(*runs) for runs in run_beside_one_process(jobs)]
    assert not [apart for apart in found if not apart.worst < LIMIT], found


@pytest.mark.prove
def test_fewer_key_heads_than_ranks_equal_one_process(short_documents: Path) -> None:
    jobs = [
        job_of(MIXERS, 2, Degrees(tp=4), short_documents),
        job_of(MIXERS, 1, Degrees(cp=2, tp=2, ep=2), short_documents),
    ]
    assert_equal(jobs)


@pytest.mark.prove
def test_fewer_key_heads_than_ranks_beside_other_axes(short_documents: Path) -> None:
    mixers = (*MIXERS, "attn", "gdn", "moba")
    jobs = [
        job_of(mixers, 2, Degrees(cp=2, tp=4, ep=4), short_documents),
        job_of(mixers, 1, Degrees(dp_shard=2, tp=4, ep=2), short_documents),
        job_of(mixers, 1, Degrees(pp=2, cp=2, tp=2), short_documents),
    ]
    assert_equal(jobs)


def test_a_rank_that_goes_by_its_own_heads_is_seen(short_documents: Path) -> None:
    jobs = [job_of([mixer], 1, Degrees(tp=2), short_documents, fault) for mixer, fault in FAULTS.items()]
    unseen = []
    for mixer, runs in zip(FAULTS, run_beside_one_process(jobs), strict=True):
        try:
            if compare(*runs).worst < LIMIT:
                unseen.append(mixer)
        except AssertionError:
            continue
    assert not unseen


def sums_on_rank(rank: int, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sums over neighbours of numbers that no piece divides, and gradients of each rank's square of them."""
    axis, found = Axis("tp", rank, tuple(range(size)), torch.distributed.group.WORLD), []
    for count in (1, 2, 4):
        x = (torch.arange(6.0, dtype=torch.float64).view(2, 3) + 10**rank).requires_grad_()
        out = sum_neighbours(x[:, :1] * x[0], axis, count)
        (grad,) = torch.autograd.grad(((rank + 1) * out.square()).sum(), x)
        found.append((out.detach(), grad))
    return found


def test_sums_over_neighbours_have_their_adjoint() -> None:
    ranks = run_world(4, sums_on_rank)
    for index, count in enumerate((1, 2, 4)):
        own = [
            (torch.arange(6.0, dtype=torch.float64).view(2, 3) + 10**rank).requires_grad_()
            for rank in range(4)
        ]
        for first in range(0, 4, count):
            group = range(first, first + count)
            out = torch.stack([own[rank][:, :1] * own[rank][0] for rank in group]).sum(0)
            objective = sum((rank + 1) * out.square().sum() for rank in group)
            grads = torch.autograd.grad(objective, [own[rank] for rank in group])
            for rank, grad in zip(group, grads, strict=True):
                # Sums of at most four float64 numbers, all above zero, in another order.
                torch.testing.assert_close(ranks[rank][index], (out.detach(), grad), rtol=1e-14, atol=0.0)
                assert torch.equal(ranks[rank][index][0], ranks[first][index][0])
