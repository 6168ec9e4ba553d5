"""What panels show of a batch made by hand, in a model whose routers and head are given their scores."""

import math
import sys
from pathlib import Path

import pytest
import torch

from data.loader import IGNORED, Batch
from parallel.mesh.world import World
from tests.train.runs import overrides_of
from train.config.environment import Environment, read_launch
from train.config.load import load_config
from train.loop.metrics import step_metrics
from train.loop.run import build_state
from train.loop.step import train_step
from train.track.panels import without_secrets

ROWS, TOKENS, VOCABULARY, EXPERTS = 2, 8, 448, 4
KEYS = (
    *("moe=softmax", "moe.has_router_bias=true", "moe.top_k=1", "moe.balance_loss=0.0", "moe.bias_rate=0.0"),
    *("layout.pattern=attn", "layout.ffn.pattern=moe", "model.depth=2", "residual.dropout=0.0"),
    *(f"data.sequence_length={TOKENS}", "model.mtp.depth=1", "model.mtp.ffn=dense", "precision=fp64"),
    *(f"train.global_batch={ROWS}", "train.micro_batch=1", "optim.weight_decay=0.0"),
)
# What each router wants of its four experts: 1.75 bits of entropy, and nearly two.
WANTED = ((1 / 2, 1 / 4, 1 / 8, 1 / 8), (0.26, 0.25, 0.25, 0.24))
ENTROPY = [1.75 * math.log(2), -sum(share * math.log(share) for share in WANTED[1])]


def batch_by_hand() -> Batch:
    """Two rows: one document of eight tokens, and two of three and five. Ends have no target."""
    document = torch.tensor([[0] * 8, [0] * 3 + [1] * 5])
    position = torch.tensor([[*range(8)], [*range(3), *range(5)]])
    tokens = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS)
    targets = tokens + 1
    targets[0, 7] = targets[1, 2] = targets[1, 7] = IGNORED
    return Batch(tokens, targets, document, position, torch.arange(ROWS))


@pytest.mark.parametrize("top_k", [1, 3])
def test_panels_are_those_of_the_batch(top_k: int) -> None:
    unused = Path("none")
    config = load_config(overrides_of(unused, unused, unused, *KEYS, f"moe.top_k={top_k}"), 1)
    world = World.alone(torch.device("cpu"))
    state = build_state(config, world)
    model = state.built.whole
    assert model is not None
    assert model.head is not None
    with torch.no_grad():
        model.head.weight.zero_()
        for router, wanted in zip(model.routers(), WANTED, strict=True):
            router.weight.zero_()
            assert router.logit_bias is not None
            router.logit_bias.copy_(torch.tensor(wanted, dtype=torch.float64).log())
    lines = []
    for _ in range(2):
        result = train_step(state, batch_by_hand(), config, world)
        lines.append(step_metrics(state, result, "", 1.0))
    # Every token takes the first experts, so that their load is EXPERTS / top_k times the mean.
    routers = dict[str, float]()
    routers["router/max_violation"] = routers["router/mean_violation"] = EXPERTS / top_k - 1
    routers["router/idle_experts"] = len(WANTED) * (EXPERTS - top_k)
    routers["router/entropy"] = sum(ENTROPY) / len(ENTROPY)
    for layer, entropy in enumerate(ENTROPY):
        routers[f"router/max_violation_{layer}"] = EXPERTS / top_k - 1
        routers[f"router/idle_experts_{layer}"] = EXPERTS - top_k
        routers[f"router/entropy_{layer}"] = entropy
    found = {name: value for name, value in lines[0].items() if name.startswith("router/")}
    assert found == pytest.approx(routers, rel=1e-12)
    # Thirteen tokens have a next one of their document, ten have one after it.
    losses = {"loss": math.log(VOCABULARY), "loss/cross_entropy": math.log(VOCABULARY)}
    losses["loss/mtp_1"] = math.log(VOCABULARY)
    assert {name: lines[0][name] for name in losses} == pytest.approx(losses, rel=1e-12)
    assert [line["data/sequences"] for line in lines] == [ROWS, 2 * ROWS]
    assert [line["data/tokens"] for line in lines] == [13, 26]
    assert [line["step"] for line in lines] == [1, 2]


def test_no_secret_of_a_job_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"NCCL_DEBUG": "INFO", "WANDB_API_KEY": "abc", "hf_token": "abc", "UNSET": None}
    config = {"optim": {"lr": 1.0}, "slurm": {"env": env, "time": "1:0:0"}}
    shown = without_secrets(config)
    kept = {"NCCL_DEBUG": "INFO", "WANDB_API_KEY": "...", "hf_token": "...", "UNSET": None}
    assert shown == {"optim": {"lr": 1.0}, "slurm": {"env": kept, "time": "1:0:0"}}
    assert env["hf_token"] == "abc"
    words = ["python", "-m", "train", "slurm.env.HF_TOKEN=abc", "+slurm.env={A: abc}", "optim.lr=1"]
    monkeypatch.setattr(sys, "orig_argv", words)
    command = read_launch(Environment(0, 1, 0, None, None))["command"]
    assert "abc" not in command
    assert command.startswith("python -m train slurm.env.HF_TOKEN=... ")
