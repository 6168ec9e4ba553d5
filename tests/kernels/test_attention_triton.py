"""Attention in Triton where it is hardest: edges of tiles and documents, far sinks, strides, and defects."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention import (
    attention,
    attention_with_lse,
    triton_backward,
    triton_backward_keys,
    triton_forward,
)
from kernels.attention.reference import FULL, Pattern, attention_direct
from kernels.attention.spec import SMALL, SMALL_SPLIT
from kernels.attention.triton import Interval, Spec, attention_triton, interval_attention
from kernels.choose import use_backends
from kernels.spec import KernelCase, input_factory, relative_errors
from tests.closeness import assert_case, assert_kernel, relative

pytestmark = pytest.mark.interpreted

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
PATTERNS = (FULL, Pattern(1), Pattern(7), Pattern(200), Pattern(12, 4), Pattern(8, 4, 3), Pattern(6, 1, 9))


def case_of(inputs: dict[str, Tensor], tiles: Any = SMALL, **options: Any) -> KernelCase:
    def ours(q, k, v, sinks=None):
        return attention_triton(q, k, v, sinks=sinks, tiles=tiles, **options)

    def reference(q, k, v, sinks=None):
        return attention_direct(q, k, v, sinks=sinks, **options)

    return KernelCase(inputs, ours, reference)


def drawn(
    tokens: int,
    heads: int = 2,
    key_heads: int = 1,
    dims: tuple[int, int] = (16, 16),
    rows: int = 1,
    **more: Any,
) -> dict[str, Tensor]:
    draw = input_factory(more.get("dtype", torch.float32), seed=more.get("seed", 0))
    q = draw.normal(rows, tokens, heads, dims[0])
    k, v = (draw.normal(rows, tokens, key_heads, dim) for dim in dims)
    return {"q": q, "k": k, "v": v}


def documents_of(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    return document, torch.cat([torch.arange(length) for length in lengths])[None]


def assert_true(found: dict[str, float], limit: float = 1e-5) -> None:
    assert len(found) > 0
    assert max(found.values()) <= limit, found


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("pattern", [FULL, Pattern(16), Pattern(17)], ids=str)
def test_around_the_edges_of_tiles(tokens: int, pattern: Pattern) -> None:
    assert_kernel(case_of(drawn(tokens, 1, 1), scale=0.25, pattern=pattern))


@settings(max_examples=12)
@given(
    tokens=st.integers(1, 40),
    repeat=st.sampled_from([1, 3, 4, 8, 16]),
    dims=st.sampled_from([(16, 16), (24, 16), (48, 32), (16, 96), (80, 4)]),
    pattern=st.sampled_from(PATTERNS),
    logit_cap=st.sampled_from([None, 1.5, 50.0]),
    has_sinks=st.booleans(),
    mean=st.sampled_from([0.0, 1.0, 4.0, 15.0]),
    dtype=st.sampled_from(list(LIMITS)),
    seed=st.integers(0, 2**20),
)
def test_any_mask_shape_and_option(
    tokens, repeat, dims, pattern, logit_cap, has_sinks, mean, dtype, seed
) -> None:
    draw = input_factory(dtype, seed=seed)
    inputs = drawn(tokens, repeat, 1, dims, 2, dtype=dtype, seed=seed)
    if has_sinks:
        inputs["sinks"] = draw.uniform(repeat, low=-2.0, high=2.0)
    document, position = draw.documents(2, tokens, mean) if mean else (None, None)
    tiles = SMALL_SPLIT if seed % 2 else SMALL
    options = {"pattern": pattern, "logit_cap": logit_cap, "document": document, "position": position}
    assert_kernel(case_of(inputs, tiles, scale=dims[0] ** -0.5, **options), LIMITS[dtype])


def test_parts_of_one_projection_and_any_other_strides() -> None:
    joined = torch.randn(2, 37, 6 * 16 + 2 * 16 + 2 * 32).split([96, 32, 64], dim=-1)
    strided = [part.unflatten(-1, (heads, -1)) for part, heads in zip(joined, (6, 2, 2), strict=True)]
    across = [part.mT.contiguous().mT for part in strided]
    options = {"scale": 0.3, "pattern": Pattern(9), "tiles": SMALL}
    dense = run([x.contiguous() for x in strided], **options)
    for inputs in (strided, across):
        assert all(not x.is_contiguous() for x in inputs)
        found = run(inputs, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))


def run(inputs: list[Tensor], **options: Any) -> list[Tensor]:
    # Outputs, then gradients; leaves keep their strides, and the incoming gradient has some of its own.
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = attention_triton(*leaves, **options)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(out.mT.shape, generator=generator).to(out.dtype).mT
    return [out.detach(), lse.detach(), *torch.autograd.grad((out * weight).sum() + lse.sum(), leaves)]


def test_twice_the_same_bits() -> None:
    inputs = list(drawn(45, 6, 2, rows=2).values())
    options = {"scale": 0.3, "pattern": Pattern(8, 4, 3), "tiles": SMALL}
    first, second = run(inputs, **options), run(inputs, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_later_tokens_change_no_bit_before_them() -> None:
    inputs = drawn(50, 4, 2)
    before = attention_triton(**inputs, scale=0.3, pattern=FULL, tiles=SMALL)
    for t in (0, 15, 30, 48):
        changed = {name: x.clone() for name, x in inputs.items()}
        for x in changed.values():
            x[:, t + 1 :] += 5.0
        after = attention_triton(**changed, scale=0.3, pattern=FULL, tiles=SMALL)
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[:, : t + 1], b[:, : t + 1])
            assert not torch.equal(a[:, t + 1 :], b[:, t + 1 :])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_unseen_keys_get_gradients_of_exactly_zero(pattern: Pattern) -> None:
    document, position = documents_of((13, 1, 26))
    inputs = {name: x.requires_grad_() for name, x in drawn(40, 2, 1).items()}
    options = {"pattern": pattern, "document": document, "position": position}
    out, lse = attention_triton(**inputs, scale=0.3, tiles=SMALL, **options)
    for t in (12, 13, 14, 39):
        root = out[:, t].sum() + lse[:, t].sum()
        grads = torch.autograd.grad(root, (inputs["k"], inputs["v"]), retain_graph=True)
        doubles = [x.detach().double().requires_grad_() for x in inputs.values()]
        expected, expected_lse = attention_direct(*doubles, scale=0.3, **options)
        true = torch.autograd.grad(expected[:, t].sum() + expected_lse[:, t].sum(), doubles[1:])
        for ours, theirs in zip(grads, true, strict=True):
            assert torch.equal(ours == 0, theirs == 0), t


@pytest.mark.parametrize("pattern", [FULL, Pattern(5), Pattern(8, 4, 4)], ids=str)
def test_packed_documents_equal_separate_ones(pattern: Pattern) -> None:
    # Of whole tiles of rows, so that every sum is taken in the same order.
    lengths = (32, 16, 48)
    document, position = documents_of(lengths)
    inputs = drawn(sum(lengths), 2, 1)
    options = {"scale": 0.3, "pattern": pattern, "tiles": SMALL}
    packed = attention_triton(**inputs, document=document, position=position, **options)
    parts = [x.split(lengths, dim=1) for x in inputs.values()]
    separate = [attention_triton(*part, **options) for part in zip(*parts, strict=True)]
    for index in range(2):
        assert torch.equal(packed[index], torch.cat([pair[index] for pair in separate], dim=1))


@pytest.mark.parametrize("lengths", [(1, 1, 1, 1), (15, 1, 16), (31, 33), (2, 40, 3)])
@pytest.mark.parametrize("pattern", [FULL, Pattern(9), Pattern(6, 3, 6)], ids=str)
def test_documents_of_any_lengths(lengths: tuple[int, ...], pattern: Pattern) -> None:
    document, position = documents_of(lengths)
    options = {"pattern": pattern, "document": document * 7 - 3, "position": position.int()}
    assert_kernel(case_of(drawn(sum(lengths), 4, 2), scale=0.3, **options))


def test_far_sinks_take_all_or_nothing() -> None:
    inputs = drawn(20, 2, 2)
    plain = attention_triton(**inputs, scale=0.5, pattern=FULL, tiles=SMALL)
    for sink in (-1e4, float("-inf")):
        sinks = torch.full((2,), sink, requires_grad=True)
        out, lse = attention_triton(**inputs, scale=0.5, pattern=FULL, sinks=sinks, tiles=SMALL)
        assert torch.equal(out, plain[0])
        assert torch.equal(lse, plain[1])
        (grad,) = torch.autograd.grad(out.sum(), sinks)
        assert torch.equal(grad, torch.zeros(2))
    large_sinks = {**inputs, "sinks": torch.full((2,), 1e4)}
    out, lse = attention_triton(**large_sinks, scale=0.5, pattern=FULL, tiles=SMALL)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.allclose(lse, torch.full_like(lse, 1e4), rtol=1e-6)
    # A sink among large scores is as exact as they are.
    large = {**inputs, "q": inputs["q"] * 30, "sinks": torch.tensor([40.0, -35.0])}
    assert_case(case_of(large, scale=1.0, pattern=FULL))


def test_far_scores_are_as_exact_as_single_precision() -> None:
    inputs = {name: x * (10 if name != "v" else 1) for name, x in drawn(40, 2, 1).items()}
    assert_case(case_of(inputs, scale=1.0, pattern=FULL))


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("logit_cap", [None, 2.0])
def test_scales_that_turn_or_flatten_scores(scale: float, logit_cap: float | None) -> None:
    found = relative_errors(case_of(drawn(20, 2, 1), scale=scale, pattern=Pattern(9), logit_cap=logit_cap))
    assert_true(found)


@pytest.mark.parametrize("index", [0, 1])
def test_each_output_alone_gives_gradients(index: int) -> None:
    both = case_of(drawn(30, 4, 2), scale=0.3, pattern=Pattern(9))

    def only(form: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **inputs: (form(**inputs)[index] + 0 * sum(x.sum() for x in inputs.values()),)

    assert_kernel(both._replace(triton=only(both.triton), reference=only(both.reference)))


def test_rows_that_see_no_key() -> None:
    inputs = {name: x.requires_grad_() for name, x in drawn(20, 2, 1).items()}
    token = torch.arange(20, dtype=torch.int32)[None]
    # The first tokens see none, later ones every key up to half their own index.
    low, high = torch.zeros_like(token), (token - 4).clamp(min=0) // 2
    spec = Spec(0.3, None, Interval(low, high), None, SMALL)
    out, lse = interval_attention(*inputs.values(), None, None, None, spec)
    assert torch.equal(out[:, :6], torch.zeros_like(out[:, :6]))
    assert torch.equal(lse[:, :6], torch.full_like(lse[:, :6], float("-inf")))
    assert torch.isfinite(lse[:, 6:]).all()
    grads = torch.autograd.grad(out.sum() + lse[:, 6:].sum(), list(inputs.values()))
    assert all(torch.isfinite(x).all() for x in grads)
    assert torch.equal(grads[0][:, :6], torch.zeros_like(grads[0][:, :6]))
    assert torch.equal(grads[2][:, 7:], torch.zeros_like(grads[2][:, 7:]))


def test_the_public_functions_run_these_kernels() -> None:
    inputs = drawn(20, 4, 2)
    with use_backends({"attention": "triton"}):
        out, lse = attention_with_lse(**inputs, scale=0.3, window=7)
        assert torch.equal(out, attention(**inputs, scale=0.3, window=7))
        with pytest.raises(Exception, match="v: expected at most 512"):
            attention(inputs["q"], inputs["k"], torch.zeros(1, 20, 2, 513), scale=1.0)
    exact = {name: x.double() for name, x in inputs.items()}
    assert relative(out, attention(**exact, scale=0.3, window=7)) <= LIMITS[torch.float32]
    assert lse.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("document", {"document": torch.zeros(1, 8)}),
        ("position", {"position": torch.zeros(1, 8, dtype=torch.bool)}),
        ("sinks", {"sinks": torch.zeros(2, dtype=torch.long)}),
        ("document", {"document": torch.zeros(1, 8, dtype=torch.long, device="meta")}),
    ],
)
def test_wrong_arguments_are_named(name: str, options: dict[str, Tensor]) -> None:
    with pytest.raises(Exception, match=name):
        attention(**drawn(8), scale=1.0, **options)


@triton.jit
def one_key_too_many(token, low, high, window, LOW: tl.constexpr, HIGH: tl.constexpr):
    return tl.maximum(token - window, 0), token + 1


@triton.jit
def one_key_too_few(token, low, high, window, LOW: tl.constexpr, HIGH: tl.constexpr):
    return tl.maximum(token - window + 1, 0), tl.maximum(token, 1)


@triton.jit
def no_document_start(token, low, high, window, LOW: tl.constexpr, HIGH: tl.constexpr):
    return token * 0, token + 1


@triton.jit
def queries_end_early(key, first, end, tokens, window, LOW: tl.constexpr, HIGH: tl.constexpr):
    return key, tl.minimum(key + window - 1, tokens)


@triton.jit
def one_tile_lost(
    begin_first, begin_last, stop_first, stop_last, MASKED_KEYS: tl.constexpr, FULL_KEYS: tl.constexpr
):
    full_start = begin_first + tl.cdiv(begin_last - begin_first, MASKED_KEYS) * MASKED_KEYS
    full_stop = full_start + tl.maximum(stop_first - full_start, 0) // FULL_KEYS * FULL_KEYS
    return (
        tl.minimum(full_start, stop_last),
        full_start + FULL_KEYS,
        tl.maximum(full_stop, full_start + FULL_KEYS),
    )


WINDOW = {"pattern": Pattern(9)}
DOCUMENTS = {"pattern": FULL, "document": documents_of((13, 27))[0]}
DEFECTS = [
    (triton_forward, "attention_full_tiles", one_tile_lost, {"pattern": FULL}, "out0"),
    (triton_backward, "attention_full_tiles", one_tile_lost, {"pattern": FULL}, "grad q"),
    (triton_backward_keys, "attention_full_tiles", one_tile_lost, {"pattern": FULL}, "grad k"),
    (triton_forward, "attention_interval", one_key_too_many, WINDOW, "out0"),
    (triton_forward, "attention_interval", one_key_too_few, WINDOW, "out1"),
    (triton_forward, "attention_interval", no_document_start, DOCUMENTS, "out0"),
    (triton_backward, "attention_interval", one_key_too_many, WINDOW, "grad q"),
    (triton_backward, "attention_interval", no_document_start, DOCUMENTS, "grad q"),
    (triton_backward_keys, "attention_query_interval", queries_end_early, WINDOW, "grad k"),
    (triton_backward_keys, "attention_query_interval", queries_end_early, WINDOW, "grad v"),
]


@pytest.mark.parametrize(("module", "name", "defect", "options", "where"), DEFECTS)
def test_a_defect_in_a_kernel_is_seen(module, name, defect, options, where, monkeypatch) -> None:
    case = case_of(drawn(40, 2, 1), scale=0.3, **options)
    assert_kernel(case)
    monkeypatch.setattr(module, name, defect)
    assert relative_errors(case)[where] > 1e-3
