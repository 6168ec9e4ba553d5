"""What each axis of a layout adds to a training step on this machine: time, and bytes beside the least.

`python -m bench.parallel [only=tp2,..] [rounds=5] [key=value]` trains a small hybrid of Gated DeltaNet,
softmax attention and routed experts for some steps on one process, on two at once that know nothing of each
other and have half of the rows each, then on two with each axis alone, over gloo, one thread each. It prints
the seconds of the fastest step, how much that is over the two apart, the part that the same collectives take
by themselves, and the bytes that a rank sends. It writes bench/results/parallel-cpu.json.

least is what a scheme of that kind must move, each thing once: sharded weights gathered once and their
gradients summed once; tokens of every cut layer gathered and scattered, forward and backward; keys and values
of a softmax layer, or the state of a linear one for each of two chunks, and their gradients; tokens to even
choices of experts and back; activations of a stage and their gradients. Ours gathers weights twice where they
are freed after forward.
"""

import json
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from bench.origin import origin
from conf.help import Page, run
from data.loader import Batch
from model.config import Architecture
from parallel.config.degrees import Degrees
from parallel.mesh.axes import open_axes
from parallel.mesh.world import World
from parallel.rehearsal.collective_trace import Collective, CollectiveTrace
from train.config.load import load_config
from train.config.run_config import RunConfig
from train.loop.run import build_state
from train.loop.state import TrainState
from train.loop.step import train_step

LAYOUTS = {
    "one process": Degrees(),
    "shard2": Degrees(dp_shard=2),
    "replicate2": Degrees(dp_replicate=2),
    "tp2": Degrees(tp=2),
    "cp2": Degrees(cp=2),
    "ep2": Degrees(dp_shard=2, ep=2),
    "pp2": Degrees(pp=2),
}
MODEL = (
    "data=text",
    "data.directory=nowhere",
    "data.corpora.documents.source=nowhere",
    "model=qwen3_next_small",
    "model.depth=4",
    "layout.pattern=3*gdn attn",
    "data.sequence_length=512",
    "data.tokenizer.vocab_size=4000",
    "train.global_batch=4",
)
APART = "two apart"
ELEMENT_BYTES = 4
RESULT = Path("bench/results/parallel-cpu.json")


class Cost(NamedTuple):
    """Of one rank: the fastest step, its collectives alone, bytes that it sends, and the calls by kind."""

    step: float
    collectives: float
    sent: int
    calls: dict[str, int]


def main(arguments: list[str]) -> None:
    """Prints and writes the table. Raises ConfigError."""
    own = ("only=", "rounds=")
    given = dict(argument.split("=", 1) for argument in arguments if argument.startswith(own))
    more = [argument for argument in arguments if not argument.startswith(own)]
    names = ["one process", *given["only"].split(",")] if "only" in given else list(LAYOUTS)
    rounds = int(given.get("rounds", "5"))
    rows = {}
    for name in names:
        degrees = LAYOUTS[name]
        keys = [f"parallel.{axis}={degree}" for axis, degree in zip(degrees._fields, degrees, strict=True)]
        # One micro-batch, and two where a pipeline wants them.
        keys.append(f"train.micro_batch={4 // degrees.batch // degrees.pp}")
        config = load_config([*MODEL, *keys, *more], degrees.size)
        costs = on_ranks(config, [degrees] * degrees.size, rounds)
        rows[name] = described(costs, least_bytes(config, degrees), rows.get(APART))
        if name == "one process":
            half = load_config([*MODEL, *more, "train.global_batch=2", "train.micro_batch=2"], 1)
            rows[APART] = described(on_ranks(half, [degrees] * 2, rounds), 0, None)
    show(rows)
    head = origin("gloo, one thread for each of two processes") | {"model": [*MODEL, *more]}
    RESULT.write_text(json.dumps(head | {"layouts": rows}, indent=1) + "\n")


def on_ranks(config: RunConfig, degrees: Sequence[Degrees], rounds: int) -> list[Cost]:
    """The costs of as many processes at once as there are degrees: ranks of one layout, or all alone."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(len(degrees), context) as pool:
        jobs = []
        for number, each in enumerate(degrees):
            rank, store = (number, "store") if each.size > 1 else (0, str(number))
            jobs.append(pool.submit(measure, rank, each, f"{folder}/{store}", config, rounds))
        return [job.result() for job in jobs]


def measure(rank: int, degrees: Degrees, store: str, config: RunConfig, rounds: int) -> Cost:
    """The costs of this rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=degrees.size)
    world = World(rank, degrees.size, torch.device("cpu"), open_axes(degrees, rank))
    state, batch = build_state(config, world), batch_of(config, world)
    train_step(state, batch, config, world)
    with CollectiveTrace() as trace:
        train_step(state, batch, config, world)
    found = Counter(trace.taken())
    steps = [timed(lambda: step(state, batch, config, world)) for _ in range(rounds)]
    joint, links = agreed(found)
    alone = (
        [timed(lambda: replay(joint + links, world)) for _ in range(rounds)] if degrees.size > 1 else [0.0]
    )
    dist.destroy_process_group()
    calls = Counter[str]()
    for call, count in found.items():
        calls[call.kind] += count
    sent = sum(call.sent * count for call, count in found.items())
    return Cost(min(steps), min(alone), sent, dict(calls))


def batch_of(config: RunConfig, world: World) -> Batch:
    """Random tokens for the rows of this rank, one document each."""
    rows, _ = config.rank_rows(world.axes.batch.size)
    shape = (rows, config.data.sequence_length)
    generator = torch.Generator().manual_seed(world.axes.batch.rank)
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
    position = torch.arange(shape[1]).expand(shape).contiguous()
    return Batch(tokens, tokens.roll(-1, 1), torch.zeros_like(tokens), position, torch.arange(rows))


