"""Every public kernel refuses what it cannot take, by the argument's name; strides change nothing."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.activation import activate
from kernels.attention import attention, attention_with_lse
from kernels.block_attention import block_attention
from kernels.block_selection import select_by_max, select_by_mean
from kernels.compress import gated_compress, mean_compress, mlp_compress
from kernels.compressed_attention import entry_attention, entry_importance, joint_attention, select_by_entries
from kernels.convolution import short_convolution
from kernels.cross_entropy import linear_cross_entropy
from kernels.delta_rule import gated_delta_rule
from kernels.delta_rule.summary import delta_rule_initial_state_grad, delta_rule_summary
from kernels.document_windows import document_windows
from kernels.experts import routed_experts
from kernels.indexer import index_loss, index_loss_of_chosen, index_select
from kernels.linear_attention import linear_attention
from kernels.linear_attention.summary import linear_attention_initial_state_grad, linear_attention_summary
from kernels.norm import gated_rms_norm, rms_norm, unit_norm
from kernels.rotary import rotate
from kernels.selected_attention import selected_attention, selected_attention_with_shares
from kernels.selective_scan import selective_scan
from kernels.selective_scan.summary import selective_scan_initial_state_grad, selective_scan_summary
from kernels.sinkhorn import sinkhorn

B, T, G, H, K, V = 2, 6, 2, 4, 8, 10


class Call(NamedTuple):
    """A call that works; `too_far` are tensors of indices or ids, and the first number that is none.

    lone are tensors of which no other argument knows a dim.
    """

    function: Callable[..., Any]
    tensors: dict[str, Tensor]
    plain: Mapping[str, Any] = MappingProxyType({})
    too_far: Mapping[str, int] = MappingProxyType({})
    lone: frozenset[str] = frozenset()


def calls() -> dict[str, Call]:
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    position = torch.arange(T).repeat(B, 1)
    document = torch.zeros(B, T, dtype=torch.long)
    windows = document_windows(position, 2, 2)
    slots = windows.start.shape[1]
    qkv = {"q": normal(B, T, H, K), "k": normal(B, T, G, K), "v": normal(B, T, G, V)}
    attended = {**qkv, "sinks": normal(H), "document": document, "position": position}
    scan = {"q": normal(B, T, G, K), "k": normal(B, T, G, K), "v": normal(B, T, H, V)}
    scan |= {"log_decay": -normal(B, T, H).abs(), "document": document, "initial_state": normal(B, H, K, V)}
    indexed = {"q": normal(B, T, 3, K), "k": normal(B, T, K), "weights": normal(B, T, 3)}
    target = {"attention_q": normal(B, T, H, K), "attention_k": normal(B, T, G, K), "lse": normal(B, T, H)}
    chosen = torch.full((B, T, 2), -1)
    entries = {"q": normal(B, T, H, K), "k": normal(B, slots, G, K)}
    seen = {"entries": windows, "blocks": windows, "scale": 0.3, "count": 1, "initial": 0, "local": 0}
    joint = {"q": normal(B, T, H, K), "kv": normal(B, T, K), "entries": normal(B, slots, K)}
    joint |= {"sinks": normal(H), "selected": torch.full((B, T, 1), -1), "position": position}
    mlp = {"x": normal(B, T, G, K), "position_encoding": normal(G, 2, K)}
    mlp |= {"first": normal(G, 5, 2 * K), "second": normal(G, K, 5)}
    gated = {"values": normal(B, T, K), "gates": normal(B, T, K), "bias": normal(2, K), "position": position}
    experts = {"x": normal(T, K), "gate_up": normal(3, 16, K), "down": normal(3, K, 8)}
    experts |= {"chosen": torch.zeros(T, 2, dtype=torch.long), "weights": normal(T, 2)}
    mamba = {"x": normal(B, T, H), "step": normal(B, T, H).abs(), "rate": normal(H, K).abs()}
    mamba |= {
        "k": normal(B, T, K),
        "q": normal(B, T, K),
        "document": document,
        "initial_state": normal(B, H, K),
    }
    selecting = {"scale": 0.3}
    return {
        "activate": Call(activate, {"hidden": normal(T, H)}, {"kind": "swiglu"}, lone=frozenset({"hidden"})),
        "attention": Call(attention, attended, {"scale": 0.3}),
        "attention_with_lse": Call(attention_with_lse, attended, {"scale": 0.3}),
        "block_attention": Call(
            block_attention,
            {**qkv, "selected": torch.full((B, T, G, 1), -1), "position": position},
            {"scale": 0.3, "block": 2},
            {"selected": T // 2},
        ),
        "select_by_mean": Call(
            select_by_mean, {"q": qkv["q"], "k": qkv["k"], "position": position}, {"block": 2, "count": 1}
        ),
        "select_by_max": Call(
            select_by_max,
            {"q": qkv["q"], "k": normal(B, T, 1, K), "position": position},
            {"block": 2, "count": 1, "local": 0},
        ),
        "mean_compress": Call(mean_compress, {"x": normal(B, T, G, K)}, {"windows": windows}),
        "mlp_compress": Call(mlp_compress, mlp, {"windows": windows}),
        "gated_compress": Call(gated_compress, gated, {"windows": windows, "is_overlapping": False}),
        "entry_attention": Call(
            entry_attention, {**entries, "v": normal(B, slots, G, V), "position": position}, seen
        ),
        "select_by_entries": Call(select_by_entries, {**entries, "position": position}, seen),
        "entry_importance": Call(
            entry_importance,
            {**entries, "position": position},
            {"entries": windows, "blocks": windows, "scale": 0.3},
        ),
        "joint_attention": Call(
            joint_attention, joint, {"windows": windows, "scale": 0.3, "window": 2}, {"selected": slots}
        ),
        "short_convolution": Call(
            short_convolution,
            {
                "x": normal(B, T, H),
                "weight": normal(H, 3),
                "bias": normal(H),
                "document": document,
                "initial_state": normal(B, 2, H),
            },
        ),
        "linear_cross_entropy": Call(
            linear_cross_entropy,
            {"x": normal(T, K), "weight": normal(5, K), "targets": torch.zeros(T, dtype=torch.long)},
            too_far={"targets": 5},
        ),
        "gated_delta_rule": Call(gated_delta_rule, {**scan, "beta": normal(B, T, H).sigmoid()}),
        "routed_experts": Call(routed_experts, experts, too_far={"chosen": 3}),
        "index_select": Call(index_select, {**indexed, "document": document}, {"top_k": 2}),
        "index_loss": Call(index_loss, {**indexed, **target, "document": document}, {"scale": 0.3}),
        "index_loss_of_chosen": Call(
            index_loss_of_chosen,
            {**indexed, "entries": chosen, "shares": normal(B, T, 2).abs()},
            too_far={"entries": T},
        ),
        "linear_attention": Call(linear_attention, scan),
        "rms_norm": Call(rms_norm, {"x": normal(T, K), "weight": normal(K)}, {"eps": 1e-6}),
        "gated_rms_norm": Call(
            gated_rms_norm,
            {"x": normal(T, H, K), "gate": normal(T, H, K), "weight": normal(1, K)},
            {"eps": 1e-6, "kind": "silu"},
        ),
        "unit_norm": Call(unit_norm, {"x": normal(T, K)}, lone=frozenset({"x"})),
        "rotate": Call(rotate, {"x": normal(B, T, H, K), "cos": normal(1, T, 3), "sin": normal(1, T, 3)}),
        "selected_attention": Call(
            selected_attention,
            {**qkv, "selection": chosen, "sinks": normal(H)},
            selecting,
            {"selection": T},
        ),
        "selected_attention_with_shares": Call(
            selected_attention_with_shares,
            {**qkv, "selection": chosen, "sinks": normal(H)},
            selecting,
            {"selection": T},
        ),
        "selective_scan": Call(selective_scan, mamba),
        **summaries(scan, mamba, normal(B, T, H, V)),
        "sinkhorn": Call(
            sinkhorn, {"logits": normal(T, 3, 3)}, {"iterations": 2, "eps": 1e-6}, lone=frozenset({"logits"})
        ),
    }


def summaries(scan: dict[str, Tensor], mamba: dict[str, Tensor], grad_out: Tensor) -> dict[str, Call]:
    """Calls on what a chunk does to a state, of inputs of the recurrences."""

    def some(inputs: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
        return {name: inputs[name] for name in names}

    steps = {"grad_out": mamba["x"], **some(mamba, "step", "rate", "q", "document")}
    return {
        "delta_rule_summary": Call(
            delta_rule_summary,
            {**some(scan, "q", "k", "v", "log_decay", "document"), "beta": scan["log_decay"].exp()},
        ),
        "delta_rule_initial_state_grad": Call(
            delta_rule_initial_state_grad, {"grad_out": grad_out, "reads": grad_out[..., :K]}
        ),
        "linear_attention_summary": Call(
            linear_attention_summary, some(scan, "k", "v", "log_decay", "document")
        ),
        "linear_attention_initial_state_grad": Call(
            linear_attention_initial_state_grad,
            {"grad_out": grad_out, **some(scan, "q", "log_decay", "document")},
        ),
        "selective_scan_summary": Call(
            selective_scan_summary, some(mamba, "x", "step", "rate", "k", "document")
        ),
        "selective_scan_initial_state_grad": Call(selective_scan_initial_state_grad, steps),
    }


CALLS = calls()
ARGUMENTS = [(name, tensor) for name, call in CALLS.items() for tensor in call.tensors]
# Of these, those that another argument knows a dim of.
BOUND = [(name, tensor) for name, tensor in ARGUMENTS if tensor not in CALLS[name].lone]
# An open annotation takes any number of dims, but not another number than its companions.
COUNTED = [(name, tensor) for name, tensor in BOUND if name not in {"rms_norm", "gated_rms_norm"}]


def run(call: Call, **changed: Any) -> tuple[Tensor, ...]:
    out = call.function(**{**call.tensors, **call.plain, **changed})
    return out if isinstance(out, tuple) else (out,)


def refusal(call: Call, **changed: Any) -> str | None:
    """What a call says that it refuses; None where it works."""
    try:
        run(call, **changed)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_themselves_work(name: str) -> None:
    assert all(torch.isfinite(part.float()).all() for part in run(CALLS[name]))


@pytest.mark.parametrize(("name", "argument"), COUNTED)
def test_a_dim_too_many_or_too_few_is_refused(name: str, argument: str) -> None:
    call = CALLS[name]
    x = call.tensors[argument]
    for changed in (x[None], x[0]):
        with pytest.raises(ValueError, match=rf"^{argument}: expected .*, found \("):
            run(call, **{argument: changed})


@pytest.mark.parametrize(("name", "argument"), BOUND)
def test_a_dim_of_another_size_is_refused(name: str, argument: str) -> None:
    call = CALLS[name]
    x = call.tensors[argument]
    longer = (torch.cat((x, x.narrow(dim, 0, 1)), dim) for dim in range(x.ndim))
    refusals = [message for changed in longer if (message := refusal(call, **{argument: changed}))]
    assert refusals
    for message in refusals:
        assert message.split(": expected ")[0] in {*call.tensors, "blocks"}, message


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_another_kind_of_number_or_device_is_refused(name: str, argument: str) -> None:
    call = CALLS[name]
    x = call.tensors[argument]
    other = x.to(torch.int64) if x.is_floating_point() else x.float()
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*, found torch\.(int64|float32)"):
        run(call, **{argument: other})
    if len(call.tensors) > 1:
        with pytest.raises(ValueError, match=r"^\w+: expected on (cpu|meta), .*, found (cpu|meta)"):
            run(call, **{argument: x.to("meta")})
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*, found (str|'text')"):
        run(call, **{argument: "text"})


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.too_far])
def test_indices_and_ids_out_of_range_are_refused(name: str) -> None:
    call = CALLS[name]
    for argument, limit in call.too_far.items():
        for wrong in (limit, -2):
            x = call.tensors[argument].clone()
            x.view(-1)[-1] = wrong
            with pytest.raises(ValueError, match=rf"^{argument}: expected numbers from -?\d+ to {limit - 1}"):
                run(call, **{argument: x})


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if "document" in call.tensors])
def test_documents_out_of_order_are_refused(name: str) -> None:
    document = torch.zeros(B, T, dtype=torch.long)
    document[-1, 0] = 1
    with pytest.raises(ValueError, match=r"^document: expected numbers that never fall"):
        run(CALLS[name], document=document)


# A short row has no compressed entries to turn, so none is not too few there.
EMPTY = [
    name
    for name, call in CALLS.items()
    if name != "rotate"
    and {"q", "x"} & set(call.tensors)
    and B in next(iter(call.tensors.values())).shape[:1]
]


@pytest.mark.parametrize("name", EMPTY)
def test_no_tokens_are_refused(name: str) -> None:
    call = CALLS[name]
    shorter = {
        key: x[:, :0]
        for key, x in call.tensors.items()
        if x.ndim > 1 and x.shape[0] in (1, B) and x.shape[1] == T
    }
    with pytest.raises(ValueError, match=r"at least one token"):
        run(call, **shorter)


@pytest.mark.parametrize("name", CALLS)
def test_strides_change_nothing(name: str) -> None:
    call = CALLS[name]
    exact = {key: x.double() if x.is_floating_point() else x for key, x in call.tensors.items()}
    strided = {}
    for key, x in exact.items():
        wide = torch.empty(*x.shape, 2, dtype=x.dtype)
        strided[key] = wide[..., 1].copy_(x)
    for found, expected in zip(run(call, **strided), run(call, **exact), strict=True):
        # Products of strided matrices may add in another order.
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
