import math
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.experts.reference import experts_direct
from model.block import Carry
from model.language_model import LanguageModel
from model.mixer import Sequence
from model.moe.layer import Moe
from model.moe.router import Router
from tests.architectures import random_model, randomise, small_architecture
from tests.closeness import SAME, assert_true


def build_router(score: str, **fields: object) -> Router:
    base = {
        "moe.num_experts": 6,
        "moe.score": score,
        "moe.weight_scale": 1.5,
        "moe.shared_hidden": 0,
        "moe.has_shared_gate": False,
        "moe.balance_loss": 0.5,
        "moe.bias_rate": 0.01,
    }
    fields = base | {f"moe.{name}": value for name, value in fields.items()}
    config = small_architecture([f"{key}={value}" for key, value in fields.items()]).moe
    router = Router(config, 5, 0.02).double()
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
    choice = router(x, torch.zeros(x.shape[:2], dtype=torch.long))
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
        balance += 7 * 0.5 * sum(6 / (2 * 7) * n * p for n, p in zip(counts, shares, strict=True))
    assert math.isclose(choice.routing.balance_loss.item(), balance, rel_tol=1e-12)
    assert choice.routing.load.tolist() == load


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_a_token_that_no_expert_wants_leaves_the_others_as_they_are(score: str, scope: str) -> None:
    router = build_router(score, balance_scope=scope).float()
    tokens, x = torch.zeros(2, 7, dtype=torch.long), torch.randn(2, 7, 5)
    unwanted = x.clone()
    with torch.no_grad():
        # The last expert is the mean of the others, so one input gives all the logit -300: scores of zero.
        router.weight[5] = router.weight[:5].mean(0)
        unwanted[1, 6] = torch.linalg.solve(router.weight[:5].double(), torch.full((5,), -300.0).double())
    unwanted.requires_grad_()
    usual, found = router(x, tokens), router(unwanted, tokens)
    (found.weights.sum() + found.routing.balance_loss + found.routing.entropy).backward()
    assert unwanted.grad is not None
    assert router.weight.grad is not None
    for part in (*found.routing, found.weights, unwanted.grad, router.weight.grad):
        assert torch.isfinite(part).all()
    assert torch.equal(found.weights[:13], usual.weights[:13])


def test_bias_steers_the_choice_but_not_the_weights() -> None:
    router = build_router("sigmoid")
    x = torch.randn(1, 50, 5, dtype=torch.float64)
    router.bias.zero_()
    router.bias[3] = 10.0
    choice = router(x, torch.zeros(x.shape[:2], dtype=torch.long))
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
    first = router(x, torch.zeros(x.shape[:2], dtype=torch.long)).routing.load
    for _ in range(400):
        router.update_bias(router(x, torch.zeros(x.shape[:2], dtype=torch.long)).routing.load)
    last = router(x, torch.zeros(x.shape[:2], dtype=torch.long)).routing.load
    assert last.max() / last.mean() < 1.3 < first.max() / first.mean()


def test_balance_loss_is_least_for_an_even_router_and_trains_it() -> None:
    router = build_router("softmax", bias_rate=0.0)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.05 / 64)
    x = torch.randn(4, 64, 5, dtype=torch.float64) + 2
    first = router(x, torch.zeros(x.shape[:2], dtype=torch.long)).routing
    for _ in range(300):
        optimizer.zero_grad()
        router(x, torch.zeros(x.shape[:2], dtype=torch.long)).routing.balance_loss.backward()
        optimizer.step()
    last = router(x, torch.zeros(x.shape[:2], dtype=torch.long)).routing
    assert last.balance_loss < first.balance_loss
    # Frequencies and shares both average to one: 1 per token is perfect balance, and most of the way is done.
    excess = [routing.balance_loss.item() / (0.5 * 4 * 64) - 1 for routing in (first, last)]
    assert excess[1] < 0.25 * excess[0]


