"""Weights of Qwen3-Next as Hugging Face names and lays them out, in our names and layout."""

from collections.abc import Mapping

import torch
from torch import Tensor

from model.config import Architecture
from model.mixers.attn import AttnConfig
from model.mixers.gdn import GdnConfig


def import_weights(theirs: Mapping[str, Tensor], config: Architecture) -> dict[str, Tensor]:
    """The state dict of our model with their weights; experts are read per expert or fused.

    Raises KeyError for a tensor that they lack.
    """
    ours = {
        "embed.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
        "head.weight": theirs["lm_head.weight"],
    }
    for index, layer in enumerate(config.layers):
        source, target = f"model.layers.{index}.", f"blocks.{index}."
        view = {name.removeprefix(source): x for name, x in theirs.items() if name.startswith(source)}
        mixer = config.mixer[layer.mixer]
        if isinstance(mixer, GdnConfig):
            part = import_gdn(view, mixer)
        else:
            assert isinstance(mixer, AttnConfig), f"Qwen3-Next has no {type(mixer)}"
            part = import_attn(view, mixer)
        part = {f"mixer.{name}": x for name, x in part.items()} | import_moe(view, config)
        part["mixer_residual.norm.weight"] = view["input_layernorm.weight"]
        part["ffn_residual.norm.weight"] = view["post_attention_layernorm.weight"]
        ours |= {target + name: x for name, x in part.items()}
    return ours


def import_gdn(theirs: Mapping[str, Tensor], config: GdnConfig) -> dict[str, Tensor]:
    """One Gated DeltaNet layer: theirs interleaves q, k, v and z by key head, and b with a."""
    heads, repeat = config.num_key_heads, config.num_value_heads // config.num_key_heads
    values = repeat * config.value_dim
    by_head = theirs["linear_attn.in_proj_qkvz.weight"].unflatten(0, (heads, -1))
    q, k, v, z = by_head.split([config.key_dim, config.key_dim, values, values], dim=1)
    b, a = theirs["linear_attn.in_proj_ba.weight"].unflatten(0, (heads, -1)).chunk(2, dim=1)
    return {
        "in_proj.weight": torch.cat([part.flatten(0, 1) for part in (q, k, v, z, b, a)]),
        "conv.weight": theirs["linear_attn.conv1d.weight"][:, 0],
        "decay.log_rate": theirs["linear_attn.A_log"],
        "decay.bias": theirs["linear_attn.dt_bias"],
        "out_norm.weight": theirs["linear_attn.norm.weight"],
        "out_proj.weight": theirs["linear_attn.out_proj.weight"],
    }


def import_attn(theirs: Mapping[str, Tensor], config: AttnConfig) -> dict[str, Tensor]:
    """One attention layer: theirs puts the gate of a head behind the query of that head."""
    by_head = theirs["self_attn.q_proj.weight"].unflatten(0, (config.num_heads, -1))
    q, gate = by_head.chunk(2, dim=1)
    parts = [q.flatten(0, 1), gate.flatten(0, 1), theirs["self_attn.k_proj.weight"]]
    return {
        "in_proj.weight": torch.cat([*parts, theirs["self_attn.v_proj.weight"]]),
        "out_proj.weight": theirs["self_attn.o_proj.weight"],
        "q_norm.weight": theirs["self_attn.q_norm.weight"],
        "k_norm.weight": theirs["self_attn.k_norm.weight"],
    }


def import_moe(theirs: Mapping[str, Tensor], config: Architecture) -> dict[str, Tensor]:
    """The experts of one layer."""
    if "mlp.experts.gate_up_proj" in theirs:
        gate_up, down = theirs["mlp.experts.gate_up_proj"], theirs["mlp.experts.down_proj"]
    else:
        experts = range(config.moe.num_experts)
        names = [f"mlp.experts.{expert}." for expert in experts]
        pairs = [(theirs[f"{name}gate_proj.weight"], theirs[f"{name}up_proj.weight"]) for name in names]
        gate_up = torch.stack([torch.cat(pair) for pair in pairs])
        down = torch.stack([theirs[f"{name}down_proj.weight"] for name in names])
    shared = "mlp.shared_expert."
    return {
        "moe.router.weight": theirs["mlp.gate.weight"],
        "moe.router.bias": torch.zeros(config.moe.num_experts),
        "moe.experts.gate_up": gate_up,
        "moe.experts.down": down,
        "moe.shared.gate_up.weight": torch.cat(
            [theirs[f"{shared}gate_proj.weight"], theirs[f"{shared}up_proj.weight"]]
        ),
        "moe.shared.down.weight": theirs[f"{shared}down_proj.weight"],
        "moe.shared_gate.weight": theirs["mlp.shared_expert_gate.weight"],
    }
