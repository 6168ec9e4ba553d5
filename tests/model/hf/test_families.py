"""Every family of published checkpoints: equal to transformers, and the same after a round trip."""

import json
import re
import warnings
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from model.hf.family import families
from model.hf.files import HubDirectory
from model.hf.pieces import Mapped
from model.hf.pretrained import load_pretrained, save_pretrained, state_of
from model.language_model import LanguageModel
from model.linear import RMSNorm
from tests.architectures import random_model, small_architecture
from tests.closeness import (
    CANCELS,
    SAME,
    assert_close,
    assert_rounded,
    function_of,
    in_float64,
    outputs_and_grads,
    weighed,
)
from tests.model.hf.draws import drawn_families, fit

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = drawn_families()


def test_every_family_is_tested() -> None:
    assert set(FAMILIES) == set(families())


def test_every_family_is_in_the_docs() -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    listed = page.partition("Families, each with")[2].partition("Safetensors only")[0]
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(families())


def open_theirs(directory: Path) -> tuple[Any, dict[str, set[str]]]:
    """transformers' model of a directory, and the tensors that it missed or did not expect.

    Of the default dtype.
    """
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        # Fields that transformers would rather see under another name.
        warnings.simplefilter("error", FutureWarning)
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.get_default_dtype(),
            attn_implementation="eager",
            experts_implementation="eager",  # the others take no float64
            output_loading_info=True,
        )
    return model.eval(), {
        key: set(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }


def logits_of(theirs: Any, tokens: Tensor) -> Tensor:
    return theirs(tokens, use_cache=False).logits


def results_of(model: LanguageModel, tokens: Tensor, *weights: Tensor) -> list[Tensor]:
    """The logits, then the gradient of each parameter."""
    return outputs_and_grads(function_of(model), [tokens, *weights])


def their_gradients(theirs: Any, logits: Tensor, directory: Path) -> dict[str, Tensor]:
    """Their gradients under the names of the hub: saved as if they were weights."""
    weighed(logits).backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(directory)
    return dict(HubDirectory(directory).tensors())


@pytest.mark.parametrize("examples", [2, pytest.param(5, marks=pytest.mark.prove)])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_equal_to_transformers_and_round_trip(
    name: str, examples: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @settings(
        max_examples=examples,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(overrides=FAMILIES[name].overrides, short=st.integers(0, 69), seed=st.integers(0, 2**20))
    def check(overrides: list[str], short: int, seed: int) -> None:
        torch.manual_seed(seed)
        # The first example is the least one, which one token would be: in it queries and keys change nothing.
        check_once(name, overrides, 70 - short, tmp_path_factory.mktemp(name))

    check()


def check_once(name: str, overrides: list[str], length: int, directory: Path) -> None:
    config = small_architecture(overrides)
    ours = random_model(config, torch.float32)
    with torch.no_grad():
        # Norms scale by about one, as trained ones do: near zero their gradients are all cancellation.
        for module in ours.modules():
            if isinstance(module, RMSNorm) and not module.is_zero_centered:
                module.weight += 1.0
    fit(ours, name)
    save_pretrained(ours, directory / "ours", model_type=name)
    with in_float64():
        theirs, problems = (FAMILIES[name].open or open_theirs)(directory / "ours")
    assert problems == {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}

    theirs.save_pretrained(directory / "theirs")
    again = load_pretrained(directory / "theirs")
    for (key, a), (_, b) in zip(ours.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    save_pretrained(again, directory / "again", model_type=name)
    assert same_files(directory / "ours", directory / "again")

    tokens = torch.randint(config.model.vocab_size, (2, length))
    exact = deepcopy(ours).double()
    exact.dtype = torch.float64
    names, weights = zip(*ours.named_parameters(), strict=True)
    found = results_of(ours, tokens, *weights)
    assert_rounded(found, partial(results_of, exact), [tokens, *weights], names=["logits", *names])
    with in_float64():
        logits, *gradients = results_of(exact, tokens, *exact.parameters())
        expected = logits_of(theirs, tokens)
        grads = their_gradients(theirs, expected, directory / "gradients")
    assert_close([logits], [expected.detach()], SAME, names=["logits"])
    # A text model that was opened out of a larger one is saved as what it is.
    saved_as = HubDirectory(directory / "gradients").config["model_type"]
    shapes = {key: tuple(gradient.shape) for key, gradient in grads.items()}
    mapped = Mapped(families()[saved_as].pieces_found(config, shapes), state_of(exact))
    into = {key: torch.zeros_like(value) for key, value in state_of(exact).items()}
    for key, gradient in grads.items():
        if key in mapped.by_theirs:
            mapped.read(key, gradient, into)
    assert_close(gradients, [into[key] for key in names], SAME, names=names, cancels=CANCELS)


def same_files(first: Path, second: Path) -> bool:
    configs = [json.loads((path / "config.json").read_text()) for path in (first, second)]
    tensors = [load_file(path / "model.safetensors") for path in (first, second)]
    same = tensors[0].keys() == tensors[1].keys()
    return (
        configs[0] == configs[1]
        and same
        and all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])
    )
