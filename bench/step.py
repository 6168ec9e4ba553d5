"""Times a training step of the small Qwen3-Next, ours and transformers', in turn on the same machine.

`python -m bench.step [key=value]` prints both, the share of the machine's peak, and the ratio, and writes
bench/results/step-DEVICE.json. All have the same weights and read the same tokens; each step is forward,
backward and AdamW. Each runs in a process of its own, set up as its users' runs are, while the others wait.
"""

import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.optim import AdamW

from bench.peers import as_transformers
from conf.errors import exit_on_error
from kernels.cross_entropy import IGNORED
from model.count import count
from model.initial import initialise
from model.language_model import LanguageModel
from parallel.world import open_world
from train.config import RunConfig
from train.load import load_config
from train.measure import measured_peak
from train.track.report import print_table

ROUNDS = 9
OURS, PEER, PEER_FLUSHED = "weft", "transformers", "transformers, denormals flushed"


def main(arguments: list[str]) -> None:
    """Prints and writes the comparison."""
    config = load_config(["moe.balance_loss=0.0", *arguments], 1)
    peak = measured_peak(torch.device("cpu"), torch.float32)
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in (OURS, PEER, PEER_FLUSHED):
        pipes[name], far_end = context.Pipe()
        context.Process(target=work, args=(name, config, far_end), daemon=True).start()
    losses = {name: ask(pipe)[1] for name, pipe in pipes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(ROUNDS):
        for name, pipe in pipes.items():
            seconds[name].append(ask(pipe)[0])
    for pipe in pipes.values():
        pipe.send(False)
    report(config, seconds, losses, peak)


def ask(pipe: Connection) -> tuple[float, float]:
    """Seconds of one more step of that process, and the loss before it."""
    pipe.send(True)
    return pipe.recv()


def work(name: str, config: RunConfig, pipe: Connection) -> None:
    """Makes a step whenever asked, and tells its seconds and loss; ends on False."""
    with ExitStack() as stack:
        if name != PEER:
            stack.enter_context(open_world(config.parallel, 0, 1, 0))
        torch.manual_seed(0)
        ids = torch.randint(config.model.vocab_size, (config.train.global_batch, config.data.sequence_length))
        model = LanguageModel(config.architecture)
        initialise(model, 0)
        if name == OURS:
            step = our_step(model, ids, config)
        else:
            step = their_step(as_transformers(model, "qwen3_next"), ids, config)
        while pipe.recv():
            start = time.perf_counter()
            loss = step()
            pipe.send((time.perf_counter() - start, loss))


def our_step(model: LanguageModel, ids: torch.Tensor, config: RunConfig) -> Callable[[], float]:
    """One step of ours; returns the loss before it."""
    optimizer = AdamW(model.parameters(), config.optim.lr, fused=True)
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)

    def step() -> float:
        loss = model.loss(ids, targets).cross_entropy / (targets != IGNORED).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def their_step(model: torch.nn.Module, ids: torch.Tensor, config: RunConfig) -> Callable[[], float]:
    """One step of theirs; returns the loss before it."""
    optimizer = AdamW(model.parameters(), config.optim.lr, fused=True)
    model.train()

    def step() -> float:
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def report(config: RunConfig, seconds: dict[str, list[float]], losses: dict[str, float], peak: float) -> None:
    """Prints the table and writes the JSON."""
    tokens = config.train.global_batch * config.data.sequence_length
    flops = count(config.architecture).training_flops(config.data.sequence_length) * tokens
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows = {
        name: f"{1e3 * value:,.0f} ms ({min(seconds[name]) * 1e3:,.0f} to "
        f"{max(seconds[name]) * 1e3:,.0f}), {tokens / value:,.0f} tokens/s, {flops / value / peak:.0%} of it"
        for name, value in median.items()
    }
    rows["limit"] = f"{1e3 * flops / peak:,.0f} ms at the {peak / 1e9:,.0f} GFLOP/s of a 1024^3 product here"
    rows["first losses"] = ", ".join(f"{loss:.6f}" for loss in losses.values())
    ratios = {name: median[name] / median[OURS] for name in (PEER, PEER_FLUSHED)}
    rows["weft is faster"] = " and ".join(f"{ratio:.2f}x" for ratio in ratios.values())
    print_table("Training step, small Qwen3-Next", rows)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    result = {
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "tokens_per_step": tokens,
        "flops_per_step": flops,
        "peak_flops": peak,
        "seconds": seconds,
        "median_seconds": median,
        "ratios": ratios,
        "first_losses": losses,
    }
    path = Path("bench/results/step-cpu.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
