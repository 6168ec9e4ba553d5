"""Held-out loss and bits per byte against sums over the documents themselves, in every layout."""

import gzip
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from data.token_file import TokenFile
from parallel.config.degrees import Degrees
from parallel.mesh.axes import open_axes
from parallel.mesh.world import World
from tests.parallel.equality import config_of, fill, laid_out
from tests.worlds import run_world
from train.config.run_config import RunConfig
from train.eval.heldout import Evaluation, evaluate
from train.loop.report import score_of
from train.loop.run import build_state, open_data

# Where a value of a parameter matters: what is written into the stream is zero, so that logits depend on the
# last token alone.
SILENT = ("out_proj", "down")
LAYOUTS = {
    "1": Degrees(),
    "dp2": Degrees(dp_shard=2),
    "tp2": Degrees(tp=2),
    "cp2": Degrees(cp=2),
    "pp2": Degrees(pp=2),
}


def value(name: str, shape: Sequence[int]) -> torch.Tensor:
    """The parameter's value in every layout."""
    if any(f".{part}.weight" in name for part in SILENT):
        return torch.zeros(*shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def scored(rank: int, size: int, config: RunConfig, degrees: Degrees, rows: int) -> Evaluation:
    config = laid_out(config, degrees)
    world = World(rank, size, torch.device("cpu"), open_axes(degrees, rank))
    loader, state = open_data(config, rank), build_state(config, world)
    for name, parameter in state.built.named_parameters():
        state.built.fill(name, parameter, value(name, state.built.shard_maps[name].shape))
    _, micro = config.rank_rows(world.axes.batch.size)
    return evaluate(state.built.runner, loader, world, rows=rows, micro_batch=micro)


class ByHand(NamedTuple):
    """Nats of every held-out token but the first of each document, in order, and the bytes of the text."""

    nats: np.ndarray
    is_target: np.ndarray
    text: bytes

    def loss(self, tokens: int) -> tuple[float, int]:
        """The mean over the targets among the first tokens of the stream, and how many they are."""
        chosen = self.nats[1 : tokens + 1][self.is_target[1 : tokens + 1]]
        return float(chosen.sum() / len(chosen)), len(chosen)


@pytest.fixture(scope="module")
def config(short_documents: Path) -> RunConfig:
    more = ("layout.ffn.pattern=dense", "residual.dropout=0.4", "residual.has_zero_centered_norm=false")
    return config_of("gdn attn", "float64", short_documents, *more)


@pytest.fixture(scope="module")
def by_hand(config: RunConfig, short_documents: Path) -> ByHand:
    model, file = config.model, TokenFile(short_documents / "held_out")
    tokens = np.array(file.tokens(0, file.num_tokens), dtype=np.int64)
    embed = value("embed.weight", (model.vocab_size, model.width)).numpy()
    head = value("head.weight", (model.vocab_size, model.width)).numpy()
    scale = value("norm.weight", (model.width,)).numpy()
    spread = np.sqrt((embed**2).mean(1, keepdims=True) + config.residual.norm_eps)
    logits = (embed / spread * scale) @ head.T
    table = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    nats = np.zeros(len(tokens))
    nats[1:] = table[tokens[:-1]] - logits[tokens[:-1], tokens[1:]]
    is_target = np.ones(len(tokens), bool)
    is_target[file.document_offsets[file.document_offsets < len(tokens)]] = False
    return ByHand(nats, is_target, (short_documents / "held_out.txt").read_bytes())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_score_is_the_sum_over_the_documents(config: RunConfig, by_hand: ByHand, layout: str) -> None:
    degrees = LAYOUTS[layout]
    length = config.data.sequence_length
    every = -(-(len(by_hand.nats) - 1) // length)
    for rows in (3, every, every + 7):
        expected, targets = by_hand.loss(min(rows, every) * length)
        for found in run_world(degrees.size, scored, config, degrees, rows):
            assert found.targets == targets
            assert found.loss == pytest.approx(expected, rel=1e-12)
            if rows < every:
                continue
            bits = expected * targets / math.log(2) / len(by_hand.text)
            assert found.bits_per_byte == pytest.approx(bits, rel=1e-12)
    # Some documents cost more than others, so that a mean of means is another number.
    assert by_hand.loss(3 * length)[0] != pytest.approx(by_hand.loss(length * every)[0], rel=1e-3)


def test_compressors_are_measured_by_the_byte(config: RunConfig, by_hand: ByHand) -> None:
    loader = open_data(config, 0)
    score = score_of(Evaluation(1.0, 2.0, 3), loader, loader.held_out_rows)
    assert score["gzip -9 bits per byte"] == 8 * len(gzip.compress(by_hand.text, 9)) / len(by_hand.text)
    assert score["held-out bytes"] == len(by_hand.text)


def test_dropout_takes_no_part(config: RunConfig) -> None:
    found = []
    for dropout in (0.4, 0.4, 0.0):
        residual = config.residual.model_copy(update={"dropout": dropout})
        (score,) = run_world(1, scored_as_filled, config.model_copy(update={"residual": residual}))
        found.append(score)
    assert found[0] == found[1] == found[2]


def scored_as_filled(rank: int, size: int, config: RunConfig) -> Evaluation:
    world = World.alone(torch.device("cpu"))
    loader, state = open_data(config, 0), build_state(config, world)
    fill(state, config)
    return evaluate(state.built.runner, loader, world, rows=4, micro_batch=2)
