"""Attention over compressed entries in Triton: packed rows, choices of blocks, strides, and defects."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention import triton_backward_keys, triton_forward
from kernels.choose import use_backends
from kernels.compressed_attention import entry_attention, entry_importance, joint_attention, select_by_entries
from kernels.compressed_attention import triton as triton_form
from kernels.compressed_attention.entries import entry_attention_direct
from kernels.compressed_attention.shapes import JointShape, Shape
from kernels.compressed_attention.spec import (
    SMALL,
    SMALL_MASS,
    JointPacked,
    Packed,
    draw_entries,
    draw_joint,
)
from kernels.compressed_attention.triton import (
    entry_attention_triton,
    joint_attention_triton,
    seen_entries,
    select_by_entries_triton,
)
from kernels.document_windows import document_windows
from kernels.spec import input_factory, relative_errors
from tests.closeness import assert_kernel, relative

pytestmark = pytest.mark.interpreted

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


def positions_of(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def assert_true(found: dict[str, float], limit: float = 1e-5) -> None:
    assert len(found) > 0
    assert max(found.values()) <= limit, found


@given(
    tokens=st.integers(1, 60),
    shape=st.sampled_from([(4, 2), (3, 3), (6, 2), (32, 16), (1, 1), (5, 1)]),
    mean=st.sampled_from([1.0, 5.0, 20.0]),
    cut=st.integers(0, 9),
    seed=st.integers(0, 2**20),
)
def test_what_a_query_sees_is_an_interval_of_filled_slots(tokens, shape, mean, cut, seed) -> None:
    # A row may open in the middle of a document.
    position = input_factory(torch.float32, seed=seed).documents(2, tokens + cut, mean)[1][:, cut:]
    windows = document_windows(position, *shape)
    low, high, _ = seen_entries(windows, position)
    slot = torch.arange(windows.start.shape[1])
    assert torch.equal(windows.is_seen(position), (slot >= low[..., None]) & (slot < high[..., None]))
    assert (low.diff(dim=1) >= 0).all()
    assert (high.diff(dim=1) >= 0).all()
    assert (low <= high).all()


@settings(max_examples=6)
@given(
    tokens=st.integers(1, 40),
    repeat=st.sampled_from([1, 3, 4, 16]),
    dims=st.sampled_from([(8, 8), (24, 16), (16, 48)]),
    sizes=st.sampled_from([(4, 2, 4), (3, 3, 3), (6, 2, 8), (16, 8, 16)]),
    # At least the blocks that go first: which of those are left out is not defined.
    count=st.integers(2, 5),
    mean=st.sampled_from([0.0, 3.0, 20.0]),
    dtype=st.sampled_from(list(LIMITS)),
    seed=st.integers(0, 2**20),
)
def test_any_entries_and_blocks(tokens, repeat, dims, sizes, count, mean, dtype, seed) -> None:
    shape = Shape(2, tokens, repeat, 1, *dims, *sizes, count)
    case = draw_entries(Packed(shape, mean), input_factory(dtype, seed=seed, uses_small_tiles=True))
    assert_kernel(case, LIMITS[dtype])


@settings(max_examples=6)
@given(
    tokens=st.integers(1, 40),
    heads=st.sampled_from([1, 3, 16]),
    dim=st.sampled_from([4, 16, 48, 288]),
    length=st.sampled_from([2, 5, 16]),
    window=st.sampled_from([1, 5, 70]),
    mean=st.sampled_from([0.0, 3.0, 20.0]),
    dtype=st.sampled_from(list(LIMITS)),
    seed=st.integers(0, 2**20),
)
def test_any_window_and_entries(tokens, heads, dim, length, window, mean, dtype, seed) -> None:
    # With a key or two beside a sink the gradient of a score is a difference of numbers that bfloat16 rounds.
    least = 8 if dtype == torch.bfloat16 else 1
    shape = JointShape(1, max(tokens, least), heads, dim, length, window, None)
    case = draw_joint(JointPacked(shape, mean), input_factory(dtype, seed=seed, uses_small_tiles=True))
    assert_kernel(case, LIMITS[dtype])


def entry_options(position: Tensor) -> dict[str, Any]:
    windows = {"entries": document_windows(position, 4, 2), "blocks": document_windows(position, 4, 4)}
    return windows | {"position": position, "scale": 0.5, "choice": {"count": 3, "initial": 1, "local": 1}}


def entry_inputs(position: Tensor, heads: int = 4, key_heads: int = 2) -> dict[str, Tensor]:
    tokens, slots = position.shape[1], document_windows(position, 4, 2).start.shape[1]
    shapes = {"q": (1, tokens, heads, 16), "k": (1, slots, key_heads, 16), "v": (1, slots, key_heads, 8)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("chunk", [1, 77, 1 << 24])
def test_chunks_change_no_choice(chunk: int) -> None:
    position = positions_of(13, 1, 30)
    inputs, options = entry_inputs(position), entry_options(position)
    more = {"tiles": SMALL, "tile": SMALL_MASS, "chunk": chunk}
    _, found = entry_attention_triton(**inputs, **options, **more)
    expected = entry_attention_direct(**{name: x.double() for name, x in inputs.items()}, **options)[1]
    assert torch.equal(found.sort(-1).values, expected.sort(-1).values)
    assert torch.equal(select_by_entries_triton(inputs["q"], inputs["k"], **options, **more), found)


def test_equal_entries_are_chosen_in_order_of_slots() -> None:
    position = positions_of(40)
    inputs, options = entry_inputs(position), entry_options(position)
    inputs["k"] = torch.zeros_like(inputs["k"])
    options["choice"] = {"count": 3, "initial": 0, "local": 0}
    # Blocks share entries with their neighbours: the first one has less than those between.
    _, found = entry_attention_triton(**inputs, **options, tiles=SMALL, tile=SMALL_MASS)
    expected = entry_attention_direct(**{name: x.double() for name, x in inputs.items()}, **options)[1]
    assert torch.equal(found.sort(-1).values, expected.sort(-1).values)


def test_queries_without_entries_get_zero_and_no_gradient() -> None:
    position = positions_of(3, 2, 20)
    inputs = {name: x.requires_grad_() for name, x in entry_inputs(position).items()}
    out, found = entry_attention_triton(**inputs, **entry_options(position), tiles=SMALL, tile=SMALL_MASS)
    assert torch.equal(out[:, :8], torch.zeros_like(out[:, :8]))
    assert (found[:, :8] == -1).all()
    grads = torch.autograd.grad(out.sum(), list(inputs.values()))
    assert torch.equal(grads[0][:, :8], torch.zeros_like(grads[0][:, :8]))
    assert (grads[0][:, 12:] != 0).any()
    # Slots that no window fills are seen by nobody.
    empty = ~document_windows(position, 4, 2).is_filled
    assert empty.any()
    for grad in grads[1:]:
        assert torch.isfinite(grad).all()
        assert torch.equal(grad[empty], torch.zeros_like(grad[empty]))


def joint_inputs(position: Tensor, dim: int = 16) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tokens, windows = position.shape[1], document_windows(position, 4, 4)
    shapes = {"q": (1, tokens, 4, dim), "kv": (1, tokens, dim), "entries": (1, windows.start.shape[1], dim)}
    inputs = {name: torch.randn(shape) for name, shape in shapes.items()} | {"sinks": torch.randn(4)}
    return inputs, {"windows": windows, "position": position, "scale": 0.3, "window": 6}


@pytest.mark.parametrize("dim", [16, 512])
def test_later_tokens_change_no_bit_and_a_second_run_none(dim: int) -> None:
    inputs, options = joint_inputs(positions_of(40), dim)
    before, _ = joint_attention_triton(**inputs, **options, tiles=SMALL)
    assert torch.equal(before, joint_attention_triton(**inputs, **options, tiles=SMALL)[0])
    for t in (0, 11, 30):
        changed = {name: x.clone() for name, x in inputs.items()}
        changed["q"][:, t + 1 :] += 5.0
        changed["kv"][:, t + 1 :] += 5.0
        changed["entries"][:, (t + 1) // 4 :] += 5.0
        after, _ = joint_attention_triton(**changed, **options, tiles=SMALL)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1 :], after[:, t + 1 :])


def test_packed_documents_equal_separate_ones() -> None:
    lengths = (24, 8, 40)
    inputs, options = joint_inputs(positions_of(*lengths))
    packed, _ = joint_attention_triton(**inputs, **options, tiles=SMALL)
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        part = {"q": inputs["q"][:, own], "kv": inputs["kv"][:, own], "sinks": inputs["sinks"]}
        part["entries"] = inputs["entries"][:, start // 4 : (start + length) // 4]
        position = positions_of(length)
        own_options = options | {"windows": document_windows(position, 4, 4), "position": position}
        separate, _ = joint_attention_triton(**part, **own_options, tiles=SMALL)
        assert torch.equal(packed[:, own], separate)
        start += length


def test_strided_inputs_and_runs_of_the_same_bits() -> None:
    position = positions_of(17, 20)
    inputs, options = joint_inputs(position)
    dense = gradients(inputs, options)
    across = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in inputs.items()}
    across["q"] = torch.cat([inputs["q"], inputs["q"]], dim=-1)[..., :16]
    for other in (inputs, across):
        assert all(torch.equal(a, b) for a, b in zip(gradients(other, options), dense, strict=True))


def gradients(inputs: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, ...]:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out, _ = joint_attention_triton(**leaves, **options, tiles=SMALL)
    return torch.autograd.grad((out * out).sum(), list(leaves.values()))


def test_the_public_functions_run_these_kernels() -> None:
    position = positions_of(13, 30)
    inputs, options = entry_inputs(position), entry_options(position)
    options |= options.pop("choice")
    scored = {name: options[name] for name in ("entries", "blocks", "position", "scale")}
    joined, joint_options = joint_inputs(position)
    with use_backends({"compressed_attention": "triton"}):
        out, found = entry_attention(**inputs, **options)
        alone = select_by_entries(inputs["q"], inputs["k"], **options)
        importance = entry_importance(inputs["q"], inputs["k"], **scored)
        joint, mass = joint_attention(**joined, selected=None, **joint_options)
    exact = {name: x.double() for name, x in inputs.items()}
    plain, expected = entry_attention(**exact, **options)
    assert relative(out, plain) <= LIMITS[torch.float32]
    assert torch.equal(found.sort(-1).values, expected.sort(-1).values)
    assert torch.equal(alone, found)
    plain = entry_importance(exact["q"], exact["k"], **scored)
    assert relative(importance, plain) <= LIMITS[torch.float32]
    exact = {name: x.double() for name, x in joined.items()}
    plain, empty = joint_attention(**exact, selected=None, **joint_options)
    assert relative(joint, plain) <= LIMITS[torch.float32]
    assert mass.shape == empty.shape


@triton.jit
def one_entry_too_many(token, low, high, window, LOW: tl.constexpr, HIGH: tl.constexpr):
    begin = tl.load(low + token)
    return begin, tl.load(high + token) + 1 if HIGH == 1 else token + 1


@triton.jit
def no_queries(key, first, end, tokens, window, LOW: tl.constexpr, HIGH: tl.constexpr):
    begin = key
    if HIGH == 1:
        begin = tl.load(first + key) + 1
    return begin, tl.load(end + key)


def test_a_defect_in_a_kernel_is_seen(monkeypatch) -> None:
    inputs = JointPacked(JointShape(1, 45, 2, 16, 4, 6, None), 20.0)
    draw = lambda: draw_joint(inputs, input_factory(torch.float32, uses_small_tiles=True))  # noqa: E731
    assert_kernel(draw())
    with monkeypatch.context() as patch:
        patch.setattr(triton_forward, "attention_interval", one_entry_too_many)
        assert relative_errors(draw())["out0"] > 1e-3
    with monkeypatch.context() as patch:
        patch.setattr(triton_backward_keys, "attention_query_interval", no_queries)
        assert relative_errors(draw())["grad entries"] > 1e-3


def test_a_lost_head_in_the_choice_is_seen(monkeypatch) -> None:
    position = positions_of(60)
    inputs, options = entry_inputs(position), entry_options(position)
    more = {"tiles": SMALL, "tile": SMALL_MASS}
    right = select_by_entries_triton(inputs["q"], inputs["k"], **options, **more)
    mass = triton_form.attention_mass

    def of_the_first_head(q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> Tensor:
        return mass(q[:, :, ::2].contiguous(), k, lse[:, :, ::2].contiguous(), *rest)

    monkeypatch.setattr(triton_form, "attention_mass", of_the_first_head)
    assert not torch.equal(right, select_by_entries_triton(inputs["q"], inputs["k"], **options, **more))
