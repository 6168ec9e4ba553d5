"""Kernels that work row by row, where they are hardest: extreme numbers, strides, and seeded defects."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.activation import triton as activations
from kernels.compress import triton as compressors
from kernels.convolution import triton as convolutions
from kernels.convolution.spec import draw as draw_convolution
from kernels.cross_entropy import IGNORED, LossOptions
from kernels.cross_entropy import triton as losses
from kernels.cross_entropy.reference import linear_cross_entropy_direct
from kernels.cross_entropy.triton import linear_cross_entropy_triton
from kernels.norm import triton as norms
from kernels.norm.reference import rms_norm_direct
from kernels.norm.triton import rms_norm_triton, unit_norm_triton
from kernels.rotary import triton as rotations
from kernels.rotary.reference import rotate_direct
from kernels.rotary.triton import rotate_triton
from kernels.sinkhorn import triton as normalisers
from kernels.spec import KernelCase, input_factory, kernel_specs, relative_errors
from tests.closeness import assert_kernel, relative

pytestmark = pytest.mark.interpreted
LIMIT = 1e-5


def case_of(name: str, index: int) -> KernelCase:
    spec = next(s for s in kernel_specs(name.split(".")[0]) if s.name == name)
    return spec.draw(spec.shapes[index], input_factory(torch.float32, uses_small_tiles=True))


def as_kernel(function):
    return triton.jit(function)


def gate_without_slope(gate, KIND: tl.constexpr):
    share = tl.sigmoid(gate)
    return gate * share, share


def factors_without_limit(gate, up, limit, KIND: tl.constexpr, CLAMP: tl.constexpr):
    share = tl.sigmoid(gate)
    return gate * share, up, share + gate * share * (1.0 - share), up == up


def read_from_any_document(
    x, initial_state, document, first, shifts, channel, row, tokens, channels, row_stride, token_stride, own,
    TAPS: tl.constexpr, HAS_INITIAL_STATE: tl.constexpr, HAS_DOCUMENT: tl.constexpr,
):  # fmt: skip
    index = first + shifts
    is_in = ((index >= 0) & (index < tokens))[:, None] & (channel < channels)[None, :]
    source = x + row * row_stride + index[:, None] * token_stride + channel[None, :]
    return tl.load(source, mask=is_in, other=0.0).to(tl.float32)


def largest_of_columns(matrix, eps, IS_ROW: tl.constexpr):
    if IS_ROW:
        total = tl.sum(matrix, axis=1)[:, None, :] + eps
    else:
        total = tl.max(matrix, axis=0)[None, :, :] + eps
    return total


def logits_without_cap(logits, base, column, width, cap, HAS_CAP: tl.constexpr):
    x = tl.load(logits + base + column, mask=column < width, other=float("-inf")).to(tl.float32)
    return x, tl.where(x == x, 1.0, 1.0)


def tile_without_bias(
    values, gates, bias, row, begin, offset, channel, tokens, width, length, part, dim, is_part,
    values_row, values_token, gates_row, gates_token,
):  # fmt: skip
    is_in = (is_part & (offset < length))[:, None] & (channel < dim)[None, :]
    column = part * dim + channel
    ptrs = values + row * values_row + begin * values_token + offset[:, None] * values_token
    value = tl.load(ptrs + column[None, :], mask=is_in, other=0.0).to(tl.float32)
    ptrs = gates + row * gates_row + begin * gates_token + offset[:, None] * gates_token
    gate = tl.load(ptrs + column[None, :], mask=is_in, other=0.0).to(tl.float32)
    return value, tl.where(is_in, gate, float("-inf")), is_in


DEFECTS = [
    pytest.param(norms, "norm_gate", gate_without_slope, "norm.gated", 0, id="norm"),
    pytest.param(activations, "activation_factors", factors_without_limit, "activation", 1, id="activation"),
    pytest.param(
        convolutions, "convolution_read", read_from_any_document, "convolution", 1, id="convolution"
    ),
    pytest.param(normalisers, "sinkhorn_total", largest_of_columns, "sinkhorn", 2, id="sinkhorn"),
    pytest.param(losses, "cross_entropy_logits", logits_without_cap, "cross_entropy", 2, id="cross_entropy"),
    pytest.param(compressors, "compress_gate_tile", tile_without_bias, "compress.csa", 1, id="compress"),
]


@pytest.mark.parametrize(("module", "name", "defect", "spec", "index"), DEFECTS)
def test_a_defect_in_a_kernel_is_seen(module, name, defect, spec, index, monkeypatch) -> None:
    case = case_of(spec, index)
    assert_kernel(case, LIMIT)
    monkeypatch.setattr(module, name, as_kernel(defect))
    assert not max(relative_errors(case).values()) <= 1e-3


def test_a_lost_turn_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = rotations._launch
    case = case_of("rotary", 2)
    monkeypatch.setattr(
        rotations, "_launch", lambda x, cos, sin, sign, *rest: launch(x, cos, sin, 1.0, *rest)
    )
    found = relative_errors(case)
    assert found["out0"] <= LIMIT
    assert found["grad x"] > 1e-2


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_norm_of_any_scale_and_of_zeros(scale: float) -> None:
    x = torch.randn(7, 20) * scale
    x[2] = 0.0
    case = KernelCase(
        {"x": x, "weight": torch.randn(20)},
        lambda x, weight: (rms_norm_triton(x, weight, 1e-6),),
        lambda x, weight: (rms_norm_direct(x, weight, 1e-6),),
    )
    assert_kernel(case, LIMIT)
    unit = unit_norm_triton(x)
    assert torch.isfinite(unit).all()
    assert torch.equal(unit[2], torch.zeros(20))


@pytest.mark.parametrize("ignored", [False, True])
def test_large_logits_and_nothing_but_ignored_targets(ignored: bool) -> None:
    x, weight = torch.randn(6, 8) * 30.0, torch.randn(19, 8) * 3.0
    targets = torch.full((6,), IGNORED) if ignored else torch.randint(19, (6,))
    form = LossOptions(z=1e-4)
    case = KernelCase(
        {"x": x, "weight": weight},
        lambda x, weight: linear_cross_entropy_triton(x, weight, targets, form),
        lambda x, weight: linear_cross_entropy_direct(x, weight, targets, form),
    )
    assert_kernel(case, LIMIT)


@settings(max_examples=6)
@given(
    tokens=st.integers(1, 12),
    taps=st.integers(1, 5),
    flags=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 2**20),
)
def test_convolution_of_any_form(tokens: int, taps: int, flags: tuple[bool, ...], seed: int) -> None:
    from kernels.convolution.shapes import Shape

    has_documents, has_bias, has_state, has_silu = flags
    shape = Shape(2, tokens, 5, taps, has_documents, has_bias, has_state and taps > 1, has_silu)
    case = draw_convolution(shape, input_factory(torch.float32, seed=seed, uses_small_tiles=True))
    assert_kernel(case, LIMIT)


def test_a_turned_row_is_turned_back_and_a_strided_one_is_read_where_it_lies() -> None:
    x = torch.randn(2, 5, 3, 24)[..., ::2]
    angles = torch.rand(1, 5, 4) * 6
    ours = rotate_triton(x, angles.cos(), angles.sin(), "interleaved", on_last=True)
    table = angles.cos().double(), angles.sin().double()
    assert relative(ours, rotate_direct(x.double(), *table, "interleaved", on_last=True)) <= LIMIT
    back = rotate_triton(ours, angles.cos(), -angles.sin(), "interleaved", on_last=True)
    assert relative(back, x) <= LIMIT


@pytest.mark.parametrize("name", ["norm.gated", "activation", "convolution", "sinkhorn", "compress.csa"])
def test_twice_the_same_is_bitwise_the_same(name: str) -> None:
    from kernels.spec import outputs_and_grads

    case = case_of(name, 1)
    first, second = (outputs_and_grads(case.triton, case.inputs) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_new_memory_is_no_number_until_it_is_written() -> None:
    assert torch.empty(4).isnan().all()
    assert torch.randn(3, 4)[:, :2].new_empty(2).isnan().all()
