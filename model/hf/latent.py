"""What families of latent attention share: config fields, and where tensors stand."""

from collections.abc import Iterator
from typing import Any

from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.fields import Fields
from model.hf.parts import (
    experts_apart,
    feed_forward,
    joined_rows,
    layout_lines,
    rope_parameters,
    rotary_lines,
    skeleton,
)
from model.hf.pieces import Piece, head_rows, rows
from model.latent_attention import LatentConfig
from model.layout import Layer
from model.mixers.dsa import DsaConfig

Pairs = dict[str, str | tuple[str, Any]]
FFNS = {"dense": "dense", "sparse": "moe"}
# What repeats the model's own embedding and head in MTP modules.
REPEATED = (r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight",)
# Fields that speak of training or of how experts are spread over devices.
TRAINING = ("aux_loss_alpha", "seq_aux", "ep_size", "index_share_for_mtp_iteration")


def sizes(mixer: str, norm_eps: float = 1e-6) -> dict[str, str | tuple[str, Any]]:
    """Fields that all have; the latent attention is mixer.`mixer`."""
    latent = {
        "num_attention_heads": "num_heads",
        "q_lora_rank": "query_latent_dim",
        "kv_lora_rank": "latent_dim",
        "qk_nope_head_dim": "key_dim",
        "qk_rope_head_dim": "shared_key_dim",
        "v_head_dim": "value_dim",
    }
    return {
        "hidden_size": "model.width",
        "num_hidden_layers": "model.depth",
        "vocab_size": "model.vocab_size",
        "intermediate_size": "model.ffn_hidden",
        "tie_word_embeddings": ("model.has_tied_embeddings", False),
        "initializer_range": ("model.init_std", 0.02),
        "rms_norm_eps": ("residual.norm_eps", norm_eps),
        "n_routed_experts": "moe.num_experts",
        "num_experts_per_tok": "moe.top_k",
        "moe_intermediate_size": "moe.hidden",
        "routed_scaling_factor": "moe.weight_scale",
        **{theirs: f"mixer.{mixer}.{ours}" for theirs, ours in latent.items()},
    }


SIGMOID: Pairs = {
    "n_group": ("moe.num_groups", 1),
    "topk_group": ("moe.kept_groups", 1),
    "norm_topk_prob": ("moe.has_normalized_weights", True),
}
# What transformers takes for DeepSeek-V3 and its kin.
V3_SIGMOID = SIGMOID | {"n_group": ("moe.num_groups", 8), "topk_group": ("moe.kept_groups", 4)}
PLAIN = (
    *("residual=pre_norm", "residual.has_zero_centered_norm=false"),
    *("moe.has_shared_gate=false", "model.mtp.ffn=moe", "model.mtp.puts_hidden_first=false"),
)
# Entries that no layer uses must fit too; these take fields from those that are set.
UNUSED = ("mixer.dsa.rotary_dim=0", "mixer.dsa_shared.rotary_dim=0")
EXPECTS = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "moe_layer_freq": (1,),
}
NOAUX = EXPECTS | {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}


def common(fields: Fields, mixer: str, default_dense: int) -> list[str]:
    """Shared experts, rotary, MTP modules and the layout of feed-forwards; mixers are all `mixer`."""
    depth, heads = fields.take("num_hidden_layers"), fields.take("num_attention_heads")
    rotary, own = fields.take("qk_rope_head_dim"), fields.take("qk_nope_head_dim")
    fields.expect("num_key_value_heads", heads, None)
    fields.expect("qk_head_dim", rotary + own, None)
    # The rotary dim is that of qk_rope_head_dim whatever these say.
    for name in ("head_dim", *TRAINING):
        fields.take(name, None)
    fields.expect("partial_rotary_factor", 1.0, None)
    shared = fields.take("n_shared_experts", None) or 0
    if shared < 1:
        raise CheckpointError(f"n_shared_experts is {shared}; these architectures have at least one")
    leading = fields.take("first_k_dense_replace", default_dense)
    kinds: list[str] = ["dense"] * min(leading, depth) + ["sparse"] * (depth - leading)
    kinds = fields.take("mlp_layer_types", None) or kinds
    mtp_depth = fields.take("num_nextn_predict_layers", None) or 0
    return [
        f"moe.shared_hidden={shared * fields.take('moe_intermediate_size')}",
        f"mixer.{mixer}.rotary_dim={rotary}",
        f"model.mtp.depth={mtp_depth}",
        f"model.mtp.mixer={mixer}",
        *rotary_lines(fields, mixer, 1e4),
        *layout_lines([mixer] * depth, [FFNS.get(kind, kind) for kind in kinds]),
    ]


