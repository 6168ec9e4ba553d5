"""What every file of conf/recipe/ must hold: it composes, and a step trains all that it does not freeze."""

import pytest
import torch

from conf.compose import group_options
from model.mixer import Sequence
from parallel.apply import Work, build_parallel
from parallel.world import World
from train.load import load_config
from train.optimizer import build_optimizer

SIZE = ("model.width=32", "model.depth=4", "model.vocab_size=4096", "moe.num_experts=8", "moe.hidden=16")


@pytest.mark.parametrize("recipe", group_options("recipe"))
def test_a_step_moves_what_is_not_frozen(recipe: str) -> None:
    # This model has every part that a recipe may name.
    config = load_config(["model=deepseek_v3_2_small", *SIZE, f"recipe={recipe}", "train.micro_batch=1"], 1)
    world, dtypes = World.alone(torch.device("cpu")), (torch.float32, torch.float32)
    built = build_parallel(config.architecture, dtypes, config.parallel, world, 0, Work(1, 1, 90))
    optimizer, model = build_optimizer(built, config.optim), built.whole
    assert model is not None
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = torch.randint(4096, (1, 90))
    parts = model.loss(ids, ids.roll(-1, 1), Sequence.whole(ids))
    loss = (parts.cross_entropy + parts.prediction + sum(parts.auxiliary.values())) / 90
    loss.backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved == trained
    assert torch.isfinite(loss)
