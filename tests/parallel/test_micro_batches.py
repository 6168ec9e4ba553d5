"""What losses are divided by: each by its own count over the global batch."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import Batch
from model.mixer import Sequence
from parallel.micro_batches import Denominators, count_targets, objective_of
from tests.architectures import random_model, small_architecture


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), coefficient=st.sampled_from([0.0, 0.3, 2.0])
)
def test_a_uniform_guess_costs_the_log_of_the_vocabulary_at_every_depth(
    lengths: list[int], coefficient: float
) -> None:
    config = small_architecture(["model.mtp.depth=3", "layout.pattern=attn", "moe.balance_loss=0"])
    model = random_model(config, torch.float64)
    torch.nn.init.zeros_(model.head.weight)
    batch = batch_of(lengths, config.model.vocab_size)
    sequence = Sequence(batch.position, batch.document, batch.tokens)
    losses = model.loss(batch.tokens, batch.targets, sequence)
    targets = count_targets(batch, 3)
    guess = math.log(config.model.vocab_size)
    counts = [sum(max(0, length - depth) for length in lengths) for depth in range(1, 5)]
    assert targets.tolist() == counts
    means = [loss / max(1, count) for loss, count in zip(losses.mtp.tolist(), counts[1:], strict=True)]
    assert all(math.isclose(mean, guess * (count > 0)) for mean, count in zip(means, counts[1:], strict=True))
    objective = objective_of(losses, Denominators(targets, batch.tokens.numel(), coefficient))
    ahead = sum(count > 0 for count in counts[1:]) / 3
    assert math.isclose(objective.item(), guess * ((counts[0] > 0) + coefficient * ahead))


def batch_of(lengths: list[int], vocab_size: int) -> Batch:
    """One row of documents with these lengths."""
    document = torch.repeat_interleave(torch.tensor(lengths))[None]
    position = torch.cat([torch.arange(length) for length in lengths])[None]
    tokens = torch.randint(vocab_size, document.shape)
    targets = tokens.roll(-1, 1)
    is_last = torch.tensor(lengths).cumsum(0) - 1
    targets[0, is_last] = -100
    return Batch(tokens, targets, document, position, torch.zeros(1, dtype=torch.long))
