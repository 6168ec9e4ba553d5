"""Nemotron-H: blocks of one mixer or one feed-forward each, Mamba-2, attention without positions, experts."""

from collections.abc import Iterator
from typing import Any

from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.family import Family
from model.hf.fields import Fields, shown
from model.hf.parts import (
    SPLIT,
    AttnNames,
    attn_of,
    attn_pieces,
    experts_apart,
    feed_forward,
    layout_lines,
    skeleton,
)
from model.hf.pieces import Piece
from model.layout import NONE, Layer
from model.mixers.mamba2 import Mamba2Config

BLOCKS = {
    "linear_attention": Layer("mamba2", NONE),
    "full_attention": Layer("attn", NONE),
    "moe": Layer(NONE, "moe"),
    "mlp": Layer(NONE, "dense"),
}
LETTERS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
OLDER = {"mamba": "linear_attention", "attention": "full_attention"}
PAIRS: dict[str, str | tuple[str, Any]] = {
    "hidden_size": "model.width",
    "vocab_size": "model.vocab_size",
    "intermediate_size": ("model.ffn_hidden", 21504),
    "initializer_range": ("model.init_std", 0.02),
    "layer_norm_epsilon": ("residual.norm_eps", 1e-5),
    "num_attention_heads": "mixer.attn.num_heads",
    "num_key_value_heads": "mixer.attn.num_key_heads",
    "head_dim": ("mixer.attn.head_dim", 128),
    "mamba_num_heads": "mixer.mamba2.num_heads",
    "mamba_head_dim": "mixer.mamba2.value_dim",
    "n_groups": "mixer.mamba2.num_key_heads",
    "ssm_state_size": "mixer.mamba2.key_dim",
    "conv_kernel": ("mixer.mamba2.conv_width", 4),
    "use_conv_bias": ("mixer.mamba2.has_conv_bias", True),
    "time_step_min": ("mixer.mamba2.dt_floor", 0.001),
    "time_step_max": ("mixer.mamba2.dt_max", 0.1),
    "n_routed_experts": ("moe.num_experts", 8),
    "num_experts_per_tok": ("moe.top_k", 2),
    "moe_intermediate_size": ("moe.hidden", 7688),
    "moe_shared_expert_intermediate_size": ("moe.shared_hidden", 7688),
    "routed_scaling_factor": ("moe.weight_scale", 1.0),
    "norm_topk_prob": ("moe.has_normalized_weights", True),
    "n_group": ("moe.num_groups", 1),
    "topk_group": ("moe.kept_groups", 1),
}
ALIASES = {
    "layer_types": "layers_block_type",
    "num_local_experts": "n_routed_experts",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
}
EXPECTS = {
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "hidden_dropout": (0.0,),
    "mamba_hidden_act": ("silu",),
    "mamba_proj_bias": (False,),
    "mlp_bias": (False,),
    "use_bias": (False,),
    "mlp_hidden_act": ("relu2",),
    "moe_latent_size": (None,),
    "n_shared_experts": (1,),
    "num_nextn_predict_layers": (0,),
    "sliding_window": (None,),
    # transformers ties nothing here.
    "tie_word_embeddings": (False,),
}
FIXED = (
    *("residual=pre_norm", "residual.has_zero_centered_norm=false", "moe=sigmoid"),
    *("moe.has_shared_gate=false", "mixer.attn.rotary_dim=0"),
    *("mixer.attn.qk_norm=none", "mixer.attn.output_gate=none"),
    *("model.activation.kind=relu2", "model.has_tied_embeddings=false"),
)
# How things are computed, cached, kept or drawn at first, and a stretch of channels that heads already say;
# steps have no bounds but time_step_min, whatever time_step_limit says.
UNUSED = (
    *("chunk_size", "expand", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap", "num_logits_to_keep"),
    *("rescale_prenorm_residual", "residual_in_fp32", "time_step_floor", "time_step_limit"),
    *("use_mamba_kernels", "mtp_layers_block_type", "mtp_hybrid_override_pattern", "rope_theta"),
    *("partial_rotary_factor", "norm_eps"),
)


def read_more(fields: Fields) -> list[str]:
    """Layout: a letter for each block, or a list."""
    for name in UNUSED:
        fields.take(name, None)
    kinds: list[str] | None = fields.take("layers_block_type", None)
    letters: str | None = fields.take("hybrid_override_pattern", None)
    if kinds is None and letters is not None:
        kinds = [LETTERS.get(letter, letter) for letter in letters]
    kinds = [OLDER.get(kind, kind) for kind in kinds or fields.take("layers_block_type")]
    if unknown := sorted(set(kinds) - BLOCKS.keys()):
        raise CheckpointError(f"layers_block_type has {', '.join(unknown)}; built are {', '.join(BLOCKS)}")
    fields.expect("num_hidden_layers", len(kinds))
    layers = [BLOCKS[kind] for kind in kinds]
    fields.expect("attention_head_dim", fields.take("head_dim", 128), None)
    smallest = fields.take("time_step_min", 0.001)
    return [
        f"model.depth={len(layers)}",
        f"mixer.mamba2.dt_min={shown(smallest)}",
        *layout_lines([layer.mixer for layer in layers], [layer.ffn for layer in layers]),
    ]


def write_more(config: Architecture) -> dict[str, Any]:
    """Layout. Raises CheckpointError for a layer of two halves."""
    names = {layer: kind for kind, layer in BLOCKS.items()}
    if unknown := sorted(set(config.layers) - names.keys()):
        raise CheckpointError(f"has no layers with mixer {unknown[0].mixer} and ffn {unknown[0].ffn}")
    kinds = [names[layer] for layer in config.layers]
    letters = {kind: letter for letter, kind in LETTERS.items()}
    return {
        "num_hidden_layers": len(kinds),
        "hybrid_override_pattern": "".join(letters[kind] for kind in kinds),
        "layers_block_type": kinds,
    }


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands."""
    yield from skeleton(config, embed="backbone.embeddings.weight", norm="backbone.norm_f.weight")
    moe = config.moe
    for index, layer in enumerate(config.layers):
        ours, theirs = f"blocks.{index}.", f"backbone.layers.{index}.mixer."
        half = "ffn" if layer.mixer == NONE else "mixer"
        yield Piece(f"{ours}{half}_residual.norm.weight", f"backbone.layers.{index}.norm.weight")
        if layer.mixer == "mamba2":
            yield from mamba2_pieces(f"{ours}mixer.", theirs, config)
        elif layer.mixer != NONE:
            yield from attn_pieces(f"{ours}mixer.", theirs, attn_of(config, layer.mixer), AttnNames())
        elif layer.ffn == "dense":
            hidden = config.model.ffn_hidden
            yield from feed_forward(f"{ours}ffn.", theirs, hidden, config.model.activation)
        else:
            yield Piece(f"{ours}moe.router.weight", f"{theirs}gate.weight")
            yield Piece(f"{ours}moe.router.bias", f"{theirs}gate.e_score_correction_bias")
            yield from experts_apart(config, f"{ours}moe.experts.", f"{theirs}experts.", SPLIT)
            shared, hidden = f"{theirs}shared_experts.", moe.shared_hidden
            yield from feed_forward(f"{ours}moe.shared.", shared, hidden, moe.shared_activation)


def mamba2_pieces(ours: str, theirs: str, config: Architecture) -> Iterator[Piece]:
    """One projection, in the same order of parts as ours."""
    mamba = config.mixer["mamba2"]
    assert isinstance(mamba, Mamba2Config), f"{type(mamba)=}"
    yield Piece(f"{ours}in_proj.weight", f"{theirs}in_proj.weight")
    yield Piece(f"{ours}conv.weight", f"{theirs}conv1d.weight", lambda x: x[:, None])
    if mamba.has_conv_bias:
        yield Piece(f"{ours}conv.bias", f"{theirs}conv1d.bias")
    for mine, name in (("step.A_log", "A_log"), ("step.dt_bias", "dt_bias"), ("skip", "D")):
        yield Piece(f"{ours}{mine}", f"{theirs}{name}")
    for mine, name in (("out_norm", "norm"), ("out_proj", "out_proj")):
        yield Piece(f"{ours}{mine}.weight", f"{theirs}{name}.weight")


FAMILIES = (
    Family(
        "nemotron_h",
        "NemotronHForCausalLM",
        PAIRS,
        pieces,
        fixed=FIXED,
        expects=EXPECTS,
        read_more=read_more,
        write_more=write_more,
        aliases=ALIASES,
    ),
)
