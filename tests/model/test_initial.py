"""First values follow from seed and name alone, and are of the distributions that they are said to be of."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from model.initial import initialise, sample
from model.linear import Initial, RMSNorm

SHAPE = torch.Size((20_000,))


def drawn(initial: Initial, name: str = "blocks.0.mixer.x", seed: int = 1) -> Tensor:
    return sample(name, initial, SHAPE, seed).double()


def test_seed_and_name_decide_and_nothing_else() -> None:
    normal = Initial("normal", 0.0, 1.0)
    first = drawn(normal)
    assert torch.equal(first, drawn(normal))
    for other in (drawn(normal, seed=2), drawn(normal, "blocks.1.mixer.x")):
        assert abs(torch.corrcoef(torch.stack((first, other)))[0, 1]) < 0.05


# The mean and deviation of a uniform number are those of its ends; five deviations of the mean are allowed.
@pytest.mark.parametrize(
    ("initial", "back", "low", "high"),
    [
        (Initial("uniform", -0.25, 0.5), lambda y: y, -0.25, 0.5),
        (Initial("log_of_uniform", 1.0, 16.0), torch.exp, 1.0, 16.0),
        (
            Initial("inverse_softplus_of_log_uniform", 1e-3, 1e-1),
            lambda y: softplus(y).log(),
            math.log(1e-3),
            math.log(1e-1),
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, Initial) else "",
)
def test_values_are_uniform_between_the_ends(initial: Initial, back, low: float, high: float) -> None:
    found = back(drawn(initial))
    slack = 1e-4 * (high - low)
    assert low - slack <= found.min() < low + 100 * slack
    assert high - 100 * slack < found.max() <= high + slack
    deviation = (high - low) / math.sqrt(12)
    assert abs(found.mean() - (low + high) / 2) < 5 * deviation / math.sqrt(len(found))


def test_normal_values_have_their_mean_and_deviation() -> None:
    found = drawn(Initial("normal", 3.0, 0.02))
    assert found.mean().item() == pytest.approx(3.0, abs=5 * 0.02 / math.sqrt(len(found)))
    assert found.std().item() == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize("is_zero_centered", [False, True])
def test_a_norm_starts_as_the_norm_without_a_weight(is_zero_centered: bool) -> None:
    norm = RMSNorm(4, 1e-6, is_zero_centered=is_zero_centered)
    initialise(norm, 0)
    # The root of the mean square of 3, 4, 0, 0 is 2.5.
    found = norm(torch.tensor([3.0, 4.0, 0.0, 0.0]))
    assert torch.allclose(found, torch.tensor([1.2, 1.6, 0.0, 0.0]))
