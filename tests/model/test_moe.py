import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import Architecture
from model.mixer import Sequence
from model.moe.config import MoeConfig
from model.moe.router import Router
from tests.architectures import random_model, randomise, small_architecture
from tests.closeness import assert_close


def build_router(score: str, **fields: object) -> Router:
    base = {
        "num_experts": 6,
        "top_k": 2,
        "hidden": 8,
        "score": score,
        "has_normalized_weights": True,
        "weight_scale": 1.5,
        "shared_hidden": 0,
        "has_shared_gate": False,
        "balance_loss": 0.5,
        "bias_rate": 0.01,
    }
    router = Router(MoeConfig.model_validate(base | fields), 5, 0.02).double()
    randomise(router)
    return router


@given(
    score=st.sampled_from(["softmax", "sigmoid"]),
    normalized=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_router_equals_its_definition_token_by_token(score: str, normalized: bool, seed: int) -> None:
    torch.manual_seed(seed)
    router = build_router(score, has_normalized_weights=normalized)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    choice = router(x)
    balance, load = 0.0, [0] * 6
    for row in range(2):
        counts, shares = [0] * 6, [0.0] * 6
        for t in range(7):
            logits = [(router.weight[e] @ x[row, t]).item() for e in range(6)]
            if score == "softmax":
                scores = [math.exp(z) / sum(map(math.exp, logits)) for z in logits]
            else:
                scores = [1 / (1 + math.exp(-z)) for z in logits]
            best = sorted(range(6), key=lambda e: -(scores[e] + router.bias[e].item()))[:2]
            weights = [scores[e] / (sum(scores[e] for e in best) if normalized else 1) * 1.5 for e in best]
            token = row * 7 + t
            found = dict(zip(choice.experts[token].tolist(), choice.weights[token].tolist(), strict=True))
            assert set(found) == set(best)
            for e, weight in zip(best, weights, strict=True):
                assert math.isclose(found[e], weight, rel_tol=1e-12)
                counts[e] += 1
                load[e] += 1
            for e in range(6):
                shares[e] += scores[e] / sum(scores) / 7
        balance += 0.5 * sum(6 / (2 * 7) * n * p for n, p in zip(counts, shares, strict=True))
    assert math.isclose(choice.routing.balance_loss.item(), balance, rel_tol=1e-12)
    assert choice.routing.load.tolist() == load


def test_bias_steers_the_choice_but_not_the_weights() -> None:
    router = build_router("sigmoid")
    x = torch.randn(1, 50, 5, dtype=torch.float64)
    router.bias.zero_()
    router.bias[3] = 10.0
    choice = router(x)
    assert (choice.experts == 3).any(-1).all()
    scores = (x[0] @ router.weight.T).sigmoid()
    weights = scores.gather(1, choice.experts)
    assert torch.allclose(choice.weights, 1.5 * weights / weights.sum(-1, keepdim=True))


def test_bias_moves_towards_idle_experts_by_the_rate() -> None:
    router = build_router("sigmoid")
    before = router.bias.clone()
    load = torch.tensor([0.0, 10, 4, 4, 4, 2], dtype=torch.float64)
    router.update_bias(load)
    moved = router.bias - before
    direction = (load.mean() - load).sign()
    assert torch.allclose(moved, 0.01 * (direction - direction.mean()))
    assert abs(moved.mean().item()) < 1e-15


def test_aux_free_bias_evens_out_a_skewed_router() -> None:
    router = build_router("sigmoid", bias_rate=0.004)
    with torch.no_grad():
        router.weight[0] += 1.0
    x = torch.randn(4, 64, 5, dtype=torch.float64) + 1
    first = router(x).routing.load
    for _ in range(400):
        router.update_bias(router(x).routing.load)
    last = router(x).routing.load
    assert last.max() / last.mean() < 1.3 < first.max() / first.mean()


def test_balance_loss_is_least_for_an_even_router_and_trains_it() -> None:
    router = build_router("softmax", bias_rate=0.0)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.05)
    x = torch.randn(4, 64, 5, dtype=torch.float64) + 2
    first = router(x).routing
    for _ in range(300):
        optimizer.zero_grad()
        router(x).routing.balance_loss.backward()
        optimizer.step()
    last = router(x).routing
    assert last.balance_loss < first.balance_loss
    # Frequencies and shares both average to one: 1 per row is perfect balance, and most of the way is done.
    excess = [routing.balance_loss.item() / (0.5 * 4) - 1 for routing in (first, last)]
    assert excess[1] < 0.25 * excess[0]


def test_losses_are_sums_over_rows() -> None:
    config = small_architecture()
    model = random_model(config, torch.float64)
    ids = torch.randint(config.model.vocab_size, (4, 33))
    targets = ids.roll(-1, 1)
    whole = model.loss(ids, targets)
    parts = [model.loss(ids[i : i + 2], targets[i : i + 2]) for i in (0, 2)]
    for together, *apart in zip(whole, *parts, strict=True):
        assert torch.allclose(together, sum(apart), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_packed_documents_change_nothing_in_each_other_bit_for_bit(dtype: torch.dtype) -> None:
    config = small_architecture(["layout.ffn.pattern=dense"])
    (out, grad), (changed_out, changed_grad) = perturb_first_document(config, dtype)
    assert torch.equal(out, changed_out)
    assert torch.equal(grad, changed_grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_experts_keep_packed_documents_apart_up_to_rounding(dtype: torch.dtype) -> None:
    # Tokens of all documents share one matrix product per expert. Which rows stand beside a token changes
    # with the other documents, and the library that multiplies may round it differently; no more than that.
    (out, grad), (changed_out, changed_grad) = perturb_first_document(small_architecture(), dtype)
    assert_close([changed_out, changed_grad], [out, grad], 16 * torch.finfo(dtype).eps)


def perturb_first_document(
    config: Architecture, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Outputs of the second of two packed documents and its gradients, as a token of the first changes.

    No gradient may reach the first, in either.
    """
    model, vocab_size = random_model(config, dtype), config.model.vocab_size
    document = (torch.arange(96) >= 40).long()[None]
    position = torch.cat([torch.arange(40), torch.arange(56)])[None]
    ids = torch.randint(vocab_size, (1, 96))
    results = []
    for _ in range(2):
        x = torch.nn.functional.embedding(ids, model.embed.weight).detach().requires_grad_()
        hidden = x
        for block in model.blocks:
            hidden, _ = block(hidden, Sequence(position, document))
        out = model.norm(hidden)[:, 40:]
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        (grad,) = torch.autograd.grad((out * weight).sum(), x)
        assert torch.equal(grad[:, :40], torch.zeros_like(grad[:, :40]))
        results.append((out.detach(), grad[:, 40:]))
        ids[:, 17] = (ids[:, 17] + 1) % vocab_size
    return results
