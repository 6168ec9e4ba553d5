"""The same operations by fla-core and by torch, for `bench.kernels`; each takes a case's inputs by name."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from kernels.experts.reference import experts_grouped
from kernels.spec import Outputs

Peer = Callable[..., Outputs]


def peers_of(spec: str) -> dict[str, Callable[[Any], Peer]]:
    """By name, what makes the peer from a shape of the spec; none where nobody else has the operation."""
    return PEERS.get(spec, {})


def _fla(module: str, name: str) -> Callable[..., Any]:
    # Only where it is asked for: importing fla takes seconds and compiles for a GPU.
    return getattr(importlib.import_module(f"fla.{module}"), name)


def _delta_rule(name: str) -> Callable[[Any], Peer]:
    def build(shape: Any) -> Peer:
        function = _fla(f"ops.{name}", f"chunk_{name}")

        def run(
            q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, initial_state: Tensor
        ) -> Outputs:
            options = {"scale": 1.0, "initial_state": initial_state.float(), "output_final_state": True}
            return function(q, k, v, log_decay, beta, **options)

        return run

    return build


def _simple_gla(shape: Any) -> Peer:
    function = _fla("ops.simple_gla", "chunk_simple_gla")

    def run(
        q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor, log_decay: Tensor | None = None
    ) -> Outputs:
        repeat = v.shape[2] // q.shape[2]
        q, k = (x.repeat_interleave(repeat, dim=2) for x in (q, k))
        options = {"scale": 1.0, "initial_state": initial_state.float(), "output_final_state": True}
        return function(q, k, v, log_decay, **options)

    return run


def _sdpa(masked: Any) -> Peer:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        return (scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2),)

    return run


def _fla_attention(masked: Any) -> Peer:
    function, window = _fla("ops.attn", "parallel_attn"), masked.pattern.window

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Outputs:
        return (function(q, k, v, window_size=window, sink_bias=sinks),)

    return run


def _grouped_mm(variant: Any) -> Peer:
    def run(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Outputs:
        ids = torch.rand(x.shape[0], gate_up.shape[0], device=x.device)
        chosen = ids.topk(weights.shape[1], dim=-1).indices
        return (experts_grouped(x, gate_up, down, chosen, weights.to(x.dtype), variant.form),)

    return run


def _fla_norm(shape: Any) -> Peer:
    function = _fla("modules.layernorm", "rms_norm")
    return lambda x, weight: (function(x, weight, None, eps=1e-6),)


def _torch_norm(shape: Any) -> Peer:
    compiled = torch.compile(lambda x, weight: rms_norm(x, x.shape[-1:], weight.to(x.dtype), 1e-6))
    return lambda x, weight: (compiled(x, weight),)


def _fla_loss(shape: Any) -> Peer:
    function = _fla("modules.fused_linear_cross_entropy", "fused_linear_cross_entropy_loss")

    def run(x: Tensor, weight: Tensor) -> Outputs:
        targets = torch.randint(weight.shape[0], x.shape[:1], device=x.device)
        return (function(x, targets, weight, reduction="sum"),)

    return run


def _fla_convolution(shape: Any) -> Peer:
    function = _fla("modules.convolution", "causal_conv1d")
    return lambda x, weight: (function(x[..., 1:-1].contiguous(), weight, activation="silu")[0],)


def _fla_swiglu(shape: Any) -> Peer:
    function = _fla("modules.activations", "swiglu")
    return lambda hidden: (function(*hidden.chunk(2, dim=-1)),)


PEERS: dict[str, dict[str, Callable[[Any], Peer]]] = {
    "activation": {"fla": _fla_swiglu},
    "attention": {"torch": _sdpa, "fla": _fla_attention},
    "attention.mla": {"torch": _sdpa},
    "attention.wide": {"torch": _sdpa},
    "attention.window": {"fla": _fla_attention},
    "convolution": {"fla": _fla_convolution},
    "cross_entropy": {"fla": _fla_loss},
    "delta_rule.channel": {"fla": _delta_rule("kda")},
    "delta_rule.head": {"fla": _delta_rule("gated_delta_rule")},
    "experts": {"torch": _grouped_mm},
    "experts.fine": {"torch": _grouped_mm},
    "experts.wide": {"torch": _grouped_mm},
    "linear_attention.head": {"fla": _simple_gla},
    "linear_attention.none": {"fla": _simple_gla},
    "norm": {"fla": _fla_norm, "torch": _torch_norm},
}
