"""Counts against published figures, and against models that are really built."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.count import count
from model.language_model import LanguageModel
from tests.architectures import SMALL, small_architecture
from train.config.load import load_config
from train.estimate.memory import memory_per_rank
from train.loop.measure import Meter
from train.plan import plan

# Parameters in all and per token, and training GFLOP per token at 4096 tokens, as published: totals of the
# model cards' architectures to the digits known; FLOPs from published TFLOP/s over tokens/s.
PUBLISHED = {
    "qwen3_next_80b_a3b": (79.67e9, 3.87e9, None),
    "qwen3_30b_a3b": (30.53e9, 3.35e9, 23.05e9),
    "qwen3_235b_a22b": (235.09e9, 22.19e9, 148.0e9),
    "mixtral_8x7b": (46.70e9, 12.88e9, None),
    # MTP modules stand beside the total: 11.6e9 here, 10.0e9 in GLM-5.
    "deepseek_v3": (671.03e9, 37.55e9, None),
    "glm_5": (743.91e9, 41.78e9, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str) -> None:
    total, active, flops = PUBLISHED[name]
    figures = plan(load_config([f"model={name}", "plan.context=4096"], 1))
    assert figures["parameters"]["total"] == pytest.approx(total, rel=2e-4)
    assert figures["parameters"]["active"] == pytest.approx(active, rel=2e-3)
    if flops is not None:
        assert figures["flops_per_token"] == pytest.approx(flops, rel=4e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_of_the_model_built_on_meta(name: str) -> None:
    config = load_config([f"model={name}"], 1)
    with torch.device("meta"):
        model = LanguageModel(config.architecture)
    counts = count(config.architecture)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    for layer, block in zip(counts.layers, model.blocks, strict=True):
        assert layer.params == sum(parameter.numel() for parameter in block.parameters())


@settings(max_examples=10)
@given(
    pattern=st.lists(st.sampled_from(["gdn", "attn", "swa", "none"]), min_size=1, max_size=4),
    ffn=st.lists(st.sampled_from(["moe", "dense"]), min_size=1, max_size=3),
    tied=st.booleans(),
    shared=st.sampled_from([0, 16]),
    depth=st.integers(1, 7),
)
def test_any_layout_counts_itself(pattern, ffn, tied: bool, shared: int, depth: int) -> None:
    config = small_architecture(
        [
            f"layout.pattern={' '.join(pattern)}",
            f"layout.ffn.pattern={' '.join(ffn)}",
            f"model.has_tied_embeddings={str(tied).lower()}",
            f"model.depth={depth}",
            f"moe.shared_hidden={shared}",
            f"moe.has_shared_gate={str(shared > 0).lower()}",
        ]
    )
    with torch.device("meta"):
        model = LanguageModel(config)
    assert count(config).total == sum(parameter.numel() for parameter in model.parameters())


# Width 32, a vocabulary of 4096, rows of 16 tokens.
PLANNED = (
    *(*SMALL, "data.sequence_length=16", "layout.pattern=gdn", "layout.ffn.pattern=dense", "model.depth=1"),
    *(
        "model.vocab_size=4096",
        "mixer.attn.output_gate=none",
        "model.mtp.depth=2",
        "model.mtp.mixer=attn",
        "model.mtp.ffn=dense",
    ),
)
# Queries and keys of 2 heads of 8, values and their gates of 4 heads of 12, a beta and a decay for each.
GDN_PROJECTIONS = 2 * 32 * (2 * 8 + 2 * 8 + 4 * 12 + 4 * 12 + 4 + 4) + 2 * (4 * 12) * 32
# A state of 8 x 12 decays by a product, is read by a key, gets an outer product, and is read by a query.
GDN_CORE = 4 * (8 * 12) * (1 + 2 + 2 + 2) + 2 * 4 * (2 * 8 + 2 * 8 + 4 * 12)
SWIGLU = 3 * 2 * 32 * 48
HEAD = 2 * 32 * 4096
# Queries of 4 heads of 8 read keys and values of 2; token t of 16 sees t, which is 8.5 on average.
ATTN = 2 * 32 * (4 * 8 + 2 * 8 + 2 * 8) + 2 * (4 * 8) * 32 + 4 * (2 * 8 + 2 * 8) * 8.5
# The two halves of its input, a layer, and the whole head once more.
PREDICTION = 2 * (2 * 32) * 32 + ATTN + SWIGLU + HEAD
TRAINING = 3 * (GDN_PROJECTIONS + GDN_CORE + SWIGLU + HEAD + 2 * PREDICTION)


def test_operations_of_gated_deltanet_and_of_predictions_are_those_of_their_shapes() -> None:
    figures = plan(load_config([*PLANNED], 1))
    assert figures["forward_flops_per_token"] == {
        "gdn_projections": GDN_PROJECTIONS,
        "gdn_core": GDN_CORE,
        "feed_forward": SWIGLU,
        "head": HEAD,
        "mtp": 2 * PREDICTION,
    }
    assert figures["flops_per_token"] == TRAINING


def test_the_share_of_peak_is_that_of_all_devices() -> None:
    config = load_config([*PLANNED, "cluster.peak_tflops=2", "train.global_batch=4"], 4)
    readings = Meter(config, torch.device("cpu"), 4).readings(300, 0.5)
    assert readings["speed/tokens_per_second"] == 600
    assert readings["speed/share_of_peak"] == pytest.approx(600 * TRAINING / (4 * 2e12), rel=1e-12)


def test_cache_of_a_million_tokens() -> None:
    # 24.65 GB for 48 layers, 3:1 with 32 value heads of 128 x 128 and two key heads of 256.
    counts = count(load_config(["model=qwen3_next_80b_a3b"], 1).architecture)
    assert counts.cache_bytes(1_000_000) == pytest.approx(24.65e9, rel=1e-3)
    # A window stops growing: 3:1 windows of 128 keep a quarter of the cache, and a little.
    full = count(load_config(["model=qwen3_30b_a3b"], 1).architecture).cache_bytes(1_000_000)
    windows = ["model=qwen3_30b_a3b", "layout=swa_3to1"]
    assert full / 4 < count(load_config(windows, 1).architecture).cache_bytes(1_000_000) < full / 4 * 1.001


def test_model_state_is_sixteen_bytes_per_parameter_over_the_shards() -> None:
    overrides = ["model=qwen3_next_80b_a3b", "precision=bf16", "cluster=h100_8n", "train.global_batch=64"]
    config = load_config(overrides, 64)
    memory = memory_per_rank(config, 64)
    state = memory.weights + memory.gradients + memory.optimizer
    assert state == pytest.approx(16 * count(config.architecture).total / 64, rel=1e-6)
    assert memory_per_rank(config, 32).weights == pytest.approx(2 * memory.weights, rel=1e-6)


def test_json_is_one_object_with_the_documented_keys() -> None:
    command = [sys.executable, "-m", "train.plan", "plan.format=json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    figures = json.loads(printed)
    assert figures["parameters"]["total"] > figures["parameters"]["active"] > 0
    assert figures["flops_per_token"] > 0
    assert figures["cache_bytes"] > 0
    assert len(figures["layers"]) == 4
