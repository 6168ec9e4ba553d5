"""Qwen3-Next: 3:1 Gated DeltaNet and gated attention, softmax experts, shared expert with a gate."""

from collections.abc import Callable, Iterator
from typing import Any

from model.config import Architecture
from model.hf.family import Family
from model.hf.fields import Fields
from model.hf.parts import (
    SIZES,
    Pairs,
    attn_of,
    experts_apart,
    feed_forward,
    layer_types,
    layout_lines,
    lines,
    mixers_of,
    rope_of,
    rope_parameters,
    rotary_of,
    rotary_share,
    skeleton,
)
from model.hf.pieces import Piece, TensorView, head_rows
from model.layout import Layer
from model.mixers.attn import AttnConfig
from model.mixers.gdn import GdnConfig

KINDS = {"linear_attention": "gdn", "full_attention": "attn"}
GdnPieces = Callable[[str, str, GdnConfig, int], Iterator[Piece]]
PAIRS: Pairs = SIZES | {
    "intermediate_size": ("model.ffn_hidden", 5632),
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
MTP = {"mixer": "attn", "ffn": "moe", "puts_hidden_first": False}
EXPECTS = {"hidden_act": ("silu",), "attention_bias": (False,), "attention_dropout": (0.0,)}


def read_more(fields: Fields) -> list[str]:
    """Layout, rotary and the MTP module, which the config need not mention."""
    depth = fields.take("num_hidden_layers")
    dense, sparse_step = fields.take("mlp_only_layers", None) or [], fields.take("decoder_sparse_step", 1)
    ffns = ["dense" if i in dense or (i + 1) % sparse_step else "moe" for i in range(depth)]
    fields.expect("use_sliding_window", False)
    fields.expect("num_nextn_predict_layers", 1, 0)
    return [
        *read_mixers(fields, ffns),
        *lines({"model": {"mtp": MTP}}),
        f"model.mtp.depth={fields.take('num_nextn_predict_layers', 1)}",
    ]


def read_mixers(fields: Fields, ffns: list[str]) -> list[str]:
    """Layout and rotary. Sections of positions in an image are all one position in text."""
    interval = fields.take("full_attention_interval", 4)
    every = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(len(ffns))]
    mixers = mixers_of(fields, every, KINDS)
    rope = rope_of(fields, 10000.0)
    share = rope.get("partial_rotary_factor", fields.take("partial_rotary_factor", 0.25))
    rotary_dim = int(fields.take("head_dim", 256) * share)
    rope = {name: value for name, value in rope.items() if not name.startswith("mrope_")}
    fields.take("router_aux_loss_coef", None)
    return [f"mixer.attn.rotary_dim={rotary_dim}", *rotary_of(rope, "attn"), *layout_lines(mixers, ffns)]


def write_more(config: Architecture) -> dict[str, Any]:
    """Layout, rotary and the MTP module."""
    return {
        **write_mixers(config),
        "mlp_only_layers": [i for i, layer in enumerate(config.layers) if layer.ffn == "dense"],
        "num_nextn_predict_layers": config.model.mtp.depth,
    }


def write_mixers(config: Architecture, **rope: Any) -> dict[str, Any]:
    """Layout and rotary, with `rope` among its parameters."""
    attn = attn_of(config)
    rope["partial_rotary_factor"] = rotary_share(attn.rotary_dim, attn.head_dim)
    return {
        "layer_types": layer_types(config, KINDS),
        "rope_parameters": rope_parameters(attn.rotary_theta, attn.rotary_scaling, **rope),
        "router_aux_loss_coef": config.moe.balance_loss,
    }


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands."""
    yield from skeleton(config)
    for ours, theirs, layer in layer_prefixes(config):
        yield from layer_pieces(ours, theirs, layer, config, gdn_pieces)
        if layer.ffn == "moe":
            yield from experts_apart(config, f"{ours}moe.experts.", f"{theirs}mlp.experts.")
    yield from prediction_pieces(config)


def layer_prefixes(config: Architecture) -> Iterator[tuple[str, str, Layer]]:
    """Every layer, also of MTP modules: how its tensors start, ours and theirs."""
    for index, layer in enumerate(config.layers):
        yield f"blocks.{index}.", f"model.layers.{index}.", layer
    mtp = config.model.mtp
    for index in range(mtp.depth):
        yield f"mtp.{index}.block.", f"mtp.layers.{index}.", Layer(mtp.mixer, mtp.ffn)


def prediction_pieces(config: Architecture) -> Iterator[Piece]:
    """What stands around the layer of an MTP module; embedding and head are the model's own."""
    names = {"embed_norm": "pre_fc_norm_embedding", "hidden_norm": "pre_fc_norm_hidden"}
    for index in range(config.model.mtp.depth):
        for mine, name in (names | {"in_proj": "fc", "norm": "norm"}).items():
            yield Piece(f"mtp.{index}.{mine}.weight", f"mtp.{name}.weight")


