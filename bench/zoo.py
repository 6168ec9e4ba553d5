"""Trains every small model for a few steps on this machine, one after the other.

`python -m bench.zoo [steps=30] [only=NAME,NAME]` prints a table (loss at start and end, speed) and writes
bench/results/zoo-cpu.json. The default corpus must have been prepared (`python -m data.prepare`).
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from conf.compose import group_options
from conf.errors import WeftError
from conf.help import Page, run
from train.config.load import load_config

RESULT = Path("bench/results/zoo-cpu.json")


def main(arguments: list[str]) -> None:
    """Prints and writes the table. Raises WeftError when a model does not learn."""
    given = dict(argument.split("=", 1) for argument in arguments)
    steps = int(given.get("steps", "30"))
    chosen = given["only"].split(",") if "only" in given else None
    names = [name for name in group_options("model") if name.endswith("_small")]
    rows = [measure(name, steps) for name in names if chosen is None or name in chosen]
    show(rows)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({"device": device(), "steps": steps, "models": rows}, indent=1) + "\n")
    stuck = [row["model"] for row in rows if not row["last_loss"] < row["first_loss"]]
    if stuck:
        raise WeftError(f"the loss did not fall: {', '.join(stuck)}")


def measure(name: str, steps: int) -> dict[str, Any]:
    """A run of one model, from its metrics: means over the first and the last five steps."""
    with tempfile.TemporaryDirectory() as directory:
        overrides = [f"model={name}", f"train.steps={steps}", "track=disabled", "sample.tokens=0"]
        overrides += [f"run.dir={directory}/run", f"train.evaluate_every={steps}", "train.final_rows=4"]
        overrides += ["train.global_batch=2", "data.sequence_length=256", "schedule.warmup_steps=5"]
        config = load_config(overrides, 1)
        ended = subprocess.run(
            [sys.executable, "-m", "train", *overrides], capture_output=True, text=True, check=False
        )
        if ended.returncode:
            raise WeftError(f"{name}: exit {ended.returncode}\n{ended.stderr[-2000:]}")
        lines = [json.loads(line) for line in (Path(directory) / "run" / "metrics.jsonl").open()]
    seconds = statistics.median(line["seconds"] for line in lines[5:])
    tokens = config.train.global_batch * config.data.sequence_length
    return {
        "model": name,
        "first_loss": statistics.mean(line["loss"] for line in lines[:5]),
        "last_loss": statistics.mean(line["loss"] for line in lines[-5:]),
        "tokens_per_second": tokens / seconds,
        "milliseconds_per_step": 1e3 * seconds,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Small models, {device()}")
    for column in ("model", "first loss", "last loss", "tokens/s", "ms per step"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        numbers = (f"{row['first_loss']:.3f}", f"{row['last_loss']:.3f}")
        speed = (f"{row['tokens_per_second']:,.0f}", f"{row['milliseconds_per_step']:,.0f}")
        table.add_row(row["model"], *numbers, *speed)
    Console().print(table)


def device() -> str:
    """What the figures were measured on."""
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


if __name__ == "__main__":
    run(
        main,
        Page(
            __doc__ or "",
            ("python -m bench.zoo", "python -m bench.zoo steps=30 only=mixtral_small,olmoe_small"),
        ),
    )