def step(state: TrainState, batch: Batch, config: RunConfig, world: World) -> None:
    """One step of training."""
    train_step(state, batch, config, world)


def timed(call: Callable[[], None]) -> float:
    """Seconds of a call that all ranks begin together."""
    dist.barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def agreed(found: Counter[Collective]) -> tuple[Counter[Collective], Counter[Collective]]:
    """The first rank's calls of all ranks, and this rank's own between two.

    Experts are sent tokens in other numbers by each rank, but a call must have one size.
    """
    links = Counter({call: count for call, count in found.items() if call.kind in ("send", "recv")})
    joint = [found - links]
    dist.broadcast_object_list(joint, 0)
    return joint[0], links


def replay(found: Counter[Collective], world: World) -> None:
    """As many calls of the same kinds and sizes, with nothing in between."""
    groups = {axis.ranks: axis.group for axis in vars(world.axes).values() if hasattr(axis, "group")}
    waits: list[dist.Work | None] = []
    for call, count in found.items():
        group = groups.get(call.ranks) or dist.group.WORLD
        ranks = len(call.ranks)
        whole = torch.zeros(-(-call.bytes // ELEMENT_BYTES // ranks) * ranks)
        part = whole[: whole.numel() // ranks].clone()
        for _ in range(count):
            match call.kind:
                case "all_reduce":
                    dist.all_reduce(whole, group=group)
                case "all_gather":
                    dist.all_gather_into_tensor(whole, part, group=group)
                case "reduce_scatter":
                    dist.reduce_scatter_tensor(part, whole, group=group)
                case "all_to_all":
                    dist.all_to_all_single(torch.empty_like(whole), whole, group=group)
                case "send" | "recv" as kind:
                    # Both ends may name them in another order: what has one size has one tag.
                    begin = dist.isend if kind == "send" else dist.irecv
                    waits.append(begin(whole.clone(), 1 - world.rank, tag=call.bytes))
                case kind:
                    raise AssertionError(f"no replay for {kind}")
    for wait in waits:
        assert wait is not None
        wait.wait()


def least_bytes(config: RunConfig, degrees: Degrees) -> int:
    """Bytes that a rank must send in a step, the mean over ranks; see the module's first lines."""
    architecture, world = config.architecture, World.alone(torch.device("cpu"))
    built = build_state(config_alone(config), world).built
    shapes = {name: parameter.numel() for name, parameter in built.named_parameters()}
    weights = sum(shapes.values())
    experts = sum(size for name, size in shapes.items() if ".experts." in name)
    rows, tokens = config.train.global_batch, config.data.sequence_length
    numbers = rows * tokens * architecture.model.width
    depth = architecture.model.depth
    share = 0.5  # of what two ranks hold together, one sends half to the other
    found = 0.0
    if degrees.dp_shard == 2 or degrees.cp == 2:
        found += share * (weights - experts * (degrees.ep == 2)) * 2
    if degrees.dp_replicate == 2:
        found += 2 * share * weights
    if degrees.tp == 2:
        # Every mixer and shared expert, embedding and head; experts are a data axis of their own.
        found += share * numbers * (4 * depth + 4 * depth + 4) + share * experts * 2
    if degrees.cp == 2:
        found += rows * sum(exchanged(architecture, layer.mixer, tokens) for layer in architecture.layers)
    if degrees.ep == 2:
        found += share * 4 * numbers / 2 * architecture.moe.top_k * depth
    if degrees.pp == 2:
        found += numbers
    return round(found * ELEMENT_BYTES)


def config_alone(config: RunConfig) -> RunConfig:
    """The same model on one process."""
    alone = dict.fromkeys(Degrees._fields, 1)
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=alone)})


def exchanged(architecture: Architecture, mixer: str, tokens: int) -> float:
    """Numbers that one of two ranks sends of a row for a layer, forward and backward."""
    entry = architecture.mixer[mixer]
    grows = entry.cache_bytes(2 * tokens) > entry.cache_bytes(tokens)
    kept = entry.cache_bytes(tokens if grows else 1, element_bytes=ELEMENT_BYTES) / ELEMENT_BYTES
    return 2 * (kept / 2 if grows else 2 * kept)


def described(costs: list[Cost], least: int, apart: dict[str, Any] | None) -> dict[str, Any]:
    """A line of the table, of the slowest rank."""
    step_seconds = max(cost.step for cost in costs)
    return {
        "step_seconds": step_seconds,
        "over_apart": step_seconds / apart["step_seconds"] - 1 if apart else None,
        "collective_seconds": max(cost.collectives for cost in costs),
        "sent": round(sum(cost.sent for cost in costs) / len(costs)),
        "least": least,
        "calls": costs[0].calls,
    }


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Prints the table."""
    head = ("layout", "step s", "over apart", "collectives", "sent MB", "least", "ratio", "calls")
    print("{:12} {:>7} {:>10} {:>11} {:>8} {:>7} {:>6} {}".format(*head))
    for name, row in rows.items():
        over = f"{row['over_apart']:+.0%}" if row["over_apart"] is not None else ""
        ratio = f"{row['sent'] / row['least']:.2f}" if row["least"] else ""
        calls = ", ".join(f"{count} {kind}" for kind, count in sorted(row["calls"].items()))
        print(
            f"{name:12} {row['step_seconds']:7.3f} {over:>10} {row['collective_seconds']:11.3f} "
            f"{row['sent'] / 1e6:8.2f} {row['least'] / 1e6:7.2f} {ratio:>6} {calls}"
        )


if __name__ == "__main__":
    run(main, Page(__doc__ or "", ("python -m bench.parallel", "python -m bench.parallel only=tp2 rounds=3")))
