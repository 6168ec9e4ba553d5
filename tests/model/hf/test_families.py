"""Every family of published checkpoints: equal to transformers, and the same after a round trip."""

import json
import sys
import warnings
from copy import deepcopy
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
from model.moe.router import Router
from tests.architectures import random_model, small_architecture
from tests.closeness import relative
from tests.model.hf.draws import drawn_families

pytestmark = pytest.mark.filterwarnings("ignore")
LOGITS, GRADIENTS = 2e-5, 1e-4
FAMILIES = drawn_families()


def test_every_family_is_tested() -> None:
    assert set(FAMILIES) == set(families())


def open_theirs(directory: Path) -> tuple[Any, dict[str, set[str]]]:
    """transformers' model of a directory, and the tensors that it missed or did not expect."""
    # With fla installed and no GPU transformers would pick kernels that cannot run here.
    sys.modules.setdefault("fla", None)  # pyright: ignore[reportArgumentType]
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        # Fields that transformers would rather see under another name.
        warnings.simplefilter("error", FutureWarning)
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    return model.eval(), {
        key: set(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }


def logits_of(theirs: Any, tokens: Tensor) -> Tensor:
    return theirs(tokens, use_cache=False).logits


def our_gradients(model: LanguageModel, tokens: Tensor, weight: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (model(tokens) * weight).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def their_gradients(theirs: Any, tokens: Tensor, weight: Tensor, directory: Path) -> dict[str, Tensor]:
    """Their gradients under the names of the hub: saved as if they were weights."""
    theirs.zero_grad()
    (logits_of(theirs, tokens) * weight).sum().backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(directory)
    return dict(HubDirectory(directory).tensors())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_equal_to_transformers_and_round_trip(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    @settings(
        max_examples=5, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(overrides=FAMILIES[name].overrides, tokens=st.integers(1, 70), seed=st.integers(0, 2**20))
    def check(overrides: list[str], tokens: int, seed: int) -> None:
        torch.manual_seed(seed)
        check_once(name, overrides, tokens, tmp_path_factory.mktemp(name))

    check()


def check_once(name: str, overrides: list[str], length: int, directory: Path) -> None:
    config = small_architecture(overrides)
    ours = random_model(config, torch.float32)
    with torch.no_grad():
        # Norms scale by about one, as trained ones do: near zero their gradients are all cancellation.
        for module in ours.modules():
            if isinstance(module, RMSNorm) and not module.is_zero_centered:
                module.weight += 1.0
            if isinstance(module, Router) and module.is_hashed:
                module.reset_buffers()
        for key in Mapped(families()[name].pieces(config), state_of(ours)).uncovered:
            ours.get_buffer(key).zero_()
    save_pretrained(ours, directory / "ours", model_type=name)
    theirs, problems = (FAMILIES[name].open or open_theirs)(directory / "ours")
    assert problems == {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    tokens = torch.randint(config.model.vocab_size, (2, length))
    logits, expected = ours(tokens), logits_of(theirs, tokens)
    if length > 1:
        assert (logits - expected).square().mean().sqrt() < LOGITS * expected.std(), "logits"
    assert (logits - expected).abs().max() < 5 * LOGITS * expected.std(), "logits"

    theirs.save_pretrained(directory / "theirs")
    again = load_pretrained(directory / "theirs")
    for (key, a), (_, b) in zip(ours.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    save_pretrained(again, directory / "again", model_type=name)
    assert same_files(directory / "ours", directory / "again")

    weight = torch.randn_like(expected)
    found = our_gradients(ours, tokens, weight)
    gradients = their_gradients(theirs, tokens, weight, directory / "gradients")
    # A text model that was opened out of a larger one is saved as what it is.
    saved_as = HubDirectory(directory / "gradients").config["model_type"]
    mapped = Mapped(families()[saved_as].pieces_found(config, gradients), state_of(ours))
    into = {key: torch.zeros_like(value) for key, value in state_of(ours).items()}
    for key, gradient in gradients.items():
        if key in mapped.by_theirs:
            mapped.read(key, gradient, into)
    # A gradient that is zero by algebra, such as a key bias, is noise on both sides.
    noise = 1e-6 * max(gradient.abs().max().item() for gradient in found.values())
    for key, gradient in found.items():
        if max(into[key].abs().max(), gradient.abs().max()) > noise:
            error = relative(gradient, into[key])
            if error > GRADIENTS:
                # Some draws are so ill-conditioned that float32 itself is further than this from the truth.
                exact = deepcopy(ours).double()
                exact.dtype = torch.float64
                truth = our_gradients(exact, tokens, weight.double())[key]
                assert error < 4 * relative(gradient, truth), key


def same_files(first: Path, second: Path) -> bool:
    configs = [json.loads((path / "config.json").read_text()) for path in (first, second)]
    tensors = [load_file(path / "model.safetensors") for path in (first, second)]
    same = tensors[0].keys() == tensors[1].keys()
    return (
        configs[0] == configs[1]
        and same
        and all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])
    )
