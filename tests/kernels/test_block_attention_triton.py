"""Block attention in Triton at its worst selections and documents, and proof that a fault is seen."""

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.block_attention import block_attention, triton_backward, triton_forward
from kernels.block_attention import triton as triton_form
from kernels.block_attention.reference import block_attention_direct
from kernels.block_attention.shapes import Shape
from kernels.block_attention.spec import SMALL
from kernels.block_attention.triton import block_attention_triton
from kernels.block_attention.triton_lists import lists_of, plan_of
from kernels.choose import use_backends
from kernels.document_windows import document_windows
from kernels.spec import KernelCase, outputs_and_grads, relative_errors
from tests.closeness import assert_case, assert_kernel, relative

pytestmark = pytest.mark.interpreted

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
SHAPE = Shape(2, 29, 4, 2, 2, 16, 8, 4, 3)


def position_of(rows: int, tokens: int, starts: tuple[int, ...]) -> Tensor:
    index = torch.arange(tokens)
    is_start = torch.isin(index, torch.tensor([0, *starts]))
    return (index - torch.where(is_start, index, 0).cummax(0).values).expand(rows, -1)


def inputs_of(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    rows, tokens = shape.rows, shape.tokens
    return {
        "q": torch.randn(rows, tokens, shape.heads, shape.key_dim).to(dtype),
        "k": torch.randn(rows, tokens, shape.key_heads, shape.key_dim).to(dtype),
        "v": torch.randn(rows, tokens, shape.key_heads, shape.value_dim).to(dtype),
    }


def selection_of(shape: Shape, position: Tensor) -> Tensor:
    windows = document_windows(position, shape.block, shape.block)
    scores = torch.rand(shape.rows, shape.tokens, shape.selectors, windows.start.shape[1])
    return windows.choose(scores, position, count=shape.chosen)


def case_of(shape: Shape, inputs: dict, position: Tensor, selected: Tensor, scale: float = 0.3) -> KernelCase:
    options = {"scale": scale, "block": shape.block, "position": position}
    return KernelCase(
        inputs,
        lambda q, k, v: block_attention_triton(q, k, v, selected, **options, tiles=SMALL),
        lambda q, k, v: block_attention_direct(q, k, v, selected, **options),
    )


def drawn(shape: Shape, dtype: torch.dtype = torch.float32, starts: tuple[int, ...] = ()) -> KernelCase:
    position = position_of(shape.rows, shape.tokens, starts)
    return case_of(shape, inputs_of(shape, dtype), position, selection_of(shape, position))


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("starts", [(), (1,), (3, 17), (4, 8, 12), (5, 6, 7, 8, 21)], ids=str)
def test_documents_start_anywhere(starts: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_kernel(drawn(SHAPE, dtype, starts), LIMITS[dtype])


@settings(max_examples=10)
@given(
    tokens=st.integers(1, 40),
    block=st.integers(1, 20),
    count=st.integers(0, 4),
    group=st.sampled_from([1, 2, 3, 5]),
    per_head=st.booleans(),
    key_dim=st.sampled_from([1, 16, 24, 48]),
    value_dim=st.sampled_from([1, 16, 20]),
    starts=st.lists(st.integers(1, 39), max_size=4),
    dtype=st.sampled_from(list(LIMITS)),
    seed=st.integers(0, 2**20),
)
def test_every_shape_and_packing(
    tokens, block, count, group, per_head, key_dim, value_dim, starts, dtype, seed
) -> None:
    torch.manual_seed(seed)
    if dtype == torch.bfloat16:
        # The rounding of a few numbers says nothing.
        tokens, key_dim, value_dim = max(tokens, 8), max(key_dim, 16), max(value_dim, 16)
    heads = 2 * group
    shape = Shape(1, tokens, heads, 2, heads if per_head else 2, key_dim, value_dim, block, count)
    assert_kernel(drawn(shape, dtype, tuple(starts)), LIMITS[dtype])


@pytest.mark.parametrize("routing", ["nothing", "the first", "the last", "one token"])
def test_any_selection_is_exact(routing: str) -> None:
    position = position_of(SHAPE.rows, SHAPE.tokens, (9,))
    selected = selection_of(SHAPE, position)
    if routing == "nothing":
        selected = torch.full_like(selected, -1)
    elif routing == "the first":
        selected = document_windows(position, SHAPE.block, SHAPE.block).choose(
            torch.zeros(*selected.shape[:3], SHAPE.tokens // SHAPE.block), position, count=1
        )
    elif routing == "the last":
        # The only choice stands behind slots that are empty.
        selected = torch.cat([torch.full_like(selected[..., :2], -1), selected[..., :1]], dim=-1)
    else:
        selected[:, torch.arange(SHAPE.tokens) != 20] = -1
    assert_kernel(case_of(SHAPE, inputs_of(SHAPE, torch.float32), position, selected))


def test_large_scores_stay_finite() -> None:
    position = position_of(SHAPE.rows, SHAPE.tokens, (11,))
    case = case_of(
        SHAPE, inputs_of(SHAPE, torch.float32), position, selection_of(SHAPE, position), scale=100.0
    )
    found = relative_errors(case)
    assert all(math.isfinite(x) for x in found.values()), found
    assert_case(case)


def test_packed_documents_equal_separate_ones() -> None:
    shape = SHAPE._replace(rows=1)
    position = position_of(1, shape.tokens, (13,))
    inputs, selected = inputs_of(shape, torch.float32), selection_of(shape, position)
    options: dict[str, Any] = {"scale": 0.3}
    exact = {name: x.double() for name, x in inputs.items()}
    options |= {"block": shape.block}
    whole, mass = block_attention_direct(**exact, selected=selected, position=position, **options)
    # Blocks of the second document have the slots after its start in the row.
    windows = document_windows(position, shape.block, shape.block)
    for a, b in ((0, 13), (13, shape.tokens)):
        part = {name: x[:, a:b] for name, x in inputs.items()}
        start = windows.start[0][selected[:, a:b].clamp(min=0)]
        own = torch.where(selected[:, a:b] >= 0, (start - a) // shape.block, -1)
        own = own[..., : (b - a) // shape.block]
        position = torch.arange(b - a)[None]
        out, part_mass = block_attention_triton(
            **part, selected=own, position=position, **options, tiles=SMALL
        )
        assert relative(out, whole[:, a:b]) <= LIMITS[torch.float32]
        assert relative(part_mass, mass[:, a:b, :, : own.shape[3] + 1]) <= LIMITS[torch.float32]


def test_unseen_keys_have_no_gradient_and_no_influence() -> None:
    position = position_of(SHAPE.rows, SHAPE.tokens, ())
    selected = torch.full((SHAPE.rows, SHAPE.tokens, 2, 1), -1)
    # Only the last query looks beyond its own block, at the second one.
    selected[:, -1] = 1
    inputs = inputs_of(SHAPE, torch.float32)
    options = {"selected": selected, "scale": 0.3, "block": SHAPE.block, "position": position, "tiles": SMALL}
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out, _ = block_attention_triton(**leaves, **options)
    grads = torch.autograd.grad(out[:, -1].sum(), [leaves["k"], leaves["v"]])
    unseen = torch.ones(SHAPE.tokens, dtype=torch.bool)
    unseen[4:8] = unseen[28:] = False
    for grad in grads:
        assert torch.equal(grad[:, unseen], torch.zeros_like(grad[:, unseen]))
        assert grad[:, ~unseen].abs().sum() > 0
    changed = {name: x.clone() for name, x in inputs.items()}
    for x in (changed["k"], changed["v"]):
        x[:, unseen] += 1.0
    again, _ = block_attention_triton(**changed, **options)
    assert torch.equal(again[:, -1], out[:, -1])


def test_the_past_does_not_see_the_future() -> None:
    case = drawn(SHAPE, starts=(6,))
    before = outputs_and_grads(case.triton, case.inputs)
    changed = {name: x.clone() for name, x in case.inputs.items()}
    for x in changed.values():
        x[:, 18:] *= -2.0
    after = outputs_and_grads(case.triton, changed)
    for name in ("out0", "out1"):
        assert torch.equal(before[name][:, :18], after[name][:, :18])
        assert not torch.equal(before[name][:, 18:], after[name][:, 18:])


def test_strided_inputs_and_two_runs_are_bitwise_the_same() -> None:
    case = drawn(SHAPE, torch.bfloat16, starts=(10,))
    first = outputs_and_grads(case.triton, case.inputs)
    assert all(torch.equal(first[n], x) for n, x in outputs_and_grads(case.triton, case.inputs).items())
    packed = torch.cat([x.flatten(2) for x in case.inputs.values()], dim=-1).requires_grad_()
    sizes = [x.shape[2] * x.shape[3] for x in case.inputs.values()]
    views = [
        part.unflatten(-1, x.shape[2:])
        for part, x in zip(packed.split(sizes, dim=-1), case.inputs.values(), strict=True)
    ]
    assert not views[0].is_contiguous()
    out, mass = case.triton(*views)
    assert torch.equal(out, first["out0"])
    assert torch.equal(mass, first["out1"])
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in case.inputs.values()]
    assert torch.equal(case.triton(*turned)[0], first["out0"])


def test_chunks_change_nothing() -> None:
    shape = SHAPE._replace(rows=1, tokens=21)
    position = position_of(1, shape.tokens, (10,))
    inputs, selected = inputs_of(shape, torch.float32), selection_of(shape, position)
    case = case_of(shape, inputs, position, selected)
    options = {"selected": selected, "scale": 0.3, "block": shape.block, "position": position}
    for size in (1, 1 << 12, 1 << 30):
        tiles = SMALL._replace(chunk_bytes=size)
        form = lambda q, k, v, tiles=tiles: block_attention_triton(q, k, v, **options, tiles=tiles)  # noqa: E731
        assert_kernel(case._replace(triton=form), LIMITS[torch.float32])


def test_lists_hold_each_choice_once_and_plans_cover_them() -> None:
    selected = torch.randint(-1, 5, (2, 11, 4, 3))
    lists = lists_of(selected, 2, 5, 4)
    assert (lists.lists, lists.chunks) == (20, 3)
    flat = selected.flatten().tolist()
    seen = []
    for number in range(lists.lists):
        for chunk in range(lists.chunks):
            a, b = lists.bounds[number * 3 + chunk : number * 3 + chunk + 2].tolist()
            own = lists.order[a:b].tolist()
            assert own == sorted(own)
            for choice in own:
                row, token, head = choice // (11 * 4 * 3), choice // 12 % 11, choice // 3 % 4
                assert number == (row * 2 + head // 2) * 5 + flat[choice]
                assert token // 4 == chunk
            seen += own
    assert sorted(seen) == [i for i, slot in enumerate(flat) if slot >= 0]
    plan = plan_of(lists, 2, 2 * 4 * 4 * 3, by_chunk=True)
    sizes = lists.bounds.diff().view(20, 3)
    for chunk in range(3):
        lists_of_programs = [n for n in range(20) for _ in range(-(-int(sizes[n, chunk]) // 2))]
        assert plan.list_of_program[chunk].tolist()[: len(lists_of_programs)] == lists_of_programs
        assert (plan.list_of_program[chunk][len(lists_of_programs) :] == 20).all()


def test_the_config_chooses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    position = position_of(SHAPE.rows, SHAPE.tokens, ())
    inputs, selected = inputs_of(SHAPE, torch.float32), selection_of(SHAPE, position)
    options = {"selected": selected, "scale": 0.3, "block": SHAPE.block, "position": position}
    plain = block_attention(**inputs, **options)
    monkeypatch.setattr(triton_form, "tiles_for", lambda *_: SMALL)
    with use_backends({"block_attention": "triton"}):
        ours = block_attention(**inputs, **options)
    assert not torch.equal(ours[0], plain[0])
    exact = block_attention(**{name: x.double() for name, x in inputs.items()}, **options)
    assert max(map(relative, ours, exact)) <= LIMITS[torch.float32]


@triton.jit
def token_rows_without_the_last(
    first, last, group, SHARED: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr
):
    index = tl.arange(0, ROWS)
    token, head = first + index // PADDED, index % PADDED
    return token, group * SHARED + head, (token < last - 1) & (head < SHARED)


@triton.jit
def choice_rows_without_the_last(
    order,
    at,
    end,
    tokens,
    selectors,
    num_selected,
    SHARED: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    index = tl.arange(0, ROWS)
    head, at = index % PADDED, at + index // PADDED
    is_in = (at < end - 1) & (head < SHARED)
    choice = tl.load(order + at, mask=at < end, other=0)
    rank, selector = choice % num_selected, (choice // num_selected) % selectors
    return (choice // (num_selected * selectors)) % tokens, selector, head, rank, is_in


@pytest.mark.parametrize(
    ("where", "name", "fault"),
    [
        (triton_forward, "block_attention_token_rows", token_rows_without_the_last),
        (triton_backward, "block_attention_token_rows", token_rows_without_the_last),
        (triton_forward, "block_attention_choice_rows", choice_rows_without_the_last),
        (triton_backward, "block_attention_choice_rows", choice_rows_without_the_last),
    ],
)
def test_sabotage_a_lost_row_is_seen(where, name: str, fault, monkeypatch: pytest.MonkeyPatch) -> None:
    case = drawn(SHAPE, starts=(10,))
    monkeypatch.setattr(where, name, fault)
    assert not max(relative_errors(case).values()) <= 1e-2


def test_sabotage_a_lost_document_start_is_seen() -> None:
    right = drawn(SHAPE, starts=(10,))
    position = position_of(SHAPE.rows, SHAPE.tokens, ())
    wrong = case_of(SHAPE, right.inputs, position, selection_of(SHAPE, position))
    assert max(relative_errors(right._replace(triton=wrong.triton)).values()) > 1e-2


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("position", {"position": torch.zeros(1, 8)}),
        ("selected", {"selected": torch.zeros(1, 8, 2, 1)}),
        ("v", {"v": torch.zeros(1, 8, 2, 4, device="meta")}),
    ],
)
def test_wrong_arguments_are_named(name: str, change: dict) -> None:
    arguments = {
        "q": torch.zeros(1, 8, 4, 4),
        "k": torch.zeros(1, 8, 2, 4),
        "v": torch.zeros(1, 8, 2, 4),
        "selected": torch.zeros(1, 8, 2, 1, dtype=torch.long),
        "position": torch.arange(8)[None],
    }
    with pytest.raises(Exception, match=name):
        block_attention(**{**arguments, **change}, scale=1.0, block=2)
