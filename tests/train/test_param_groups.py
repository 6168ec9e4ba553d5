"""Weight decay is for matrices of products, and for nothing that is a table, a bias, a rate or a scale."""

from fnmatch import fnmatchcase

import pytest
import torch

from conf.compose import group_options
from conf.errors import ConfigError
from parallel.apply import Parallel, StepShape, build_parallel
from parallel.mesh.world import World
from tests.train.runs import TINY
from train.config.load import load_config
from train.config.run_config import RunConfig
from train.loop.state import TrainState
from train.optim.param_groups import build_optimizer

# Every parameter that there is, by the last two parts of its name.
DECAYED = (
    *("*_proj.weight", "head.weight", "router.weight", "shared_gate.weight", "x_proj.weight"),
    *("gate_up.weight", "down.weight", "experts.gate_up", "experts.down"),
    *("phi_[kv].first", "phi_[kv].second", "*_residual.weight", "collapse.weight"),
)
NOT_DECAYED = (
    *("embed.weight", "*norm.weight", "*norm.bias", "*norm[12].weight", "*_proj.bias", "*conv.weight"),
    *("*conv.bias", "*.A_log", "*.dt_bias", "*.skip", "*.sinks", "decay.bias", "compressor.bias"),
    *("phi_[kv].position_encoding", "*.index_places", "experts.gate_up_bias", "experts.down_bias"),
    *("router.logit_bias", "*residual.bias", "*residual.scale", "collapse.bias", "collapse.scale"),
)
FORMS = {
    **{name: [f"layout.pattern={name}"] for name in group_options("mixer") if name != "dsa_shared"},
    "dsa_shared": ["layout.pattern=dsa dsa_shared", "model.depth=2"],
    **{f"residual={name}": [f"residual={name}", "model.mtp.depth=1"] for name in group_options("residual")},
    "biases": [
        "moe.has_bias=true",
        "moe.has_router_bias=true",
        "mixer.attn.has_bias=true",
        "mixer.attn.has_sinks=true",
    ],
    "dense": ["layout.ffn.pattern=dense", "residual.norm=layer", "residual.has_zero_centered_norm=false"],
}


def build(*overrides: str) -> tuple[RunConfig, Parallel]:
    keys = (
        "data.directory=none",
        "data.corpora.documents.source=none",
        "layout.pattern=attn",
        "model.depth=1",
    )
    config = load_config([*TINY, *keys, *overrides], 1)
    dtypes = (torch.float32, torch.float32)
    world = World.alone(torch.device("cpu"))
    return config, build_parallel(config.architecture, dtypes, config.parallel, world, 0, StepShape(1, 1, 8))


def fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(".".join(name.split(".")[-2:]), pattern) for pattern in patterns)


def decays_of(config: RunConfig, built: Parallel) -> dict[str, float]:
    groups = build_optimizer(built, config.optim).param_groups
    found = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    return {name: found[parameter] for name, parameter in built.named_parameters()}


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_is_in_its_group(form: str) -> None:
    config, built = build(*FORMS[form])
    for name, decay in decays_of(config, built).items():
        assert fits(name, DECAYED) != fits(name, NOT_DECAYED), f"{name} in none of the lists here, or in both"
        assert decay == (config.optim.weight_decay if fits(name, DECAYED) else 0.0), name


def test_a_tied_head_is_an_embedding() -> None:
    tied, apart = (decays_of(*build(f"model.has_tied_embeddings={tied}")) for tied in ("true", "false"))
    assert apart["head.weight"] > 0
    assert "head.weight" not in tied
    assert tied["embed.weight"] == apart["embed.weight"] == 0


def test_the_last_pattern_that_fits_scales_the_rate_and_zero_freezes() -> None:
    config, built = build("optim.lr_scales={*:0.5,*norm*:2.0,blocks.0.ffn_residual.*:0.0}")
    state = TrainState(built, build_optimizer(built, config.optim), config.optim)
    state.set_lr(0.1)
    rates = {x: group["lr"] for group in state.optimizer.param_groups for x in group["params"]}
    for name, parameter in built.named_parameters():
        scale = 0.0 if name.startswith("blocks.0.ffn_residual.") else 2.0 if "norm" in name else 0.5
        assert parameter.requires_grad == (scale > 0), name
        assert rates.get(parameter, 0.0) == pytest.approx(0.1 * scale), name


@pytest.mark.parametrize(
    ("scales", "says"),
    [
        ("{blocks.7.*:0.5,*norm*:1.0}", r"optim\.lr_scales\.blocks\.7\.\*: fits no parameter"),
        ("{*:0.0}", r"optim\.lr_scales: freezes every parameter"),
    ],
)
def test_scales_that_reach_nothing_or_leave_nothing_are_refused(scales: str, says: str) -> None:
    config, built = build(f"optim.lr_scales={scales}")
    with pytest.raises(ConfigError, match=says):
        build_optimizer(built, config.optim)
