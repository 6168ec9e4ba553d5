"""Qwen3-Next: 3:1 Gated DeltaNet and gated attention, softmax experts, shared expert with a gate."""

from collections.abc import Iterator
from typing import Any

from model.config import Architecture
from model.hf.family import Family
from model.hf.fields import Fields
from model.hf.parts import (
    attn_of,
    experts_apart,
    feed_forward,
    layout_lines,
    plain_layer,
    rope_parameters,
    rotary_lines,
    skeleton,
)
from model.hf.pieces import Piece, View
from model.mixers.attn import AttnConfig
from model.mixers.gdn import GdnConfig

KINDS = {"linear_attention": "gdn", "full_attention": "attn"}
PAIRS: dict[str, str | tuple[str, Any]] = {
    "hidden_size": "model.width",
    "num_hidden_layers": "model.depth",
    "vocab_size": "model.vocab_size",
    "intermediate_size": ("model.ffn_hidden", 5632),
    "tie_word_embeddings": ("model.has_tied_embeddings", False),
    "initializer_range": ("model.init_std", 0.02),
    "rms_norm_eps": ("residual.norm_eps", 1e-6),
    "num_attention_heads": "mixer.attn.num_heads",
    "num_key_value_heads": "mixer.attn.num_key_heads",
    "head_dim": ("mixer.attn.head_dim", 256),
    "linear_num_key_heads": "mixer.gdn.num_key_heads",
    "linear_num_value_heads": "mixer.gdn.num_value_heads",
    "linear_key_head_dim": "mixer.gdn.key_dim",
    "linear_value_head_dim": "mixer.gdn.value_dim",
    "linear_conv_kernel_dim": ("mixer.gdn.conv_width", 4),
    "num_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.top_k",
    "moe_intermediate_size": "moe.hidden",
    "shared_expert_intermediate_size": "moe.shared_hidden",
    "norm_topk_prob": ("moe.has_normalized_weights", True),
}
FIXED = (
    *("moe=softmax", "residual=pre_norm", "residual.has_zero_centered_norm=true"),
    *("mixer.attn.qk_norm=head", "mixer.attn.output_gate=channel", "moe.has_shared_gate=true"),
)


def read_more(fields: Fields) -> list[str]:
    """Layout and rotary."""
    depth = fields.take("num_hidden_layers")
    interval = fields.take("full_attention_interval", 4)
    every = [
        "full_attention" if (layer + 1) % interval == 0 else "linear_attention" for layer in range(depth)
    ]
    kinds = fields.take("layer_types", None) or every
    dense, sparse_step = fields.take("mlp_only_layers", []), fields.take("decoder_sparse_step", 1)
    ffns = ["dense" if i in dense or (i + 1) % sparse_step else "moe" for i in range(depth)]
    partial = fields.take("partial_rotary_factor", None)
    partial = (fields.take("rope_parameters", None) or {}).get("partial_rotary_factor", partial or 1.0)
    rotary_dim = int(fields.take("head_dim", 256) * partial)
    fields.take("router_aux_loss_coef", None)
    return [
        f"mixer.attn.rotary_dim={rotary_dim}",
        *rotary_lines(fields, "attn", 10000.0),
        *layout_lines([KINDS.get(kind, kind) for kind in kinds], ffns),
    ]


