"""What every model must hold: every layout, expert form and residual form, and any interleave of them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from conf.compose import compose, group_options
from conf.errors import ConfigError
from model.config import Architecture
from model.count import count
from model.initial import initialise
from model.language_model import LanguageModel, Losses
from model.mixer import Sequence
from tests.architectures import random_model, small_architecture
from tests.closeness import relative

LAYOUTS, MIXERS, RESIDUALS = (group_options(group) for group in ("layout", "mixer", "residual"))
# Every published form of experts, and what none combines.
EXPERTS = {
    "softmax": ["moe=softmax"],
    "sigmoid": ["moe=sigmoid"],
    "sqrt_softplus": ["moe=sigmoid", "moe.score=sqrt_softplus", "moe.weight_scale=1.5"],
    "softmax_of_chosen": ["moe.score=softmax_of_chosen", "moe.has_router_bias=true", "moe.has_bias=true"],
    "input_scaled": [
        "moe=sigmoid",
        "moe.top_k=1",
        "moe.scales_input=true",
        "moe.has_normalized_weights=false",
    ],
    "groups_max": ["moe.num_groups=4", "moe.kept_groups=2", "moe.has_normalized_weights=false"],
    "groups_top2": ["moe=sigmoid", "moe.num_groups=4", "moe.kept_groups=2", "moe.group_score=top2"],
    "zero_experts": ["moe.num_zero_experts=4", "moe.has_normalized_weights=false", "moe.bias_rate=0.001"],
    "hash": ["layout.ffn.pattern=hash moe"],
    "shortcut": ["layout.ffn.pattern=shortcut dense"],
    "dense_first": ["layout.ffn.first=dense"],
    "unshared": ["moe.shared_hidden=0", "moe.has_shared_gate=false"],
    "ungated": ["model.activation.kind=relu2"],
    "geglu": ["model.activation.kind=geglu"],
    "clamped": ["model.activation.limit=0.5"],
    "shifted": ["model.activation.kind=shifted_swiglu", "model.activation.limit=0.5"],
    "clamped_product": ["moe.activation.limit=0.5", "moe.activation.clamps_product=true"],
    "batch_balance": ["moe.balance_scope=batch", "moe.balance_loss=0.01"],
    "global_balance": ["moe.balance_scope=global", "moe.balance_loss=0.01"],
    "z_loss": ["moe.z_loss=0.01"],
}
OF_LAYOUTS = {f"layout={name}": [f"layout={name}", "model.depth=8"] for name in LAYOUTS}
FORMS = OF_LAYOUTS | {
    **{f"moe={name}": ["model.depth=2", "layout.pattern=attn", *lines] for name, lines in EXPERTS.items()},
    **{f"residual={name}": [f"residual={name}", "model.depth=2"] for name in RESIDUALS},
    "layer_norm": ["residual.norm=layer", "residual.has_zero_centered_norm=false", "model.depth=2"],
    "tied": ["model.has_tied_embeddings=true", "model.embedding_scale=5.0", "model.logit_cap=3.0"],
    "mtp": ["model.mtp.depth=2", "model.depth=2", "layout.pattern=attn"],
    "mtp_hidden_first": ["model.mtp.depth=1", "model.mtp.puts_hidden_first=true"],
}


# A layout mixes mixers that tests/contracts/test_mixers.py takes one by one.
on_every_form: pytest.MarkDecorator = pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[pytest.mark.prove] * (form in OF_LAYOUTS)) for form in FORMS]
)


def total_of(losses: Losses) -> torch.Tensor:
    return losses.cross_entropy + losses.mtp.sum() + sum(losses.auxiliary.values())


@on_every_form
def test_no_logits_depend_on_a_later_token(form: str) -> None:
    model = random_model(small_architecture(FORMS[form]), torch.float64)
    tokens = torch.randint(64, (1, 30))
    changed = tokens.clone()
    changed[:, 17] = (changed[:, 17] + 1) % 64
    before, after = model(tokens), model(changed)
    # Which rows an expert multiplies together changes the rounding of each.
    assert relative(after[:, :17], before[:, :17]) < 1e-12
    assert relative(after[:, 17], before[:, 17]) > 1e-6


@on_every_form
def test_packed_documents_equal_separate_ones(form: str) -> None:
    config = small_architecture(FORMS[form])
    # The balance of a row is not that of its documents; MTP modules route what lies behind an end.
    moe = config.moe.model_copy(update={"balance_loss": 0.0})
    mtp = config.model.mtp
    z_loss = 0.0 if mtp.depth else config.moe.z_loss
    config = config.model_copy(update={"moe": moe.model_copy(update={"z_loss": z_loss})})
    model = random_model(config, torch.float64)
    sizes, tokens = [11, 1, 18], torch.randint(64, (1, 30))
    document = torch.repeat_interleave(torch.tensor(sizes))[None]
    position = torch.cat([torch.arange(size) for size in sizes])[None]
    targets = tokens.roll(-1, 1)
    parameters = list(model.parameters())
    together = model.loss(tokens, targets, Sequence(position, document, tokens, 0.3))
    packed = torch.autograd.grad(total_of(together), parameters, allow_unused=True)
    apart = [
        model.loss(part, target, replace(Sequence.whole(part), uniform=0.3))
        for part, target in zip(tokens.split(sizes, 1), targets.split(sizes, 1), strict=True)
    ]
    separate = torch.autograd.grad(sum(total_of(losses) for losses in apart), parameters, allow_unused=True)
    assert relative(together.cross_entropy, sum(losses.cross_entropy for losses in apart)) < 1e-12
    scale = max(grad.abs().max() for grad in packed if grad is not None)
    for (name, _), a, b in zip(model.named_parameters(), packed, separate, strict=True):
        if a is not None and b is not None:
            assert (a - b).abs().max() < 1e-10 * scale, name
        else:
            assert a is b, name


@pytest.mark.parametrize("form", FORMS)
def test_counts_and_trains_every_parameter(form: str) -> None:
    trains_every_parameter(small_architecture(FORMS[form]))


def trains_every_parameter(config: Architecture) -> None:
    """Two steps of AdamW: finite, and between them every parameter has had a gradient and has moved."""
    torch.manual_seed(0)
    model = LanguageModel(config)
    initialise(model, 0)
    assert sum(parameter.numel() for parameter in model.parameters()) == count(config).total
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    tokens = torch.randint(64, (2, 40))
    position = torch.arange(40).expand(2, -1)
    document = torch.zeros_like(tokens)
    seen: set[str] = set()
    # The draws are such that what goes by chance goes both ways.
    for uniform in (0.2, 0.8):
        losses = model.loss(tokens, tokens.roll(-1, 1), Sequence(position, document, tokens, uniform))
        optimizer.zero_grad()
        total_of(losses).backward()
        optimizer.step()
        model.update_expert_biases(losses.load)
        assert torch.isfinite(total_of(losses))
        seen |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, first[name])}
    assert not set(first) - seen, "never had a gradient"
    assert not set(first) - moved, "never moved"


patterns = st.lists(st.sampled_from([*MIXERS, "none"]), min_size=1, max_size=5)
ffns = st.lists(st.sampled_from(["moe", "dense", "hash", "none", "shortcut dense"]), min_size=1, max_size=3)


@pytest.mark.prove
@settings(
    max_examples=40,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(
    mixers=patterns,
    ffns=ffns,
    experts=st.sampled_from(sorted(EXPERTS)),
    residual=st.sampled_from(RESIDUALS),
    depth=st.integers(1, 6),
    mtp=st.integers(0, 2),
    mtp_mixer=st.sampled_from(MIXERS),
)
def test_any_interleave_builds_counts_and_trains(
    mixers: list[str],
    ffns: list[str],
    experts: str,
    residual: str,
    depth: int,
    mtp: int,
    mtp_mixer: str,
) -> None:
    lines = [line for line in EXPERTS[experts] if not line.startswith("layout")]
    overrides = [
        *(f"residual={residual}", *lines, "moe.balance_loss=0.01", f"model.depth={depth}"),
        *(f"layout.pattern={' '.join(mixers)}", f"layout.ffn.pattern={' '.join(ffns)}"),
        *(f"model.mtp.depth={mtp}", f"model.mtp.mixer={mtp_mixer}"),
    ]
    try:
        config = small_architecture(overrides)
    except ConfigError as error:
        said = str(error)
    else:
        trains_every_parameter(config)
        return
    # What does not fit says which line of the layout it is; nothing else may be wrong with these.
    assert said.startswith(("layout", "model.mtp.mixer")), said
    assume(False)


@pytest.mark.parametrize("layout", ["dsa_shared", "attn dsa_shared dsa", "dsa_shared dsa"])
def test_shared_keys_need_a_layer_that_chose_them(layout: str) -> None:
    with pytest.raises(ConfigError, match=r"layer \d, dsa_shared, shares the keys .* put one of dsa"):
        compose([f"layout.pattern={layout}", "layout.first=", "layout.last="], Architecture)
    with pytest.raises(ConfigError, match=r"model.mtp.mixer: dsa_shared"):
        compose(["model.mtp.depth=1", "model.mtp.mixer=dsa_shared"], Architecture)
