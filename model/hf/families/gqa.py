"""Families of plain grouped-query attention over softmax or sigmoid experts."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from model.config import Architecture
from model.hf.family import Family
from model.hf.fields import Fields, shown
from model.hf.parts import (
    SIZES,
    SPLIT,
    AttnNames,
    Pairs,
    attn_of,
    attn_pieces,
    experts_apart,
    feed_forward,
    layout_lines,
    rope_of,
    rope_parameters,
    rotary_lines,
    skeleton,
)
from model.hf.pieces import Piece
from model.layout import Layer

LLAMA = AttnNames()
W_NAMES = ("w1.weight", "w3.weight", "w2.weight")
HEADS: Pairs = SIZES | {
    "num_attention_heads": "mixer.attn.num_heads",
    "num_key_value_heads": "mixer.attn.num_key_heads",
}
EXPERTS: Pairs = {
    "num_experts_per_tok": "moe.top_k",
}
PLAIN = (
    *("residual=pre_norm", "residual.has_zero_centered_norm=false", "mixer.attn.output_gate=none"),
    *("moe.shared_hidden=0", "moe.has_shared_gate=false"),
)
EXPECTS = {"hidden_act": ("silu",), "attention_dropout": (0.0,)}


def head_dim_of(fields: Fields) -> int:
    """Width over heads where the config does not say."""
    return fields.take("head_dim", None) or fields.take("hidden_size") // fields.take("num_attention_heads")


def full_rotary(theta: float) -> Callable[[Fields], list[str]]:
    """Overrides for heads that are rotated wholly, in every layer the same attention."""

    def read_more(fields: Fields) -> list[str]:
        dim, depth = head_dim_of(fields), fields.take("num_hidden_layers")
        fields.take("router_aux_loss_coef", None)
        return [
            f"mixer.attn.head_dim={dim}",
            f"mixer.attn.rotary_dim={dim}",
            *rotary_lines(fields, "attn", theta),
            *layout_lines(["attn"] * depth, ["moe"] * depth),
        ]

    return read_more


def write_rotary(config: Architecture) -> dict[str, Any]:
    """Head dim and rope parameters."""
    attn = attn_of(config)
    return {
        "head_dim": attn.head_dim,
        "rope_parameters": rope_parameters(attn.rotary_theta, attn.rotary_scaling),
        "router_aux_loss_coef": config.moe.balance_loss,
    }


class ExpertNames(NamedTuple):
    """What a family calls the tensors of a mixture of experts, below the layer.

    shared and shared_gate are asked for where the model has them.
    """

    router: str
    experts: str
    parts: tuple[str, str, str] = SPLIT
    bias: str | None = None
    shared: str = "mlp.shared_experts."
    shared_gate: str = "mlp.shared_expert_gate.weight"
    dense: str = "mlp."


def moe_family(
    names: ExpertNames, attn_names: AttnNames = LLAMA
) -> Callable[[Architecture], Iterator[Piece]]:
    """Pieces of a pre-norm model whose layers are softmax attention and experts, or dense."""

    def pieces(config: Architecture) -> Iterator[Piece]:
        yield from skeleton(config)
        for index, layer in enumerate(config.layers):
            yield from layer_pieces(
                config, f"blocks.{index}.", f"model.layers.{index}.", layer, names, attn_names
            )

    return pieces


def layer_pieces(
    config: Architecture,
    ours: str,
    theirs: str,
    layer: Layer,
    names: ExpertNames,
    attn_names: AttnNames = LLAMA,
) -> Iterator[Piece]:
    """One pre-norm layer of softmax attention and a feed-forward."""
    yield Piece(f"{ours}mixer_residual.norm.weight", f"{theirs}input_layernorm.weight")
    yield Piece(f"{ours}ffn_residual.norm.weight", f"{theirs}post_attention_layernorm.weight")
    attn = attn_of(config, layer.mixer)
    yield from attn_pieces(f"{ours}mixer.", f"{theirs}self_attn.", attn, attn_names)
    yield from ffn_pieces(config, ours, theirs, layer.ffn, names)


def ffn_pieces(config: Architecture, ours: str, theirs: str, ffn: str, names: ExpertNames) -> Iterator[Piece]:
    """A dense feed-forward, or router and experts."""
    moe, parts = config.moe, names.parts
    if ffn == "dense":
        hidden, activation = config.model.ffn_hidden, config.model.activation
        yield from feed_forward(f"{ours}ffn.", f"{theirs}{names.dense}", hidden, activation, parts)
        return
    yield Piece(f"{ours}moe.router.weight", f"{theirs}{names.router}.weight")
    if names.bias is not None:
        yield Piece(f"{ours}moe.router.bias", f"{theirs}{names.bias}")
    yield from experts_apart(config, f"{ours}moe.experts.", f"{theirs}{names.experts}.", parts)
    if moe.shared_hidden:
        shared, activation = f"{theirs}{names.shared}", moe.shared_activation
        yield from feed_forward(f"{ours}moe.shared.", shared, moe.shared_hidden, activation, parts)
    if moe.has_shared_gate:
        yield Piece(f"{ours}moe.shared_gate.weight", f"{theirs}{names.shared_gate}")


def qwen3_moe_layers(fields: Fields) -> list[str]:
    """Layers that are dense by position."""
    depth, dense = fields.take("num_hidden_layers"), fields.take("mlp_only_layers", None) or []
    sparse_step = fields.take("decoder_sparse_step", 1)
    ffns = ["dense" if i in dense or (i + 1) % sparse_step else "moe" for i in range(depth)]
    fields.expect("use_sliding_window", False)
    fields.take("sliding_window", None)
    fields.take("max_window_layers", None)
    bias = f"mixer.attn.has_output_bias={shown(fields.take('attention_bias', False))}"
    return [*full_rotary(10000.0)(fields), bias, *layout_lines(["attn"] * depth, ffns)]


def write_qwen3_moe(config: Architecture) -> dict[str, Any]:
    """Rotary, and the layers that are dense."""
    dense = [index for index, layer in enumerate(config.layers) if layer.ffn == "dense"]
    return write_rotary(config) | {"mlp_only_layers": dense, "decoder_sparse_step": 1}


def mistral_layers(fields: Fields) -> list[str]:
    """A window in every layer, or in none, and dense feed-forwards."""
    depth, window = fields.take("num_hidden_layers"), fields.take("sliding_window", 4096)
    name = "attn" if window is None else "swa"
    found = [*full_rotary(10000.0)(fields), *layout_lines([name] * depth, ["dense"] * depth)]
    return [*found, f"mixer.attn.window={shown(None)}", f"mixer.swa.window={shown(window)}"]


def write_mistral(config: Architecture) -> dict[str, Any]:
    """Rotary and the window."""
    return write_rotary(config) | {"sliding_window": attn_of(config, config.layers[0].mixer).window}


def minimax_m2_rotary(fields: Fields) -> list[str]:
    """Heads rotated in part."""
    dim, rope = fields.take("head_dim", 128), rope_of(fields, 5e6)
    beside = fields.take("partial_rotary_factor", None)
    given = fields.take("rotary_dim", None)
    beside = beside if beside is not None or given is None else given / dim
    share = rope.get("partial_rotary_factor", beside)
    rotary = dim if share is None else int(dim * share)
    fields.expect("rotary_dim", rotary, None)
    return [
        *full_rotary(5e6)(fields),
        f"mixer.attn.head_dim={dim}",
        f"mixer.attn.rotary_dim={rotary}",
    ]


def write_minimax_m2(config: Architecture) -> dict[str, Any]:
    """Heads rotated in part."""
    attn = attn_of(config)
    rope = rope_parameters(
        attn.rotary_theta, attn.rotary_scaling, partial_rotary_factor=attn.rotary_dim / attn.head_dim
    )
    return write_rotary(config) | {"rope_parameters": rope, "rotary_dim": attn.rotary_dim}


FAMILIES = (
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        HEADS
        | EXPERTS
        | {
            "num_experts": "moe.num_experts",
            "moe_intermediate_size": "moe.hidden",
            "intermediate_size": "model.ffn_hidden",
            "rms_norm_eps": ("residual.norm_eps", 1e-6),
            "norm_topk_prob": ("moe.has_normalized_weights", False),
            "attention_bias": ("mixer.attn.has_bias", False),
        },
        moe_family(ExpertNames("mlp.gate", "mlp.experts")),
        fixed=("moe=softmax", *PLAIN, "mixer.attn.qk_norm=head"),
        expects=EXPECTS,
        read_more=qwen3_moe_layers,
        write_more=write_qwen3_moe,
        aliases={"num_local_experts": "num_experts"},
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        HEADS
        | EXPERTS
        | {
            "num_local_experts": "moe.num_experts",
            "intermediate_size": "moe.hidden",
            "rms_norm_eps": ("residual.norm_eps", 1e-5),
            "sliding_window": ("mixer.attn.window", None),
        },
        moe_family(ExpertNames("block_sparse_moe.gate", "block_sparse_moe.experts", W_NAMES)),
        fixed=("moe=softmax", *PLAIN, "mixer.attn.qk_norm=none"),
        expects=EXPECTS | {"router_jitter_noise": (0.0,)},
        read_more=full_rotary(1e6),
        write_more=write_rotary,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        HEADS
        | {
            "intermediate_size": "model.ffn_hidden",
            "rms_norm_eps": ("residual.norm_eps", 1e-6),
        },
        moe_family(ExpertNames("", "")),
        fixed=(*PLAIN, "mixer.attn.qk_norm=none"),
        expects=EXPECTS,
        read_more=mistral_layers,
        write_more=write_mistral,
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        HEADS
        | EXPERTS
        | {
            "num_experts": "moe.num_experts",
            "intermediate_size": "moe.hidden",
            "rms_norm_eps": ("residual.norm_eps", 1e-5),
            "norm_topk_prob": ("moe.has_normalized_weights", False),
            "clip_qkv": ("mixer.attn.clip", None),
        },
        moe_family(ExpertNames("mlp.gate", "mlp.experts")),
        fixed=("moe=softmax", *PLAIN, "mixer.attn.qk_norm=all_heads"),
        expects=EXPECTS | {"attention_bias": (False,)},
        read_more=full_rotary(10000.0),
        write_more=write_rotary,
    ),
    Family(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        HEADS
        | EXPERTS
        | {
            "num_local_experts": "moe.num_experts",
            "intermediate_size": "moe.hidden",
            "rms_norm_eps": ("residual.norm_eps", 1e-6),
        },
        moe_family(
            ExpertNames(
                "block_sparse_moe.gate",
                "block_sparse_moe.experts",
                W_NAMES,
                bias="block_sparse_moe.e_score_correction_bias",
            )
        ),
        fixed=("moe=sigmoid", *PLAIN, "mixer.attn.qk_norm=all_heads", "moe.weight_scale=1.0"),
        expects=EXPECTS,
        read_more=minimax_m2_rotary,
        write_more=write_minimax_m2,
    ),
)
