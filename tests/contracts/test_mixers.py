"""What every mixer must hold, for every entry of conf/mixer/: a new file is tested without an edit here."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conf.compose import group_options
from model.mixer import Mixed, Mixer, MixerConfig, Sequence, mixer_kinds
from tests.architectures import randomise, small_architecture

WIDTH, DEPTH = 32, 4
ENTRIES = group_options("mixer")


@pytest.fixture(params=ENTRIES)
def config(request: pytest.FixtureRequest) -> MixerConfig:
    return small_architecture().mixer[request.param]


def build(config: MixerConfig, dtype: torch.dtype = torch.float64) -> Mixer:
    mixer = config.build(WIDTH, 1, DEPTH, 0.02).to(dtype)
    randomise(mixer)
    return mixer


def packed(rows: int, tokens: int, starts: float = 0.15) -> Sequence:
    document = (torch.rand(rows, tokens) < starts).long().cumsum(1)
    is_start = torch.nn.functional.pad(document.diff(dim=1) != 0, (1, 0), value=True)
    index = torch.arange(tokens).expand(rows, -1)
    position = index - torch.where(is_start, index, 0).cummax(1).values
    return Sequence(position, document, torch.randint(100, (rows, tokens)))


def one_document(x: Tensor) -> Sequence:
    return Sequence.whole(torch.arange(x.shape[1]).expand(x.shape[0], -1))


def run(mixer: Mixer, x: Tensor, sequence: Sequence) -> Mixed:
    """What the mixer returns; one that shares the keys of an earlier layer gets the nearest ones."""
    if mixer.shares_selection:
        reach = torch.arange(x.shape[1])[:, None] - torch.arange(5)
        is_seen = reach[None] >= (torch.arange(x.shape[1]) - sequence.position)[..., None]
        selection = torch.where(is_seen, reach[None], -1).expand(x.shape[0], -1, -1)
        mixed = mixer(x, sequence, selection)
    else:
        mixed = mixer(x, sequence)
    return Mixed(mixed) if isinstance(mixed, Tensor) else mixed


def objective(mixed: Mixed, weight: Tensor) -> Tensor:
    """A number that every output and every loss of the mixer goes into."""
    return (mixed.out * weight).sum() + sum((mixed.losses or {}).values())


def shapes_of(mixer: Mixer) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in mixer.named_parameters()}


def test_every_kind_has_an_entry() -> None:
    entries = small_architecture().mixer
    assert {entry.kind for entry in entries.values()} == set(mixer_kinds())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shape_dtype_and_finite_gradients(config: MixerConfig, dtype: torch.dtype) -> None:
    mixer = build(config, torch.promote_types(dtype, torch.float32))
    x = torch.randn(2, 70, WIDTH, dtype=dtype, requires_grad=True)
    mixed = run(mixer, x, packed(2, 70))
    assert mixed.out.shape == x.shape
    assert mixed.out.dtype == dtype
    objective(mixed, mixed.out.detach()).float().backward()
    for name, leaf in [("x", x), *mixer.named_parameters()]:
        assert leaf.grad is not None, name
        assert torch.isfinite(leaf.grad).all(), name
        assert leaf.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("token", [0, 1, 40, 69])
def test_no_token_sees_a_later_one(config: MixerConfig, dtype: torch.dtype, token: int) -> None:
    mixer, x = build(config, dtype), torch.randn(1, 70, WIDTH, dtype=dtype)
    changed = x.clone()
    changed[:, token] += 1.0
    before, after = (run(mixer, part, one_document(part)).out for part in (x, changed))
    assert torch.equal(before[:, :token], after[:, :token])
    assert not torch.equal(before[:, token], after[:, token])


def test_packed_documents_equal_separate_ones(config: MixerConfig) -> None:
    mixer, sequence = build(config), packed(1, 90)
    x = torch.randn(1, 90, WIDTH, dtype=torch.float64)
    weight = torch.randn_like(x)
    together = outputs_and_all_grads(mixer, x, weight, sequence)
    assert sequence.document is not None
    sizes = torch.unique_consecutive(sequence.document[0], return_counts=True)[1].tolist()
    assert len(sizes) > 3
    parts = [
        outputs_and_all_grads(mixer, part, part_weight, one_document(part))
        for part, part_weight in zip(x.split(sizes, 1), weight.split(sizes, 1), strict=True)
    ]
    apart = [torch.cat([part[i] for part in parts], dim=1) for i in (0, 1)]
    apart += [sum(grads) for grads in zip(*(part[2:] for part in parts), strict=True)]
    for ours, reference in zip(together, apart, strict=True):
        assert torch.allclose(ours, reference, rtol=1e-10, atol=1e-12)


def outputs_and_all_grads(mixer: Mixer, x: Tensor, weight: Tensor, sequence: Sequence) -> list[Tensor]:
    x = x.detach().requires_grad_()
    mixed = run(mixer, x, sequence)
    grads = torch.autograd.grad(objective(mixed, weight), [x, *mixer.parameters()])
    return [mixed.out.detach(), *grads]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_another_document_changes_nothing_bit_for_bit(config: MixerConfig, dtype: torch.dtype) -> None:
    mixer, x = build(config, dtype), torch.randn(1, 90, WIDTH, dtype=dtype)
    document = (torch.arange(90) >= 37).long() + (torch.arange(90) >= 70).long()
    index = torch.arange(90)
    position = index - torch.tensor([0, 37, 70])[document]
    sequence = Sequence(position[None], document[None], index[None])
    middle = (document == 1)[None, :, None]
    changed = torch.where(middle, x, torch.randn_like(x))
    weight = torch.randn_like(x) * middle
    first = outputs_and_all_grads(mixer, x, weight, sequence)
    second = outputs_and_all_grads(mixer, changed, weight, sequence)
    for a, b in zip(first[:2], second[:2], strict=True):
        assert torch.equal(a * middle, b * middle)
    assert torch.equal(second[1] * ~middle, torch.zeros_like(x)), "a gradient crossed into another document"


def test_says_which_losses_it_has(config: MixerConfig) -> None:
    mixed = run(build(config, torch.float32), torch.randn(1, 70, WIDTH), replace(packed(1, 70), uniform=0.5))
    assert tuple(mixed.losses or ()) == config.losses


def test_builds_on_meta_and_counts_itself(config: MixerConfig) -> None:
    with torch.device("meta"):
        mixer = config.build(WIDTH, 0, DEPTH, 0.02)
    assert sum(parameter.numel() for parameter in mixer.parameters()) == config.count_params(WIDTH)
    flops = config.flops(WIDTH, 128)
    assert flops.core > 0
    matrices = sum(p.numel() for name, p in mixer.named_parameters() if name.endswith("_proj.weight"))
    assert flops.projections == 2 * matrices
    assert 0 < config.cache_bytes(64) <= config.cache_bytes(1024)
    assert config.activation_bytes(WIDTH) > 0
    # Layers of a kind are alike wherever they stand.
    with torch.device("meta"):
        last = config.build(WIDTH, DEPTH - 1, DEPTH, 0.02)
    assert shapes_of(last) == shapes_of(mixer)


def test_every_parameter_says_how_it_splits(config: MixerConfig) -> None:
    mixer, tp_plan = build(config), config.tp_plan(WIDTH)
    parameters = dict(mixer.named_parameters())
    assert set(tp_plan) == set(parameters)
    for name, split in tp_plan.items():
        if split.dim is not None and split.rows is not None:
            assert sum(split.rows) == parameters[name].shape[split.dim], name


def test_state_dict_round_trip(config: MixerConfig) -> None:
    mixer, other = build(config), build(config)
    other.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 20, WIDTH, dtype=torch.float64)
    sequence = one_document(x)
    assert torch.equal(run(mixer, x, sequence).out, run(other, x, sequence).out)
