"""Times a training step of the small Qwen3-Next, ours and transformers', in turn on the same machine.

`python -m bench.step [key=value]` prints both, the share of the machine's peak, and the ratio, and writes
bench/results/step-DEVICE.json. Both models have the same weights and read the same tokens; each step is
forward, backward and AdamW.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.optim import AdamW

from bench.peers import build_qwen3_next
from conf.errors import exit_on_error
from model.count import count
from model.hf.qwen3_next import import_weights
from model.initial import initialise
from model.language_model import LanguageModel
from train.config import RunConfig
from train.load import load_config
from train.measure import measured_peak
from train.track.report import print_table

ROUNDS = 7


def main(arguments: list[str]) -> None:
    """Prints and writes the comparison."""
    config = load_config(["moe.balance_loss=0.0", *arguments], 1)
    rows, length = config.train.global_batch, config.data.sequence_length
    torch.manual_seed(0)
    ids = torch.randint(config.model.vocab_size, (rows, length))
    theirs = build_qwen3_next(config.architecture)
    ours = LanguageModel(config.architecture)
    initialise(ours, 0)
    ours.load_state_dict(import_weights(theirs.state_dict(), config.architecture))
    steps = {"weft": our_step(ours, ids, config), "transformers": their_step(theirs, ids, config)}
    losses = {name: step() for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    report(config, seconds, losses, rows * length)


def our_step(model: LanguageModel, ids: torch.Tensor, config: RunConfig) -> Callable[[], float]:
    """One step of ours; returns the loss before it."""
    optimizer = AdamW(model.parameters(), config.optim.lr, fused=True)
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)

    def step() -> float:
        loss = model.loss(ids, targets).cross_entropy / (targets != -100).sum()
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


def report(config: RunConfig, seconds: dict[str, list[float]], losses: dict[str, float], tokens: int) -> None:
    """Prints the table and writes the JSON."""
    peak = measured_peak(torch.device("cpu"), torch.float32)
    flops = count(config.architecture).training_flops(config.data.sequence_length) * tokens
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = median["transformers"] / median["weft"]
    rows = {
        name: f"{1e3 * value:,.0f} ms ({min(seconds[name]) * 1e3:,.0f} to "
        f"{max(seconds[name]) * 1e3:,.0f}), {tokens / value:,.0f} tokens/s, {flops / value / peak:.0%} of it"
        for name, value in median.items()
    }
    rows["limit"] = f"{1e3 * flops / peak:,.0f} ms at the {peak / 1e9:,.0f} GFLOP/s of a 1024^3 product here"
    rows["first losses"] = ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items())
    rows["ratio"] = f"{ratio:.2f}x"
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
        "ratio": ratio,
        "first_losses": losses,
    }
    path = Path("bench/results/step-cpu.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
