import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.block_attention import block_attention
from kernels.block_attention.reference import block_attention_direct
from kernels.block_attention.shapes import SHAPES, Shape
from kernels.document_windows import document_windows
from tests.closeness import assert_close, assert_true, outputs_and_grads, with_grads


def positions_of(rows: int, tokens: int, starts: float) -> Tensor:
    is_start = torch.rand(rows, tokens) < starts
    index = torch.arange(tokens).expand(rows, -1)
    return index - torch.where(is_start, index, 0).cummax(1).values


def inputs_of(case: Shape, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((case.heads, case.key_dim), (case.key_heads, case.key_dim), (case.key_heads, case.value_dim))
    return [torch.randn(case.rows, case.tokens, *shape, dtype=dtype) for shape in shapes]


def selection_of(case: Shape, position: Tensor) -> Tensor:
    windows = document_windows(position, case.block, case.block)
    scores = torch.randn(case.rows, case.tokens, case.selectors, windows.start.shape[1])
    return windows.choose(scores, position, count=case.chosen)


def one_query_at_a_time(q, k, v, selected, *, scale, block, position):
    """Each query's keys listed one by one, from documents cut into blocks."""
    rows, tokens, heads, _ = q.shape
    out, mass = [], []
    for b in range(rows):
        for t in range(tokens):
            opened = t - int(position[b, t])
            own = list(range(t - int(position[b, t]) % block, t + 1))
            earlier = [list(range(s, s + block)) for s in range(opened, own[0], block)]
            for h in range(heads):
                chosen = selected[b, t, h * selected.shape[2] // heads].tolist()
                # A block of slot n starts at one of the tokens n block, ..., (n + 1) block - 1.
                parts = [own, *([s for s in earlier if s[0] // block == n] for n in chosen)]
                parts = [part if part == own or not part else part[0] for part in parts]
                keys = [s for part in parts for s in part]
                group = h * k.shape[2] // heads
                weights = torch.stack([q[b, t, h] @ k[b, s, group] * scale for s in keys]).softmax(0)
                out.append(weights @ torch.stack([v[b, s, group] for s in keys]))
                mass.append(
                    torch.stack([part.sum() for part in weights.split([len(part) for part in parts])])
                )
    mass = torch.stack(mass).view(rows, tokens, selected.shape[2], -1, selected.shape[3] + 1).sum(3)
    return torch.stack(out).view(rows, tokens, heads, -1), mass.detach()


def attend(form, options):
    return lambda q, k, v: form(q, k, v, **options)[0]


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("starts", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk_elements", [3000, 1 << 30])
def test_gathered_equals_direct(case, starts, dtype, chunk_elements, monkeypatch) -> None:
    monkeypatch.setattr("kernels.block_attention.reference.CHUNK_ELEMENTS", chunk_elements)
    position = positions_of(case.rows, case.tokens, starts)
    options = {
        "selected": selection_of(case, position),
        "scale": 0.3,
        "block": case.block,
        "position": position,
    }
    inputs = inputs_of(case, dtype)
    ours = outputs_and_grads(attend(block_attention, options), inputs)
    direct = with_grads(attend(block_attention_direct, options))
    assert_true(ours, direct, inputs, 1e-10)
    mass = block_attention(*inputs, **options)[1]
    assert_true([mass], lambda *x: [block_attention_direct(*x, **options)[1]], inputs, 1e-10)


@given(
    tokens=st.integers(1, 14),
    block=st.integers(1, 5),
    count=st.integers(0, 3),
    group=st.integers(1, 2),
    per_head=st.booleans(),
    starts=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_direct_equals_one_query_at_a_time(tokens, block, count, group, per_head, starts, seed) -> None:
    torch.manual_seed(seed)
    heads = 2 * group
    case = Shape(2, tokens, heads, 2, heads if per_head else 2, 3, 5, block, count)
    position = positions_of(2, tokens, starts)
    options = {"selected": selection_of(case, position), "scale": 0.7, "block": block, "position": position}
    inputs = inputs_of(case, torch.float64)
    direct = outputs_and_grads(attend(block_attention_direct, options), inputs)
    assert_close(direct, outputs_and_grads(attend(one_query_at_a_time, options), inputs), 1e-12)
    masses = [form(*inputs, **options)[1] for form in (block_attention_direct, one_query_at_a_time)]
    assert_close(masses[:1], masses[1:], 1e-12)


def test_large_scores_stay_finite() -> None:
    case = SHAPES[2]
    position = positions_of(case.rows, case.tokens, 0.05)
    options = {
        "selected": selection_of(case, position),
        "scale": 100.0,
        "block": case.block,
        "position": position,
    }
    inputs = inputs_of(case, torch.float64)
    ours = outputs_and_grads(attend(block_attention, options), inputs)
    assert_close(ours, outputs_and_grads(attend(block_attention_direct, options), inputs), 1e-10)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k", {"k": torch.zeros(1, 8, 2, 5)}),
        ("v", {"v": torch.zeros(1, 7, 2, 4)}),
        ("k, v", {"v": torch.zeros(1, 8, 2, 4, dtype=torch.float64)}),
        ("selected", {"selected": torch.zeros(1, 8, 3, 1, dtype=torch.long)}),
        ("selected", {"selected": torch.zeros(1, 8, 2, 5, dtype=torch.long)}),
        ("position", {"position": torch.zeros(1, 7, dtype=torch.long)}),
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