def test_losses_are_sums_over_rows() -> None:
    config = small_architecture(["moe.z_loss=0.01", "model.mtp.depth=2"])
    model = random_model(config, torch.float64)
    ids = torch.randint(config.model.vocab_size, (4, 33))
    targets = ids.roll(-1, 1)
    whole = model.loss(ids, targets)
    parts = [model.loss(ids[i : i + 2], targets[i : i + 2]) for i in (0, 2)]
    assert set(whole.auxiliary) == {"balance", "router_z"}
    assert (whole.mtp > 0).all()
    for together, *apart in zip(whole.parts(), *(part.parts() for part in parts), strict=True):
        assert torch.allclose(together, sum(apart), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_packed_documents_change_nothing_in_each_other_bit_for_bit(dtype: torch.dtype) -> None:
    model = random_model(small_architecture(["layout.ffn.pattern=dense"]), dtype)
    (out, grad), (changed_out, changed_grad) = perturb_first_document(model, drawn_ids(model))
    assert torch.equal(out, changed_out)
    assert torch.equal(grad, changed_grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_experts_keep_packed_documents_apart_up_to_rounding(dtype: torch.dtype) -> None:
    # Tokens of all documents share one matrix product per expert. Which rows stand beside a token changes
    # with the other documents, and the library that multiplies may round it differently; no more than that.
    model = random_model(small_architecture(), dtype)
    ids, weights, exact = drawn_ids(model), list(model.parameters()), deepcopy(model).double()

    def truth(*weights: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            for parameter, weight in zip(exact.parameters(), weights, strict=True):
                parameter.copy_(weight)
        return 2 * list(perturb_first_document(exact, ids)[0])

    assert_true([x for pair in perturb_first_document(model, ids) for x in pair], truth, weights, SAME)


def drawn_ids(model: LanguageModel) -> torch.Tensor:
    return torch.randint(model.config.model.vocab_size, (1, 96))


def perturb_first_document(
    model: LanguageModel, ids: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Outputs of the second of two packed documents and its gradients, as a token of the first changes.

    No gradient may reach the first, in either.
    """
    document = (torch.arange(96) >= 40).long()[None]
    position = torch.cat([torch.arange(40), torch.arange(56)])[None]
    results, ids = [], ids.clone()
    for _ in range(2):
        x = torch.nn.functional.embedding(ids, model.embed.weight).detach().requires_grad_()
        hidden = x
        carry = Carry()
        for block in model.blocks:
            hidden, carry, _ = block(hidden, Sequence(position, document, ids), carry)
        out = model.norm(hidden)[:, 40:]
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        (grad,) = torch.autograd.grad((out * weight).sum(), x)
        assert torch.equal(grad[:, :40], torch.zeros_like(grad[:, :40]))
        results.append((out.detach(), grad[:, 40:]))
        ids[:, 17] = (ids[:, 17] + 1) % model.config.model.vocab_size
    return results


def choice_of(router: Router, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    choice = router(x, torch.zeros(x.shape[:2], dtype=torch.long))
    return choice.experts, choice.weights


@given(group_score=st.sampled_from(["max", "top2"]), kept=st.integers(1, 3), seed=st.integers(0, 2**20))
def test_groups_limit_the_choice(group_score: str, kept: int, seed: int) -> None:
    torch.manual_seed(seed)
    fields = {"num_experts": 12, "num_groups": 3, "kept_groups": kept, "group_score": group_score, "top_k": 3}
    router = build_router("sigmoid", **fields)
    x = torch.randn(1, 9, 5, dtype=torch.float64)
    experts, _ = choice_of(router, x)
    for t in range(9):
        ranked = (router.weight @ x[0, t]).sigmoid() + router.bias
        groups = [sorted(ranked[4 * g : 4 * g + 4].tolist(), reverse=True) for g in range(3)]
        worth = [values[0] if group_score == "max" else values[0] + values[1] for values in groups]
        best = sorted(range(3), key=lambda g: -worth[g])[:kept]
        legal = [e for e in range(12) if e // 4 in best]
        expected = sorted(legal, key=lambda e: -ranked[e].item())[:3]
        assert set(experts[t].tolist()) == set(expected)


def test_softmax_of_the_chosen_logits() -> None:
    router = build_router("softmax_of_chosen", has_router_bias=True, weight_scale=1.0)
    x = torch.randn(1, 20, 5, dtype=torch.float64)
    experts, weights = choice_of(router, x)
    logits = x[0] @ router.weight.T + router.logit_bias
    assert torch.equal((logits + router.bias).topk(2).indices.sort().values, experts.sort().values)
    assert torch.allclose(weights, logits.gather(1, experts).softmax(-1))


def test_square_root_of_softplus() -> None:
    router = build_router("sqrt_softplus")
    x = torch.randn(1, 20, 5, dtype=torch.float64)
    experts, weights = choice_of(router, x)
    scores = (1 + (x[0] @ router.weight.T).exp()).log().sqrt()
    assert torch.equal((scores + router.bias).topk(2).indices.sort().values, experts.sort().values)
    picked = scores.gather(1, experts)
    assert torch.allclose(weights, 1.5 * picked / picked.sum(-1, keepdim=True))


def test_hashed_tokens_go_where_the_table_says_with_weights_of_the_gate() -> None:
    config = small_architecture(["moe.num_experts=6", "moe.score=sqrt_softplus"]).moe
    router = Router(config, 5, 0.02, vocab_size=50).double()
    randomise(router, with_buffers=False)
    tokens = torch.arange(50).view(2, 25)
    x = torch.randn(2, 25, 5, dtype=torch.float64)
    choice = router(x, tokens)
    assert torch.equal(choice.experts, router.table[tokens.flatten()])
    assert all(len(set(row)) == 2 for row in router.table.tolist())
    load = torch.bincount(router.table.flatten(), minlength=6)
    assert load.max() <= 2 * load.min(), "the table spreads tokens"
    scores = (1 + (x.flatten(0, 1) @ router.weight.T).exp()).log().sqrt().gather(1, choice.experts)
    assert torch.allclose(choice.weights, scores / scores.sum(-1, keepdim=True))
    before = router.table.clone()
    router.update_bias(choice.routing.load)
    assert torch.equal(router.table, before)


def test_zero_experts_return_their_input() -> None:
    config = small_architecture(
        [
            "moe.num_experts=4",
            "moe.num_zero_experts=4",
            "moe.top_k=3",
            "moe.shared_hidden=0",
            "moe.has_shared_gate=false",
        ]
    )
    moe = Moe(config.moe, 32, 0, (0.02, 0.02)).double()
    randomise(moe)
    x = torch.randn(1, 12, 32, dtype=torch.float64)
    tokens = torch.zeros(1, 12, dtype=torch.long)
    out, _ = moe(x, tokens)
    choice = moe.router(x, tokens)
    direct = experts_direct(x[0], moe.experts.gate_up, moe.experts.down, choice.experts, choice.weights)
    zero = torch.where(choice.experts >= 4, choice.weights, 0.0).sum(-1, keepdim=True)
    assert (choice.experts >= 4).any()
    assert torch.allclose(out[0], direct + zero * x[0])


def test_z_loss_is_the_squared_log_sum_of_exponentials() -> None:
    router = build_router("softmax", z_loss=0.25)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    routing = router(x, torch.zeros(2, 7, dtype=torch.long)).routing
    expected = 0.25 * (x @ router.weight.T).exp().sum(-1).log().square().sum()
    assert torch.allclose(routing.z_loss, expected)


def test_balance_over_the_batch_counts_rows_together() -> None:
    scopes = {
        scope: build_router("softmax", balance_scope=scope) for scope in ("sequence", "batch", "global")
    }
    for router in scopes.values():
        router.load_state_dict(scopes["sequence"].state_dict())
    x, tokens = torch.randn(3, 8, 5, dtype=torch.float64), torch.zeros(3, 8, dtype=torch.long)
    losses = {scope: router(x, tokens).routing.balance_loss for scope, router in scopes.items()}
    as_one_row = scopes["sequence"](x.reshape(1, 24, 5), tokens.reshape(1, 24)).routing.balance_loss
    assert torch.allclose(losses["batch"], as_one_row)
    assert torch.allclose(losses["global"], as_one_row)
    assert not torch.allclose(losses["sequence"], as_one_row)
    # Shares of a global batch: with the load of all, the parts add up to the whole.
    whole = scopes["global"]
    load = whole(x, tokens).routing.load
    whole.sum_load = lambda _: load
    parts = [whole(x[i : i + 1], tokens[i : i + 1]).routing.balance_loss for i in range(3)]
    assert torch.allclose(sum(parts), as_one_row)


def test_a_shortcut_joins_one_layer_later() -> None:
    config = small_architecture(["layout.ffn.pattern=shortcut dense", "layout.pattern=attn", "model.depth=2"])
    model = random_model(config, torch.float64)
    tokens = torch.randint(64, (1, 9))
    sequence = Sequence.whole(tokens)
    x = torch.nn.functional.embedding(tokens, model.embed.weight)
    first, second = model.blocks
    h = x + first.mixer(first.mixer_residual.norm(x), sequence)
    inner = first.ffn_residual.norm(h)
    shortcut, _ = first.moe(inner, tokens)
    h = h + first.ffn(inner)
    h = h + second.mixer(second.mixer_residual.norm(h), sequence)
    h = h + second.ffn(second.ffn_residual.norm(h)) + shortcut
    assert torch.allclose(model(tokens), model.norm(h) @ model.head.weight.T, rtol=1e-10, atol=1e-10)


def test_prediction_ahead_sees_only_its_own_document() -> None:
    config = small_architecture(["model.mtp.depth=2", "model.mtp.ffn=dense"])
    model = random_model(config, torch.float64)
    ids = torch.randint(64, (1, 30))
    document = (torch.arange(30) >= 17).long()[None]
    position = torch.cat([torch.arange(17), torch.arange(13)])[None]
    targets = ids.roll(-1, 1)
    targets[0, [16, 29]] = -100
    whole = model.loss(ids, targets, Sequence(position, document, ids)).mtp
    parts = [model.loss(ids[:, a:b], targets[:, a:b]).mtp for a, b in ((0, 17), (17, 30))]
    assert (whole > 0).all()
    assert torch.allclose(whole, sum(parts), rtol=1e-10)
