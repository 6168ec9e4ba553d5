"""Both streams equal their direct forms in float64, and the alignment loss moves each towards the other."""

import pytest
import torch
from torch import Tensor

from model.mixer import Mixed, Sequence
from model.mixers.ssa import Ssa, SsaConfig
from tests.architectures import randomise
from tests.closeness import assert_close
from tests.contracts.test_mixers import packed

WIDTH, DEPTH = 20, 4
FIELDS = {
    "kind": "ssa",
    "num_heads": 4,
    "num_key_heads": 2,
    "head_dim": 6,
    "rotary_dim": 0,
    "rotary_theta": 100.0,
    "block": 4,
    "num_blocks": 4,
    "num_initial_blocks": 1,
    "num_local_blocks": 2,
    "stream": "sparse",
    "sparse_share": 0.5,
    "alignment_loss": 10.0,
}


def build(**fields) -> tuple[SsaConfig, Ssa]:
    config = SsaConfig.model_validate({**FIELDS, **fields})
    mixer = config.build(WIDTH, 0, DEPTH, 0.02).double()
    randomise(mixer)
    return config, mixer


def streams(config: SsaConfig, w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Gated outputs per head of full and sparse attention over one document, one query at a time."""
    tokens, heads, groups, dim = x.shape[0], config.num_heads, config.num_key_heads, config.head_dim
    parts = (x @ w["in_proj.weight"].T).split([heads * dim, groups * dim, groups * dim, heads], dim=-1)
    q, k, v = (part.view(tokens, -1, dim) for part in parts[:3])
    gate, size, repeat = parts[3].sigmoid(), config.block, heads // groups
    full, sparse = (torch.zeros(tokens, heads, dim, dtype=x.dtype) for _ in range(2))
    for t in range(tokens):
        own, complete = t // size, (t + 1) // size
        for g in range(groups):
            members = range(g * repeat, (g + 1) * repeat)
            scores = torch.zeros(own + 1, dtype=x.dtype)
            if complete:
                means = torch.stack(
                    [k[i * size : (i + 1) * size, g].mean(0) for i in range(complete)]
                ).detach()
                for h in members:
                    scores[:complete] += (means @ q[t, h].detach() * dim**-0.5).softmax(0)
            scores[: config.num_initial_blocks] = torch.inf
            scores[max(0, own + 1 - config.num_local_blocks) :] = torch.inf
            chosen = scores.topk(min(own + 1, config.num_blocks)).indices.tolist()
            seen = [s for i in chosen for s in range(i * size, (i + 1) * size) if s <= t]
            for h in members:
                for out, keys in ((full, list(range(t + 1))), (sparse, seen)):
                    p = (k[keys, g] @ q[t, h] * dim**-0.5).softmax(0)
                    out[t, h] = gate[t, h] * (p @ v[keys, g])
    return full, sparse


def smooth_l1(a: Tensor, b: Tensor) -> Tensor:
    gap = (a - b).abs()
    return torch.where(gap < 1, gap.square() / 2, gap - 0.5)


@pytest.mark.parametrize("uniform", [0.2, 0.7, None])
@pytest.mark.parametrize(
    "fields", [{}, {"stream": "full", "num_key_heads": 4, "block": 3}, {"num_blocks": 3}]
)
def test_equals_the_direct_form(uniform: float | None, fields: dict) -> None:
    config, mixer = build(**fields)
    x = torch.randn(1, 33, WIDTH, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        mixer.in_proj.weight *= 3  # far enough apart for both pieces of the loss
    sequence = Sequence.whole(x[..., 0].long())
    mixed = mixer(x, Sequence(sequence.position, None, sequence.tokens, uniform))
    mixed = mixed if isinstance(mixed, Mixed) else Mixed(mixed)
    weights = {name: p.detach().clone().requires_grad_() for name, p in mixer.named_parameters()}
    their_x = x.detach().clone().requires_grad_()
    full, sparse = streams(config, weights, their_x[0])
    is_sparse = config.stream == "sparse" if uniform is None else uniform < 0.5
    expected = (sparse if is_sparse else full).flatten(1) @ weights["out_proj.weight"].T
    weight = torch.randn_like(expected)
    ours, theirs = (mixed.out[0] * weight).sum(), (expected * weight).sum()
    if uniform is None:
        assert mixed.losses is None
    else:
        both = smooth_l1(full, sparse.detach()) + smooth_l1(sparse, full.detach())
        alignment = 10.0 / DEPTH * both.mean((1, 2)).sum()
        assert_close([mixed.losses["alignment"].detach()], [alignment.detach()], 1e-10)
        ours, theirs = ours + mixed.losses["alignment"], theirs + alignment
    ours = torch.autograd.grad(ours, [x, *mixer.parameters()])
    theirs = torch.autograd.grad(theirs, [their_x, *weights.values()])
    assert_close([mixed.out[0].detach(), *ours], [expected.detach(), *theirs], 1e-9)


def test_equal_streams_have_no_alignment_loss() -> None:
    _, mixer = build(num_blocks=30)
    x = torch.randn(1, 50, WIDTH, dtype=torch.float64)
    sequence = Sequence.whole(x[..., 0].long())
    mixed = mixer(x, Sequence(sequence.position, None, sequence.tokens, 0.1))
    assert mixed.losses["alignment"] < 1e-20


def test_the_share_of_sparse_steps_is_that_of_the_config() -> None:
    x = torch.randn(1, 40, WIDTH, dtype=torch.float64)
    sequence = Sequence.whole(x[..., 0].long())
    for share, uniform, is_sparse in (
        (0.0, 0.0, False),
        (1.0, 0.999, True),
        (0.3, 0.31, False),
        (0.3, 0.29, True),
    ):
        config, mixer = build(sparse_share=share)
        drawn = mixer(x, Sequence(sequence.position, None, sequence.tokens, uniform)).out
        other = config.model_copy(update={"stream": "sparse" if is_sparse else "full"}).build(
            WIDTH, 0, 4, 0.02
        )
        other.double().load_state_dict(mixer.state_dict())
        assert torch.equal(drawn, other(x, sequence))


def test_drawn_streams_keep_documents_apart() -> None:
    _, mixer = build()
    sequence, x = packed(1, 60), torch.randn(1, 60, WIDTH, dtype=torch.float64)
    together = mixer(x, Sequence(sequence.position, sequence.document, sequence.tokens, 0.1))
    assert sequence.document is not None
    sizes = torch.unique_consecutive(sequence.document[0], return_counts=True)[1].tolist()
    outs, losses = [], torch.zeros((), dtype=torch.float64)
    for part in x.split(sizes, dim=1):
        whole = Sequence.whole(part[..., 0].long())
        mixed = mixer(part, Sequence(whole.position, None, whole.tokens, 0.1))
        outs.append(mixed.out)
        losses = losses + mixed.losses["alignment"]
    assert_close([together.out, together.losses["alignment"]], [torch.cat(outs, dim=1), losses], 1e-12)
