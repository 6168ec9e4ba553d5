"""What a linear layer on rows that are cut over ranks sends, and how long that takes, on this machine.

`python -m bench.context [ranks=4] [mixers=gdn,kda,lightning,mamba2,mamba,conv] [tokens=1024,4096]` prints for
each layer and row length: bytes that a rank sends in forward and backward (the most of all ranks), the least
that they could be, and the part of the step that the exchanges take when run by themselves, over gloo.
The least is a chain: every chunk sends one state to the next, and back one gradient, beside the tokens that
convolutions read. It would wait for 2 R - 1 chunks in turn; the scan waits for two exchanges.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conf.compose import compose
from conf.help import Page, run
from model.config import Architecture
from model.initial import initialise
from model.mixer import Mixer, MixerConfig, Sequence
from model.sequence_sharding import AttentionView
from parallel.config.degrees import Degrees
from parallel.context.chunks import cut_row
from parallel.context.sharding import HeadTailSharding
from parallel.mesh.axes import Axis, open_axes

WIDTH, REPEATS, ELEMENT_BYTES = 256, 5, 4


class Sent(NamedTuple):
    """One exchange of this rank: rows sent to and received from each rank, and the shape of a row."""

    parts: list[int]
    received: list[int]
    row: tuple[int, ...]
    dtype: torch.dtype


class Heartbeat(TorchDispatchMode):
    """Keeps every all-to-all that is called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Calls the operation as it is."""
        if func is torch.ops.c10d.alltoall_base_.default:
            _, x, _, received, parts, *_ = args
            self.sent.append(Sent(list(parts), list(received), tuple(x.shape[1:]), x.dtype))
        return func(*args, **(kwargs or {}))


class Chunks(HeadTailSharding):
    """The head-tail cut for mixers that take no view."""

    def view(self, position: Tensor, document: Tensor | None, reach: int | None) -> AttentionView:
        """Raises AssertionError."""
        raise AssertionError("no linear mixer takes a view")


class Job(NamedTuple):
    """One layer and the tokens of a row."""

    name: str
    config: MixerConfig
    tokens: int


class Cost(NamedTuple):
    """Bytes that a rank sends in a step, seconds of the step, and seconds of its exchanges alone."""

    sent: int
    step: float
    exchanges: float


def measure(rank: int, size: int, store: str, jobs: list[Job]) -> list[Cost]:
    """The costs of this rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    axis = open_axes(Degrees(cp=size), rank).cp
    costs = [measure_one(axis, job) for job in jobs]
    dist.destroy_process_group()
    return costs


def measure_one(axis: Axis, job: Job) -> Cost:
    """The fastest of REPEATS steps, and of as many replays of its exchanges."""
    mixer = job.config.build(WIDTH, 0, 2, 0.02)
    initialise(mixer, 0)
    whole = Sequence.whole(torch.zeros(1, job.tokens, dtype=torch.long))
    cut = Chunks(axis, whole.position, None)
    sequence = Sequence(cut_row(whole.position, axis), None, cut_row(whole.tokens, axis), sharding=cut)
    x = torch.randn(1, job.tokens // axis.size, WIDTH, requires_grad=True)
    with Heartbeat() as watch:
        step(mixer, x, sequence)
    seconds = [timed(axis, lambda: step(mixer, x, sequence)) for _ in range(REPEATS)]
    alone = [timed(axis, lambda: replay(watch.sent, axis)) for _ in range(REPEATS)]
    sent = sum(
        (sum(one.parts) - one.parts[axis.rank]) * one.dtype.itemsize * torch.Size(one.row).numel()
        for one in watch.sent
    )
    return Cost(sent, min(seconds), min(alone))


def step(mixer: Mixer, x: Tensor, sequence: Sequence) -> None:
    """Forward and backward."""
    out = mixer(x, sequence)
    assert isinstance(out, Tensor), "linear mixers return the mixed tokens"
    out.sum().backward()


def replay(sent: list[Sent], axis: Axis) -> None:
    """The same exchanges with nothing in between."""
    for one in sent:
        x = torch.zeros(sum(one.parts), *one.row, dtype=one.dtype)
        out = x.new_empty(sum(one.received), *one.row)
        dist.all_to_all_single(out, x, one.received, one.parts, group=axis.group)


def timed(axis: Axis, call: Callable[[], None]) -> float:
    """Seconds of a call that all ranks begin together."""
    dist.barrier(group=axis.group)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def least(config: MixerConfig) -> int:
    """Bytes of a chain, from what decoding keeps of a row: a state in float32 and the convolution's tail."""
    return 2 * 2 * config.cache_bytes(1, element_bytes=ELEMENT_BYTES)


def main(arguments: list[str]) -> None:
    """Prints one line for each layer and row length."""
    options = dict(argument.split("=") for argument in arguments)
    size = int(options.get("ranks", "4"))
    names = options.get("mixers", "gdn,kda,lightning,mamba2,mamba,conv").split(",")
    lengths = [int(tokens) for tokens in options.get("tokens", "1024,4096").split(",")]
    entries: Mapping[str, MixerConfig] = compose([f"model.width={WIDTH}"], Architecture).mixer
    print(
        f"{'layer':10} {'tokens':>7} {'sent':>10} {'least':>10} {'ratio':>6} {'step s':>8} {'exchanges':>9}"
    )
    jobs = [Job(name, entries[name], tokens) for name in names for tokens in lengths]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(size) as pool:
        calls = [(rank, size, f"{folder}/store", jobs) for rank in range(size)]
        ranks = pool.starmap(measure, calls, chunksize=1)
    for job, costs in zip(jobs, zip(*ranks, strict=True), strict=True):
        sent, step, exchanges = (max(values) for values in zip(*costs, strict=True))
        lower = least(job.config)
        print(
            f"{job.name:10} {job.tokens:7} {sent:10,} {lower:10,} {sent / lower:6.2f} {step:8.4f} "
            f"{exchanges / step:9.1%}"
        )


if __name__ == "__main__":
    run(
        main,
        Page(
            __doc__ or "",
            ("python -m bench.context", "python -m bench.context ranks=2 mixers=gdn,kda tokens=4096"),
        ),
    )