def write_more(config: Architecture) -> dict[str, Any]:
    """Layout and rotary."""
    attn, names = attn_of(config), {ours: theirs for theirs, ours in KINDS.items()}
    partial = attn.rotary_dim / attn.head_dim
    return {
        "layer_types": [names.get(layer.mixer, layer.mixer) for layer in config.layers],
        "mlp_only_layers": [i for i, layer in enumerate(config.layers) if layer.ffn == "dense"],
        "rope_parameters": rope_parameters(
            attn.rotary_theta, attn.rotary_scaling, partial_rotary_factor=partial
        ),
        "router_aux_loss_coef": config.moe.balance_loss,
    }


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands."""
    yield from skeleton(config)
    for index, layer in enumerate(config.layers):
        ours, theirs = f"blocks.{index}.", f"model.layers.{index}."
        yield from plain_layer(index, layer)
        mixer, width = config.mixer[layer.mixer], config.model.width
        if isinstance(mixer, GdnConfig):
            yield from gdn_pieces(f"{ours}mixer.", f"{theirs}linear_attn.", mixer, width)
        else:
            assert isinstance(mixer, AttnConfig), f"{type(mixer)=}"
            yield from gated_attn_pieces(f"{ours}mixer.", f"{theirs}self_attn.", mixer, width)
        if layer.ffn == "dense":
            hidden = config.model.ffn_hidden
            yield from feed_forward(f"{ours}ffn.", f"{theirs}mlp.", hidden, config.model.activation)
        else:
            yield from moe_pieces(f"{ours}moe.", f"{theirs}mlp.", config)


def gdn_pieces(ours: str, theirs: str, gdn: GdnConfig, width: int) -> Iterator[Piece]:
    """Theirs interleaves q, k, v and z by key head, and b with a."""
    heads, repeat = gdn.num_key_heads, gdn.num_value_heads // gdn.num_key_heads
    values = repeat * gdn.value_dim
    names = (["in_proj_qkvz"] * 4) + (["in_proj_ba"] * 2)
    sizes = [gdn.key_dim, gdn.key_dim, values, values, repeat, repeat]
    starts = [0, gdn.key_dim, 2 * gdn.key_dim, 2 * gdn.key_dim + values, 0, repeat]
    totals = {"in_proj_qkvz": 2 * gdn.key_dim + 2 * values, "in_proj_ba": 2 * repeat}
    row = 0
    for name, size, start in zip(names, sizes, starts, strict=True):
        mine = _heads_of(row, heads, size, 0, size)
        other = _heads_of(0, heads, totals[name], start, size)
        shape = (heads * totals[name], width)
        yield Piece(f"{ours}in_proj.weight", f"{theirs}{name}.weight", mine, other, shape)
        row += heads * size
    yield Piece(f"{ours}conv.weight", f"{theirs}conv1d.weight", lambda x: x[:, None])
    yield Piece(f"{ours}decay.log_rate", f"{theirs}A_log")
    yield Piece(f"{ours}decay.bias", f"{theirs}dt_bias")
    yield Piece(f"{ours}out_norm.weight", f"{theirs}norm.weight")
    yield Piece(f"{ours}out_proj.weight", f"{theirs}out_proj.weight")


def gated_attn_pieces(ours: str, theirs: str, attn: AttnConfig, width: int) -> Iterator[Piece]:
    """Theirs puts the gate of a head behind the query of that head."""
    heads, dim = attn.num_heads, attn.head_dim
    shape = (2 * heads * dim, width)
    for place in (0, 1):
        mine = _heads_of(place * heads * dim, heads, dim, 0, dim)
        other = _heads_of(0, heads, 2 * dim, place * dim, dim)
        yield Piece(f"{ours}in_proj.weight", f"{theirs}q_proj.weight", mine, other, shape)
    start, keys = 2 * heads * dim, attn.num_key_heads * dim
    for name, at in (("k_proj", start), ("v_proj", start + keys)):
        yield Piece(f"{ours}in_proj.weight", f"{theirs}{name}.weight", _slice(at, keys))
    yield Piece(f"{ours}out_proj.weight", f"{theirs}o_proj.weight")
    yield Piece(f"{ours}q_norm.weight", f"{theirs}q_norm.weight")
    yield Piece(f"{ours}k_norm.weight", f"{theirs}k_norm.weight")


def moe_pieces(ours: str, theirs: str, config: Architecture) -> Iterator[Piece]:
    """Router, experts with tensors of their own, shared expert with its gate."""
    yield Piece(f"{ours}router.weight", f"{theirs}gate.weight")
    yield from experts_apart(config, f"{ours}experts.", f"{theirs}experts.")
    shared, activation = f"{theirs}shared_expert.", config.moe.shared_activation
    yield from feed_forward(f"{ours}shared.", shared, config.moe.shared_hidden, activation)
    yield Piece(f"{ours}shared_gate.weight", f"{theirs}shared_expert_gate.weight")


def _heads_of(row: int, heads: int, stride: int, start: int, size: int) -> View:
    """From `row` on, heads of `stride` rows; of each, `size` rows from `start`."""
    return lambda x: x[row : row + heads * stride].unflatten(0, (heads, stride))[:, start : start + size]


def _slice(start: int, size: int) -> View:
    return lambda x: x[start : start + size]


FAMILIES = (
    Family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        PAIRS,
        pieces,
        fixed=FIXED,
        expects={"hidden_act": ("silu",), "attention_bias": (False,), "attention_dropout": (0.0,)},
        read_more=read_more,
        write_more=write_more,
        prediction=r"mtp\..*",
    ),
)
