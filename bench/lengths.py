"""Times training steps of one device at several lengths of rows, plain and compiled.

`python -m bench.step lengths=4096,32768,131072 [key=value]` prints tokens per second, the share of the
device's peak and the memory for each length, and writes bench/results/lengths-DEVICE.json. Steps are those of
a run: loss, backward, clipping, AdamW. Each length runs in a process of its own, one after the other.
"""

import json
import multiprocessing
import statistics
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.origin import origin
from bench.synthetic import train_on_rows
from model.count import count
from parallel.mesh.world import open_world
from train.config.load import load_config
from train.config.run_config import RunConfig
from train.loop.measure import measured_peak
from train.track.report import print_table

WARM, TIMED = 3, 7
# What one device holds of Qwen3-Next-80B with its moments: a period of layers, an eighth of the experts.
SLICE = (
    "model=qwen3_next_80b_a3b",
    "model.depth=4",
    "moe.num_experts=64",
    "model.mtp.depth=0",
    "precision=bf16",
)
PLAIN, COMPILED = "weft", "weft, parallel.compile=true"
FORMS = {PLAIN: "false", COMPILED: "true"}


def main(lengths: list[int], overrides: list[str]) -> None:
    """Prints and writes the table. Raises ConfigError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak, found = 0.0, {}
    chosen = [] if any(override.startswith("model=") for override in overrides) else SLICE
    for tokens in lengths:
        keys = (f"data.sequence_length={tokens}", "train.global_batch=1", "train.micro_batch=1")
        found[tokens] = {}
        for form, is_compiled in FORMS.items():
            config = load_config([*chosen, *keys, f"parallel.compile={is_compiled}", *overrides], 1)
            peak = peak or measured_peak(device, getattr(torch, config.precision.compute))
            found[tokens][form] = measure(config, peak)
            print_table(f"{tokens:,} tokens in a row, {form}", readable(found[tokens][form]))
    name = torch.cuda.get_device_name().lower().replace(" ", "-") if device.type == "cuda" else "cpu"
    threads = f"{torch.get_num_threads()} threads"
    head = origin("one device", torch.cuda.get_device_name()) if device.type == "cuda" else origin(threads)
    path = Path(f"bench/results/lengths-{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    described = head | {"model": [*chosen, *overrides], "peak_flops": peak, "lengths": found}
    path.write_text(json.dumps(described, indent=1) + "\n")


def measure(config: RunConfig, peak: float) -> dict[str, Any]:
    """Figures of one length; `failed` names what went wrong where it could not run, as for want of memory."""
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=work, args=(config, far))
    process.start()
    far.close()
    try:
        answer = near.recv()
    except EOFError:
        answer = "ended without a word"
    process.join()
    if isinstance(answer, str):
        return {"failed": f"{answer}; exit {process.exitcode}"}
    seconds, losses, gib = answer
    tokens = config.train.global_batch * config.data.sequence_length
    flops = count(config.architecture).training_flops(config.data.sequence_length) * tokens
    median = statistics.median(seconds)
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / median,
        "share_of_peak": flops / median / peak,
        "flops_per_step": flops,
        "memory_gib": gib,
        "losses": losses,
    }


def work(config: RunConfig, pipe: Connection) -> None:
    """Sends the seconds of the steps after the first, all losses, and the most memory held."""
    with open_world(config.parallel, 0, 1, 0) as world:
        try:
            found = list(train_on_rows(config, world, WARM + TIMED))
        except torch.OutOfMemoryError as error:
            pipe.send(str(error).splitlines()[0])
            return
        held = psutil.Process().memory_info().rss
        if world.device.type == "cuda":
            held = torch.cuda.max_memory_allocated()
    pipe.send(([one.seconds for one in found[WARM:]], [one.loss for one in found], held / 2**30))


def readable(figures: dict[str, Any]) -> dict[str, str]:
    """Rows of a table."""
    if "failed" in figures:
        return {"failed": figures["failed"]}
    seconds = figures["seconds"]
    return {
        "step": f"{1e3 * statistics.median(seconds):,.0f} ms ({1e3 * min(seconds):,.0f} to "
        f"{1e3 * max(seconds):,.0f})",
        "tokens per second": f"{figures['tokens_per_second']:,.0f}",
        "share of peak": f"{figures['share_of_peak']:.1%}",
        "memory": f"{figures['memory_gib']:.1f} GiB",
        "losses": f"{figures['losses'][0]:.4f} to {figures['losses'][-1]:.4f}",
    }