def latent_of(config: Architecture, name: str) -> LatentConfig:
    """The latent attention with that name. Raises CheckpointError without it."""
    found = config.mixer.get(name)
    if not isinstance(found, LatentConfig):
        raise CheckpointError(f"mixer.{name} is not latent attention")
    return found


def write_common(config: Architecture, mixer: str) -> dict[str, Any]:
    """What `common` reads."""
    latent, ffns = latent_of(config, mixer), [layer.ffn for layer in config.layers]
    leading = next((index for index, ffn in enumerate(ffns) if ffn != "dense"), len(ffns))
    return {
        "num_key_value_heads": latent.num_heads,
        "n_shared_experts": config.moe.shared_hidden // config.moe.hidden,
        "first_k_dense_replace": leading,
        "num_nextn_predict_layers": config.model.mtp.depth,
        "rope_parameters": rope_parameters(latent.rotary_theta, latent.rotary_scaling),
    }


def mlp_layer_types(config: Architecture) -> list[str]:
    """Dense or sparse, for each layer."""
    names = {ours: theirs for theirs, ours in FFNS.items()}
    return [names.get(layer.ffn, layer.ffn) for layer in config.layers]


def indexer_types(fields: Fields, depth: int) -> list[str]:
    """full or shared for each layer, from the list, a pattern of F and S, or a period and an offset."""
    kinds: list[str] | None = fields.take("indexer_types", None)
    pattern: str | list[str] | None = fields.take("index_topk_pattern", None)
    period = max(fields.take("index_topk_freq", None) or 1, 1)
    offset = fields.take("index_skip_topk_offset", None)
    offset = 2 if offset is None else offset
    if isinstance(pattern, str):
        pattern = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]
    every = ["shared" if max(layer - offset + 1, 0) % period else "full" for layer in range(depth)]
    kinds = kinds or pattern or every
    if len(kinds) < depth:
        raise CheckpointError(f"indexer_types has {len(kinds)} entries for {depth} layers")
    return kinds[:depth]


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands; MTP modules are further layers."""
    yield from skeleton(config)
    for index, layer in enumerate(config.layers):
        yield from layer_pieces(config, f"blocks.{index}.", f"model.layers.{index}.", layer)
    mtp_depth, depth = config.model.mtp, config.model.depth
    for index in range(mtp_depth.depth):
        ours, theirs = f"mtp.{index}.", f"model.layers.{depth + index}."
        yield Piece(f"{ours}embed_norm.weight", f"{theirs}enorm.weight")
        yield Piece(f"{ours}hidden_norm.weight", f"{theirs}hnorm.weight")
        yield Piece(f"{ours}in_proj.weight", f"{theirs}eh_proj.weight")
        yield Piece(f"{ours}norm.weight", f"{theirs}shared_head.norm.weight")
        yield from layer_pieces(config, f"{ours}block.", theirs, Layer(mtp_depth.mixer, mtp_depth.ffn))


def copies(config: Architecture) -> dict[str, str]:
    """Embedding and head, repeated in every MTP module."""
    shape = config.model
    embed = "model.embed_tokens.weight"
    head = embed if shape.has_tied_embeddings else "lm_head.weight"
    found = {}
    for layer in range(shape.depth, shape.depth + shape.mtp.depth):
        found[f"model.layers.{layer}.embed_tokens.weight"] = embed
        found[f"model.layers.{layer}.shared_head.head.weight"] = head
    return found


def layer_pieces(config: Architecture, ours: str, theirs: str, layer: Layer) -> Iterator[Piece]:
    """One pre-norm layer of latent attention and a feed-forward."""
    yield Piece(f"{ours}mixer_residual.norm.weight", f"{theirs}input_layernorm.weight")
    yield Piece(f"{ours}ffn_residual.norm.weight", f"{theirs}post_attention_layernorm.weight")
    yield from latent_pieces(f"{ours}mixer.", f"{theirs}self_attn.", latent_of(config, layer.mixer))
    moe = config.moe
    if layer.ffn == "dense":
        yield from feed_forward(
            f"{ours}ffn.", f"{theirs}mlp.", config.model.ffn_hidden, config.model.activation
        )
        return
    yield Piece(f"{ours}moe.router.weight", f"{theirs}mlp.gate.weight")
    if moe.score == "sigmoid":
        yield Piece(f"{ours}moe.router.bias", f"{theirs}mlp.gate.e_score_correction_bias")
    yield from experts_apart(config, f"{ours}moe.experts.", f"{theirs}mlp.experts.")
    shared = f"{theirs}mlp.shared_experts."
    yield from feed_forward(f"{ours}moe.shared.", shared, moe.shared_hidden, moe.shared_activation)


def latent_pieces(ours: str, theirs: str, latent: LatentConfig) -> Iterator[Piece]:
    """Projections of the latents, and the indexer. Theirs has key and value of a head together."""
    queries, keys, shared = latent.query_latent_dim, latent.latent_dim, latent.shared_key_dim
    down = {f"{theirs}kv_a_proj_with_mqa.weight": keys + shared}
    if queries:
        down = {f"{theirs}q_a_proj.weight": queries} | down
        yield Piece(f"{ours}q_norm.weight", f"{theirs}q_a_layernorm.weight")
    yield from joined_rows(f"{ours}down_proj.weight", down)
    yield Piece(f"{ours}q_proj.weight", f"{theirs}{'q_b_proj' if queries else 'q_proj'}.weight")
    yield Piece(f"{ours}kv_norm.weight", f"{theirs}kv_a_layernorm.weight")
    heads, key, value = latent.num_heads, latent.key_dim, latent.value_dim
    shape, name = (heads * (key + value), keys), f"{theirs}kv_b_proj.weight"
    for first, start, size in ((0, 0, key), (heads * key, key, value)):
        mine = head_rows(heads, size, 0, size, first=first)
        other = head_rows(heads, key + value, start, size)
        yield Piece(f"{ours}kv_proj.weight", name, mine, other, shape)
    yield Piece(f"{ours}out_proj.weight", f"{theirs}o_proj.weight")
    if isinstance(latent, DsaConfig) and latent.index == "own":
        yield from indexer_pieces(ours, f"{theirs}indexer.", latent)


def indexer_pieces(ours: str, theirs: str, dsa: DsaConfig) -> Iterator[Piece]:
    """Queries from the latent, one key and the weights of heads from the input."""
    yield Piece(f"{ours}index_q_proj.weight", f"{theirs}wq_b.weight")
    for name, view in zip(("wk", "weights_proj"), rows(dsa.index_dim, dsa.index_heads), strict=True):
        yield Piece(f"{ours}index_proj.weight", f"{theirs}{name}.weight", view)
    for kind in ("weight", "bias"):
        yield Piece(f"{ours}index_norm.{kind}", f"{theirs}k_norm.{kind}")


MTP_FIELDS: dict[str, Any] = {
    "ignored": REPEATED,
    "mtp": r"model\.layers\.{depth}\..*",
    "copies": copies,
    "aliases": {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
}
