import pytest
import torch

from tests.architectures import random_model, small_architecture
from train.eval.generate import generate


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return random_model(small_architecture(), torch.float32)


def run(model, **changes) -> torch.Tensor:
    arguments = {
        "tokens": 20,
        "temperature": 1.0,
        "end": 63,
        "vocabulary": 64,
        "context": 16,
        "generator": torch.Generator().manual_seed(1),
    }
    return generate(lambda ids: model(ids[None])[0, -1], torch.tensor([1, 5, 9]), **(arguments | changes))


def test_the_same_seed_gives_the_same_text(model) -> None:
    assert torch.equal(run(model), run(model))
    other = run(model, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(run(model)[: len(other)], other[: len(run(model))])


def test_without_temperature_every_token_is_the_likeliest(model) -> None:
    out = run(model, temperature=0.0, context=100, end=64)
    ids = torch.cat([torch.tensor([1, 5, 9]), out])
    with torch.no_grad():
        likeliest = model(ids[None])[0].argmax(-1)
    assert torch.equal(likeliest[2:-1], out)


def test_only_pieces_of_the_tokenizer_come_and_the_end_ends(model) -> None:
    assert run(model, vocabulary=10, end=64).max() < 10
    assert len(run(model, vocabulary=2, end=1, tokens=100)) < 100


def sums(ids: torch.Tensor) -> torch.Tensor:
    """Logits by which the likeliest next token is the sum of those that are seen, of ten."""
    return torch.nn.functional.one_hot(ids.sum() % 10, 10)


@pytest.mark.parametrize(
    ("context", "end", "expected"),
    [(2, 9, [3, 5, 8, 3, 1, 4]), (2, 8, [3, 5]), (99, 9, [3, 6, 2, 4, 8, 6])],
)
def test_the_last_tokens_are_seen_and_the_end_is_no_text(context: int, end: int, expected: list[int]) -> None:
    found = generate(
        sums,
        torch.tensor([1, 2]),
        tokens=6,
        temperature=0.0,
        end=end,
        vocabulary=10,
        context=context,
        generator=torch.Generator(),
    )
    assert found.tolist() == expected


def test_ranks_go_on_from_the_token_that_all_take() -> None:
    found = generate(
        sums,
        torch.tensor([1, 2]),
        tokens=3,
        temperature=0.0,
        end=9,
        vocabulary=10,
        context=99,
        generator=torch.Generator(),
        agreed=lambda chosen: chosen + 1,
    )
    assert found.tolist() == [4, 8, 6]