def layer_pieces(
    ours: str, theirs: str, layer: Layer, config: Architecture, gdn: GdnPieces
) -> Iterator[Piece]:
    """All of a layer but its routed experts."""
    yield Piece(f"{ours}mixer_residual.norm.weight", f"{theirs}input_layernorm.weight")
    yield Piece(f"{ours}ffn_residual.norm.weight", f"{theirs}post_attention_layernorm.weight")
    mixer, width = config.mixer[layer.mixer], config.model.width
    if isinstance(mixer, GdnConfig):
        yield from gdn(f"{ours}mixer.", f"{theirs}linear_attn.", mixer, width)
    else:
        assert isinstance(mixer, AttnConfig), f"{type(mixer)=}"
        yield from gated_attn_pieces(f"{ours}mixer.", f"{theirs}self_attn.", mixer, width)
    if layer.ffn == "dense":
        hidden = config.model.ffn_hidden
        yield from feed_forward(f"{ours}ffn.", f"{theirs}mlp.", hidden, config.model.activation)
        return
    shared, activation = f"{theirs}mlp.shared_expert.", config.moe.shared_activation
    yield Piece(f"{ours}moe.router.weight", f"{theirs}mlp.gate.weight")
    yield from feed_forward(f"{ours}moe.shared.", shared, config.moe.shared_hidden, activation)
    yield Piece(f"{ours}moe.shared_gate.weight", f"{theirs}mlp.shared_expert_gate.weight")


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
        mine = head_rows(heads, size, 0, size, first=row)
        other = head_rows(heads, totals[name], start, size)
        shape = (heads * totals[name], width)
        yield Piece(f"{ours}in_proj.weight", f"{theirs}{name}.weight", mine, other, shape)
        row += heads * size
    yield Piece(f"{ours}conv.weight", f"{theirs}conv1d.weight", lambda x: x[:, None])
    yield Piece(f"{ours}decay.A_log", f"{theirs}A_log")
    yield Piece(f"{ours}decay.dt_bias", f"{theirs}dt_bias")
    yield Piece(f"{ours}out_norm.weight", f"{theirs}norm.weight")
    yield Piece(f"{ours}out_proj.weight", f"{theirs}out_proj.weight")


def gated_attn_pieces(ours: str, theirs: str, attn: AttnConfig, width: int) -> Iterator[Piece]:
    """Theirs puts the gate of a head behind the query of that head."""
    heads, dim = attn.num_heads, attn.head_dim
    shape = (2 * heads * dim, width)
    for half in (0, 1):
        mine = head_rows(heads, dim, 0, dim, first=half * heads * dim)
        other = head_rows(heads, 2 * dim, half * dim, dim)
        yield Piece(f"{ours}in_proj.weight", f"{theirs}q_proj.weight", mine, other, shape)
    start, keys = 2 * heads * dim, attn.num_key_heads * dim
    for name, at in (("k_proj", start), ("v_proj", start + keys)):
        yield Piece(f"{ours}in_proj.weight", f"{theirs}{name}.weight", _slice(at, keys))
    yield Piece(f"{ours}out_proj.weight", f"{theirs}o_proj.weight")
    yield Piece(f"{ours}q_norm.weight", f"{theirs}q_norm.weight")
    yield Piece(f"{ours}k_norm.weight", f"{theirs}k_norm.weight")


def _slice(start: int, size: int) -> TensorView:
    return lambda x: x[start : start + size]


FAMILIES = (
    Family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        PAIRS,
        pieces,
        fixed=FIXED,
        expects=EXPECTS,
        read_more=read_more,
        write_more=write_more,
        mtp=r"mtp\..*",
    ),
)
