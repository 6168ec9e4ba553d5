"""The end of a run: held-out score, plot, result table, text sample."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data.loader import Loader
from data.tokenizer.tokenizer import Tokenizer
from model.count import count
from parallel.mesh.world import World
from parallel.micro_batches import Runner
from parallel.next_token import next_logits
from train.checkpoint.atomic import write_atomically
from train.config.run_config import RunConfig
from train.eval.generate import generate
from train.eval.heldout import Evaluation, evaluate
from train.loop.state import TrainState
from train.track.report import plot_losses, print_table
from train.track.tracker import Tracker

RESULT_FILE, PLOT_FILE = "result.json", "loss.png"


def score(
    state: TrainState,
    loader: Loader,
    config: RunConfig,
    world: World,
    rows: int,
    before_round: Callable[[], None],
) -> Evaluation:
    """The loss of the weights as they are over so many held-out windows; before_round is as in `evaluate`."""
    _, micro = config.rank_rows(world.axes.batch.size)
    options = {"rows": rows, "micro_batch": micro, "mtp_depth": config.model.mtp.depth}
    return evaluate(state.built.runner, loader, world, **options, before_round=before_round)


def finish(
    state: TrainState,
    loader: Loader,
    tracker: Tracker,
    config: RunConfig,
    world: World,
    before_round: Callable[[], None],
) -> None:
    """Scores held-out documents, then rank 0 writes result.json and loss.png and prints both.

    before_round is as in `evaluate`; where it raises nothing is written.
    """
    held_out, rows = None, 0
    if loader.held_out_rows:
        rows = min(config.train.final_rows or loader.held_out_rows, loader.held_out_rows)
        start = time.monotonic()
        held_out = score(state, loader, config, world, rows, before_round)
        tracker.log_evaluation(state.step, held_out._asdict(), time.monotonic() - start)
    text = sample_text(state.built.runner, loader.tokenizer, config, world)
    if world.rank != 0:
        return
    tracker.log_sample(state.step, config.sample.prompt, text)
    directory = Path(config.run.dir)
    result = result_of(state, config, tracker)
    if held_out is not None:
        result |= score_of(held_out, loader, rows)
    write_atomically(directory / RESULT_FILE, (json.dumps(result, indent=2) + "\n").encode())
    plot_losses(tracker.metrics(), tracker.evaluations(), directory / PLOT_FILE)
    print_table("Result", {name: shown(value) for name, value in result.items()})
    print(f"--- sample, temperature {config.sample.temperature} ---\n{text}\n---", flush=True)


def result_of(state: TrainState, config: RunConfig, tracker: Tracker) -> dict[str, float | str]:
    """What the run did."""
    counts = count(config.architecture)
    result: dict[str, float | str] = {
        "run directory": config.run.dir,
        "steps": state.step,
        "tokens": state.tokens,
        "parameters": counts.total,
        "active parameters": counts.active,
    }
    # Lines may have been lost: the rate is that of the steps that have one.
    seconds = [line["seconds"] for line in tracker.metrics() if line["seconds"] is not None]
    if len(seconds) == state.step:
        result["training seconds"] = sum(seconds)
    if sum(seconds) > 0:
        result["tokens per second"] = state.tokens / state.step * len(seconds) / sum(seconds)
    return result


def score_of(held_out: Evaluation, loader: Loader, rows: int) -> dict[str, float | str]:
    """What the run reached on `rows` windows; beside what general compressors reach if these are all."""
    card = loader.card.held_out
    score: dict[str, float | str] = {
        "held-out windows": f"{rows:,} of {loader.held_out_rows:,}",
        "held-out loss (nats per token)": held_out.loss,
        "held-out bits per byte": held_out.bits_per_byte,
    }
    if rows < loader.held_out_rows:
        return score
    return score | {
        "held-out bytes": card.bytes,
        "gzip -9 bits per byte": 8 * card.gzip_bytes / card.bytes,
        "xz -9 bits per byte": 8 * card.xz_bytes / card.bytes,
    }


def shown(value: float | str) -> str:
    """A number as people read it."""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if abs(value) >= 100 else f"{value:.4f}"


def sample_text(runner: Runner, tokenizer: Tokenizer, config: RunConfig, world: World) -> str:
    """The prompt and what the model makes of it, the same on every rank. Collective."""
    prompt = tokenizer.encode(config.sample.prompt.encode())
    # An empty prompt needs something to go on from: what stands before a document, if only the end of one.
    begin = tokenizer.bos if tokenizer.bos is not None else None if prompt.size else tokenizer.eos
    ids = np.concatenate([np.array([] if begin is None else [begin], np.int32), prompt])
    generator = torch.Generator(device=world.device).manual_seed(config.train.seed)
    context = config.data.sequence_length
    continued = generate(
        lambda ids: next_logits(runner, ids, world, context),
        torch.from_numpy(ids.astype(np.int64)).to(world.device),
        tokens=config.sample.tokens,
        temperature=config.sample.temperature,
        end=tokenizer.eos,
        vocabulary=tokenizer.vocab_size,
        context=context,
        generator=generator,
        agreed=lambda chosen: world.gather(chosen)[0],
    )
    return config.sample.prompt + tokenizer.decode(continued.cpu().numpy()).decode(errors="replace")
