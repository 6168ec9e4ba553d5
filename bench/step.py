"""Times a training step of small models, ours plain and compiled and transformers', in turn on one machine.

`python -m bench.step [only=NAME,NAME] [key=value]` prints all, the share of the machine's peak, and the
ratios for each model, and writes bench/results/step-cpu.json. All have the same weights and read the same
tokens; each step is forward, backward and AdamW. Each runs in a process of its own, set up as its users' runs
are, while the others wait. With lengths=4096,32768 it times one device at such lengths: bench.lengths.
"""

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW

from bench import lengths
from bench.origin import origin
from bench.peers import as_transformers
from conf.help import Page, run
from kernels.cross_entropy import IGNORED
from model.count import count
from model.initial import initialise
from model.language_model import LanguageModel
from parallel.block.compile import Fuser
from parallel.mesh.world import open_world
from train.config.load import load_config
from train.config.run_config import RunConfig
from train.loop.measure import measured_peak
from train.track.report import print_table

ROUNDS = 9
OWN = ("only", "lengths")
OURS, COMPILED = "weft", "weft, parallel.compile=true"
PEER, PEER_FLUSHED = "transformers", "transformers, denormals flushed"
SIDES = (OURS, COMPILED, PEER, PEER_FLUSHED)
# Transformers has no MTP modules, and turns whole heads in MiniMax-Text-01.
SAME = ("moe.balance_loss=0.0", "model.mtp.depth=0")
MODELS = {
    "qwen3_next_small": ("qwen3_next", ()),
    "deepseek_v3_2_small": ("deepseek_v32", ()),
    "deepseek_v4_flash_small": ("deepseek_v4", ()),
    "kimi_linear_small": ("kimi_linear", ()),
    "minimax_text_01_small": ("minimax", ("mixer.attn.rotary_dim=${mixer.attn.head_dim}",)),
}


def main(arguments: list[str]) -> None:
    """Prints and writes the comparison. Raises ConfigError."""
    given = {name: value for name, _, value in (a.partition("=") for a in arguments) if name in OWN}
    overrides = [argument for argument in arguments if argument.partition("=")[0] not in OWN]
    if "lengths" in given:
        lengths.main([int(tokens) for tokens in given["lengths"].split(",")], overrides)
        return
    names = given["only"].split(",") if "only" in given else list(MODELS)
    peak = measured_peak(torch.device("cpu"), torch.float32)
    results = {}
    for name in names:
        model_type, same = MODELS[name]
        config = load_config([f"model={name}", *SAME, *same, *overrides], 1)
        results[name] = compare(name, config, model_type, peak)
    summary = {
        name: f"{1e3 * result['median_seconds'][OURS]:,.0f} ms, transformers "
        f"{1e3 * result['median_seconds'][PEER]:,.0f} ms: {result['ratios'][PEER]:.2f}x, "
        f"compiled {result['ratios'][COMPILED]:.2f}x"
        for name, result in results.items()
    }
    print_table("Training steps", summary)
    path = Path("bench/results/step-cpu.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(described(peak) | {"models": results}, indent=1) + "\n")


def compare(name: str, config: RunConfig, model_type: str, peak: float) -> dict[str, Any]:
    """Seconds of every step of each, in turn."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for side in SIDES:
        pipes[side], far_end = context.Pipe()
        context.Process(target=work, args=(side, config, model_type, far_end), daemon=True).start()
    losses = {side: ask(pipe)[1] for side, pipe in pipes.items()}
    seconds: dict[str, list[float]] = {side: [] for side in pipes}
    for _ in range(ROUNDS):
        for side, pipe in pipes.items():
            seconds[side].append(ask(pipe)[0])
    for pipe in pipes.values():
        pipe.send(False)
    return report(name, config, seconds, losses, peak)


def ask(pipe: Connection) -> tuple[float, float]:
    """Seconds of one more step of that process, and the loss before it."""
    pipe.send(True)
    return pipe.recv()


def work(side: str, config: RunConfig, model_type: str, pipe: Connection) -> None:
    """Makes a step whenever asked, and tells its seconds and loss; ends on False."""
    with ExitStack() as stack:
        if side != PEER:
            stack.enter_context(open_world(config.parallel, 0, 1, 0))
        torch.manual_seed(0)
        ids = torch.randint(config.model.vocab_size, (config.train.global_batch, config.data.sequence_length))
        model = LanguageModel(config.architecture)
        initialise(model, 0)
        if side == COMPILED:
            Fuser()(model)
        if side in (OURS, COMPILED):
            step = our_step(model, ids, config)
        else:
            step = their_step(as_transformers(model, model_type), ids, config)
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


def report(
    name: str, config: RunConfig, seconds: dict[str, list[float]], losses: dict[str, float], peak: float
) -> dict[str, Any]:
    """Prints the table of one model and returns its figures."""
    tokens = config.train.global_batch * config.data.sequence_length
    flops = count(config.architecture).training_flops(config.data.sequence_length) * tokens
    median = {side: statistics.median(values) for side, values in seconds.items()}
    rows = {
        side: f"{1e3 * value:,.0f} ms ({min(seconds[side]) * 1e3:,.0f} to "
        f"{max(seconds[side]) * 1e3:,.0f}), {tokens / value:,.0f} tokens/s, {flops / value / peak:.0%} of it"
        for side, value in median.items()
    }
    rows["limit"] = f"{1e3 * flops / peak:,.0f} ms at the {peak / 1e9:,.0f} GFLOP/s of a 1024^3 product here"
    rows["first losses"] = ", ".join(f"{loss:.6f}" for loss in losses.values())
    ratios = {side: median[side] / median[OURS] for side in SIDES if side != OURS}
    rows["times of plain weft"] = ", ".join(f"{side} {ratio:.2f}" for side, ratio in ratios.items())
    print_table(f"Training step, {name}", rows)
    return {
        "tokens_per_step": tokens,
        "flops_per_step": flops,
        "seconds": seconds,
        "median_seconds": median,
        "ratios": ratios,
        "first_losses": losses,
    }


def described(peak: float) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        **origin(f"{torch.get_num_threads()} threads"),
        "peak_flops": peak,
    }


if __name__ == "__main__":
    run(
        main,
        Page(
            __doc__ or "",
            (
                "python -m bench.step",
                "python -m bench.step only=qwen3_next_small",
                "python -m bench.step lengths=4096,32768",
            ),
        ),
    )
