"""What every file of conf/recipe/ must hold.

A stage composes with a model, and a step trains all that it does not freeze. A whole run is legal on its
cluster, fits into its memory, and a rank can build its part and go through a step.
"""

import pytest
import torch

from bench.recipes import whole_runs
from conf.compose import group_options
from model.mixer import Sequence
from parallel.apply import StepShape, build_parallel
from parallel.mesh.world import World
from train.config.load import load_config
from train.estimate.memory import memory_per_rank
from train.estimate.rehearsal import play, step_of
from train.optim.param_groups import build_optimizer

SIZE = ("model.width=32", "model.depth=4", "model.vocab_size=4096", "moe.num_experts=8", "moe.hidden=16")


# A recipe either is a whole run with its own model and cluster, or a stage that goes on any model.
WHOLE = whole_runs()
STAGES = [name for name in group_options("recipe") if name not in WHOLE]
# These are rehearsed by the short suite.
QUICK = ["kimi_linear_48b_h200_1n"]


@pytest.mark.parametrize("recipe", WHOLE)
def test_a_whole_run_is_legal_and_fits(recipe: str) -> None:
    config = load_config([f"recipe={recipe}"], None)
    size, available = config.cluster.nodes * config.cluster.gpus_per_node, config.cluster.memory_gib
    assert available is not None
    assert f"{config.cluster.nodes}n" == recipe.rsplit("_", 1)[1]
    assert memory_per_rank(config, size).total <= 0.9 * available * 2**30
    # One warm-up and one decay, within the run.
    assert config.schedule.warmup_steps < config.train.steps / 2


def rehearsed(recipe: str) -> None:
    config = load_config([f"recipe={recipe}"], None)
    size = config.cluster.nodes * config.cluster.gpus_per_node
    step, last = step_of(config, 0, size), play(config, size - 1, size)
    assert last["checkpoint"]["problems"] == []
    assert step["collectives"]
    first, planned = step["bytes"]["total"], memory_per_rank(config, size)
    for held, formula in (
        (first["parameters"], planned.weights),
        (first["gradients"], planned.gradients),
        (first["optimizer"], planned.optimizer),
    ):
        # Formulas share all evenly; ranks of the tensor axis hold norms and some projections whole.
        assert held == pytest.approx(formula, rel=0.1)


@pytest.mark.parametrize("recipe", QUICK)
def test_a_rank_of_a_whole_run_can_start(recipe: str) -> None:
    rehearsed(recipe)


@pytest.mark.prove
@pytest.mark.parametrize("recipe", [name for name in WHOLE if name not in QUICK])
def test_a_rank_of_any_whole_run_can_start(recipe: str) -> None:
    rehearsed(recipe)


@pytest.mark.parametrize("recipe", STAGES)
def test_a_step_moves_what_is_not_frozen(recipe: str) -> None:
    # This model has every part that a recipe may name.
    config = load_config(["model=deepseek_v3_2_small", *SIZE, f"recipe={recipe}", "train.micro_batch=1"], 1)
    world, dtypes = World.alone(torch.device("cpu")), (torch.float32, torch.float32)
    built = build_parallel(config.architecture, dtypes, config.parallel, world, 0, StepShape(1, 1, 90))
    optimizer, model = build_optimizer(built, config.optim), built.whole
    assert model is not None
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = torch.randint(4096, (1, 90))
    parts = model.loss(ids, ids.roll(-1, 1), Sequence.whole(ids))
    loss = (parts.cross_entropy + parts.mtp + sum(parts.auxiliary.values())) / 90
    loss.backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved == trained
    assert torch.isfinite(loss)
