"""Residual forms: equal to their definitions and to transformers' DeepSeek-V4 connections."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from model.residual import Collapse, Hyper, build_collapse, build_residual, open_streams
from model.shape import ResidualConfig
from tests.architectures import random_model, randomise, small_architecture
from tests.closeness import SAME, assert_close, in_float64, relative

pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH = 24


def residual_config(*overrides: str) -> ResidualConfig:
    return small_architecture(list(overrides)).residual


def streams_in() -> torch.Tensor:
    return torch.randn(2, 7, 4, WIDTH, requires_grad=True)


def theirs(name: str) -> Any:
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as code

    module = getattr(code, name)(DeepseekV4Config(hidden_size=WIDTH, hc_mult=4, hc_sinkhorn_iters=20))
    randomise(module)
    return module


@pytest.fixture
def exact() -> Iterator[None]:
    with in_float64():
        yield


@pytest.mark.usefixtures("exact")
def test_hyper_connections_equal_theirs() -> None:
    reference = theirs("DeepseekV4HyperConnection")
    ours = build_residual(WIDTH, residual_config("residual=hyper"))
    assert isinstance(ours, Hyper)
    names = {"weight": "fn", "bias": "base", "scale": "scale"}
    parameters = dict(reference.named_parameters())
    with torch.no_grad():
        ours.norm.weight.fill_(1.0)
        for mine, name in names.items():
            getattr(ours, mine).copy_(parameters[name])
    stream, other = streams_in(), None
    other = stream.detach().clone().requires_grad_()
    x, kept = ours.read(stream)
    y = torch.randn_like(x)
    out = ours.write(kept, y)
    post, comb, collapsed = reference(other)
    expected = post[..., None] * y[..., None, :] + comb.mT @ other
    assert_close([x], [collapsed * (collapsed.square().mean(-1, keepdim=True) + 1e-6).rsqrt()], SAME)
    assert_close([out], [expected], SAME)
    weight = torch.randn_like(out)
    ((out * weight).sum() + (kept[1] * 0).sum()).backward()
    (expected * weight).sum().backward()
    assert_close([stream.grad], [other.grad], SAME)
    for mine, name in names.items():
        assert relative(getattr(ours, mine).grad, parameters[name].grad) < SAME, name


@pytest.mark.usefixtures("exact")
def test_the_learned_collapse_equals_theirs() -> None:
    reference = theirs("DeepseekV4HyperHead")
    ours = build_collapse(WIDTH, residual_config("residual=hyper"))
    assert isinstance(ours, Collapse)
    with torch.no_grad():
        ours.weight.copy_(reference.hc_fn)
        ours.bias.copy_(reference.hc_base)
        ours.scale.copy_(reference.hc_scale)
    stream = streams_in()
    other = stream.detach().clone().requires_grad_()
    out, expected = ours(stream), reference(other)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_close([out, stream.grad], [expected, other.grad], SAME)


def test_forms_equal_their_definitions() -> None:
    x, y = torch.randn(2, 3, WIDTH).double(), torch.randn(2, 3, WIDTH).double()

    def normed(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    for kind in ("pre_norm", "sandwich", "scaled_post_norm"):
        config = residual_config(f"residual={kind}", "residual.alpha=3.5", "residual.beta=0.7")
        half = build_residual(WIDTH, config).double()
        randomise(half)
        first = half.norm.weight + config.has_zero_centered_norm
        inner, kept = half.read(x)
        assert_close([inner], [normed(x, first)], 1e-12)
        expected = {
            "pre_norm": lambda: x + y,
            "sandwich": lambda half=half: x + normed(y, half.out_norm.weight + 1),
            "scaled_post_norm": lambda first=first: 3.5 * normed(x, first) + 0.7 * y,
        }[kind]()
        assert_close([half.write(kept, y)], [expected], 1e-12)


@pytest.mark.parametrize("kind", ["pre_norm", "sandwich", "scaled_post_norm", "hyper"])
def test_a_model_with_each_form_trains_every_parameter(kind: str) -> None:
    config = small_architecture([f"residual={kind}", "model.mtp.depth=2"])
    model = random_model(config, torch.float64)
    tokens = torch.randint(config.model.vocab_size, (2, 20))
    losses = model.loss(tokens, tokens.roll(-1, 1))
    (losses.cross_entropy + losses.mtp.sum() + sum(losses.auxiliary.values())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_streams_open_as_copies() -> None:
    x = torch.randn(2, 3, WIDTH)
    assert open_streams(x, residual_config()) is x
    opened = open_streams(x, residual_config("residual=hyper"))
    assert opened.shape == (2, 3, 4, WIDTH)
    assert all(torch.equal(opened[:, :, stream], x) for stream in range(4))
