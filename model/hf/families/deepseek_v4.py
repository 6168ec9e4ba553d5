"""DeepSeek-V4: one shared key over a window and compressed entries, hashed experts, four residual streams.

Names on the hub are DeepSeek's own; transformers saves a mixture of those and of its own.
"""

import math
from collections.abc import Iterator
from typing import Any

from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.family import Family
from model.hf.fields import Fields
from model.hf.parts import (
    SIZES,
    Pairs,
    experts_apart,
    feed_forward,
    joined_rows,
    layout_lines,
    lines,
    rope_parameters,
    rotary_of,
    skeleton,
)
from model.hf.pieces import Piece
from model.mixers.csa import CsaConfig
from model.mixers.hca import HcaConfig
from model.rotary import RotaryScaling
from model.shared_key import SharedKeyConfig

SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
MIXERS = {SLIDING: "swa_shared", SPARSE: "csa", HEAVY: "hca"}
FFNS = {"hash_moe": "hash", "moe": "moe"}
# What compress_ratios, the older spelling of the layout, stands for.
RATIOS = {0: SLIDING, 4: SPARSE, 128: HEAVY}
W_NAMES = ("w1.weight", "w3.weight", "w2.weight")
PAIRS: Pairs = SIZES | {
    "rms_norm_eps": ("residual.norm_eps", 1e-6),
    "swiglu_limit": ("model.activation.limit", 10.0),
    "hc_mult": ("residual.streams", 4),
    "hc_sinkhorn_iters": ("residual.iterations", 20),
    "hc_eps": ("residual.hyper_eps", 1e-6),
    "num_attention_heads": "mixer.hca.num_heads",
    "head_dim": "mixer.hca.head_dim",
    "q_lora_rank": "mixer.hca.query_rank",
    "o_groups": "mixer.hca.output_groups",
    "o_lora_rank": "mixer.hca.output_rank",
    "sliding_window": ("mixer.hca.window", 128),
    "index_n_heads": "mixer.csa.index_heads",
    "index_head_dim": "mixer.csa.index_dim",
    "index_topk": "mixer.csa.index_top_k",
    "n_routed_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.top_k",
    "moe_intermediate_size": "moe.hidden",
    "routed_scaling_factor": ("moe.weight_scale", 1.5),
}
FIXED = (
    *("moe=sigmoid", "moe.score=sqrt_softplus", "residual=hyper", "model.activation.kind=swiglu"),
    "model.mtp.depth=0",
)
EXPECTS = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "mlp_bias": (False,),
    "norm_topk_prob": (True,),
    "num_key_value_heads": (1,),
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
}


def read_more(fields: Fields) -> list[str]:
    """Layout, compression, shared experts and the two rotaries."""
    depth = fields.take("num_hidden_layers")
    # The experts' size by another name; MTP modules, which are of another form than ours;
    # a format of tensors, which the tensors tell.
    for name in ("intermediate_size", "num_nextn_predict_layers", "expert_dtype", "router_aux_loss_coef"):
        fields.take(name, None)
    shared = fields.take("n_shared_experts", 1)
    if shared != 1:
        raise CheckpointError(f"n_shared_experts is {shared}; this architecture has one")
    mixers, ffns = layer_types(fields, depth)
    rates = fields.take("compress_rates", None) or {SPARSE: 4, HEAVY: 128}
    rates = {
        SPARSE: fields.take("compress_rate_csa", None) or rates[SPARSE],
        HEAVY: fields.take("compress_rate_hca", None) or rates[HEAVY],
    }
    return [
        f"moe.shared_hidden={fields.take('moe_intermediate_size')}",
        f"mixer.csa.compression={rates[SPARSE]}",
        f"mixer.hca.compression={rates[HEAVY]}",
        *rotary(fields),
        *layout_lines([MIXERS.get(kind, kind) for kind in mixers], [FFNS.get(kind, kind) for kind in ffns]),
    ]


def layer_types(fields: Fields, depth: int) -> tuple[list[str], list[str]]:
    """Mixers and feed-forwards by their names; older fields give ratios, and a number of hashed layers."""
    ratios, hashed = fields.take("compress_ratios", None), fields.take("num_hash_layers", None)
    mixers, ffns = fields.take("layer_types", None), fields.take("mlp_layer_types", None)
    if mixers is None:
        if ratios is None:
            raise CheckpointError("layer_types is missing, and compress_ratios too")
        unknown = sorted(set(ratios[:depth]) - RATIOS.keys())
        if unknown:
            raise CheckpointError(f"compress_ratios has {unknown}; known are {', '.join(map(str, RATIOS))}")
        mixers = [RATIOS[ratio] for ratio in ratios]
    if ffns is None:
        hashed = min(depth, 3 if hashed is None else hashed)
        ffns = ["hash_moe"] * hashed + ["moe"] * (depth - hashed)
    for name, kinds in (("layer_types", mixers), ("mlp_layer_types", ffns)):
        if len(kinds) < depth:
            raise CheckpointError(f"{name} has {len(kinds)} entries for {depth} layers")
    return mixers[:depth], ffns[:depth]


def rotary(fields: Fields) -> list[str]:
    """One rotary for windows alone, another one, which may be stretched, where entries are compressed."""
    head_dim, partial = fields.take("head_dim"), fields.take("partial_rotary_factor", None)
    dim = fields.take("qk_rope_head_dim", None) or int(head_dim * (partial or 64 / 512))
    given = dict(fields.take("rope_parameters", None) or {})
    theta, compressed_theta = fields.take("rope_theta", 1e4), fields.take("compress_rope_theta", 1.6e5)
    stretch = fields.take("rope_scaling", None) or {}
    if "main" in given and "compress" in given:
        main, compress = given["main"], given["compress"]
        compressed_theta = theta
    else:
        main, compress = {}, {"attention_factor": 1.0} | stretch | given
        if compress.get("rope_type", compress.get("type", "default")) == "default":
            del compress["attention_factor"]
        compress |= {"rope_theta": compressed_theta}
    found = [f"mixer.hca.rotary_dim={dim}"]
    for mixer, base, parameters in (("hca", compressed_theta, compress), ("swa_shared", theta, main)):
        # Every field is said: the windows' rotary would take over from the other what is not.
        yarn = parameters.get("rope_type", parameters.get("type")) == "yarn"
        fields_of = NO_STRETCH.model_dump() | ({"attention_factor": None} if yarn else {})
        found += lines({"rotary_scaling": fields_of}, f"mixer.{mixer}.")
        found += rotary_of({"rope_theta": base} | parameters, mixer)
    return found


NO_STRETCH = RotaryScaling(
    kind="none",
    factor=1.0,
    original_context=65536,
    beta_fast=32.0,
    beta_slow=1.0,
    truncates=True,
    attention_factor=1.0,
    mscale=None,
    mscale_all_dim=None,
    low_frequency=1.0,
    high_frequency=4.0,
)


def write_more(config: Architecture) -> dict[str, Any]:
    """What `read_more` reads, in the newer spelling and, for what reads only that, in the older one."""
    heavy, light, window = (config.mixer.get(name) for name in ("hca", "csa", "swa_shared"))
    if not isinstance(heavy, HcaConfig) or not isinstance(light, CsaConfig):
        raise CheckpointError("mixer.hca and mixer.csa say what the others share; one of them is missing")
    assert isinstance(window, HcaConfig), f"{type(window)=}"
    if config.model.activation.limit is None:
        raise CheckpointError("model.activation.limit is null; swiglu_limit is a number")
    mixers = {ours: theirs for theirs, ours in MIXERS.items()}
    ffns = {ours: theirs for theirs, ours in FFNS.items()}
    layers = config.layers
    partial = heavy.rotary_dim / heavy.head_dim
    if int(partial * heavy.head_dim) < heavy.rotary_dim:
        partial = math.nextafter(partial, 1.0)
    rates = {SPARSE: light.compression, HEAVY: heavy.compression}
    kinds = [mixers.get(layer.mixer, layer.mixer) for layer in layers]
    by_ffn = [ffns.get(layer.ffn, layer.ffn) for layer in layers]
    return {
        "n_shared_experts": 1,
        "num_nextn_predict_layers": 0,
        "layer_types": kinds,
        "compress_rates": rates,
        "mlp_layer_types": by_ffn,
        "compress_ratios": [rates.get(kind, 0) for kind in kinds],
        "num_hash_layers": by_ffn.count("hash_moe"),
        "qk_rope_head_dim": heavy.rotary_dim,
        "partial_rotary_factor": partial,
        "rope_theta": window.rotary_theta,
        "compress_rope_theta": heavy.rotary_theta,
        "rope_parameters": {
            name: rope_parameters(mixer.rotary_theta, mixer.rotary_scaling, partial_rotary_factor=partial)
            for name, mixer in (("main", window), ("compress", heavy))
        },
    }


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands."""
    yield from skeleton(config, embed="embed.weight", norm="norm.weight", head="head.weight")
    yield from hyper_pieces("collapse.", "hc_head_")
    for index, layer in enumerate(config.layers):
        ours, theirs = f"blocks.{index}.", f"layers.{index}."
        for mine, name in (("mixer", "attn"), ("ffn", "ffn")):
            yield Piece(f"{ours}{mine}_residual.norm.weight", f"{theirs}{name}_norm.weight")
            yield from hyper_pieces(f"{ours}{mine}_residual.", f"{theirs}hc_{name}_")
        mixer = config.mixer[layer.mixer]
        assert isinstance(mixer, SharedKeyConfig), f"{type(mixer)=}"
        yield from attention_pieces(f"{ours}mixer.", f"{theirs}attn.", mixer)
        moe, gate = config.moe, f"{theirs}ffn.gate."
        yield Piece(f"{ours}moe.router.weight", f"{gate}weight")
        if layer.ffn == "hash":
            yield Piece(f"{ours}moe.router.table", f"{gate}tid2eid")
        else:
            yield Piece(f"{ours}moe.router.bias", f"{gate}bias")
        yield from experts_apart(config, f"{ours}moe.experts.", f"{theirs}ffn.experts.", W_NAMES)
        shared = f"{theirs}ffn.shared_experts."
        yield from feed_forward(
            f"{ours}moe.shared.", shared, moe.shared_hidden, moe.shared_activation, W_NAMES
        )


def hyper_pieces(ours: str, theirs: str) -> Iterator[Piece]:
    """What connects the streams."""
    for mine, name in (("weight", "fn"), ("bias", "base"), ("scale", "scale")):
        yield Piece(ours + mine, theirs + name)


def attention_pieces(ours: str, theirs: str, mixer: SharedKeyConfig) -> Iterator[Piece]:
    """Low-rank queries, the one key, the grouped output, and what makes and chooses entries."""
    parts = {f"{theirs}wq_a.weight": mixer.query_rank, f"{theirs}wkv.weight": mixer.head_dim}
    yield from joined_rows(f"{ours}in_proj.weight", parts)
    names = {"q_norm": "q_norm", "q_proj": "wq_b", "kv_norm": "kv_norm"}
    names |= {"group_proj": "wo_a", "out_proj": "wo_b"}
    for mine, name in names.items():
        yield Piece(f"{ours}{mine}.weight", f"{theirs}{name}.weight")
    yield Piece(f"{ours}sinks", f"{theirs}attn_sink")
    if isinstance(mixer, HcaConfig) and mixer.compression is not None:
        yield from compressor_pieces(f"{ours}compressor.", f"{theirs}compressor.", mixer.head_dim)
    if isinstance(mixer, CsaConfig):
        # Two series of channels: an entry reads its own window and the one before.
        yield from compressor_pieces(f"{ours}compressor.", f"{theirs}compressor.", 2 * mixer.head_dim)
        ours, theirs = f"{ours}indexer.", f"{theirs}indexer."
        yield from compressor_pieces(f"{ours}compressor.", f"{theirs}compressor.", 2 * mixer.index_dim)
        yield Piece(f"{ours}q_proj.weight", f"{theirs}wq_b.weight")
        yield Piece(f"{ours}head_proj.weight", f"{theirs}weights_proj.weight")


def compressor_pieces(ours: str, theirs: str, channels: int) -> Iterator[Piece]:
    """Values, gates, position biases and the norm of entries."""
    parts = {f"{theirs}wkv.weight": channels, f"{theirs}wgate.weight": channels}
    yield from joined_rows(f"{ours}in_proj.weight", parts)
    yield Piece(f"{ours}bias", f"{theirs}ape")
    yield Piece(f"{ours}norm.weight", f"{theirs}norm.weight")


def pieces_saved(config: Architecture) -> Iterator[Piece]:
    """The same under the names that transformers saves where no layer compresses."""
    for piece in pieces(config):
        yield piece._replace(theirs=name_saved(piece.theirs))


def pieces_saved_renamed(config: Architecture) -> Iterator[Piece]:
    """And where some do: the key's norm is then saved as if it were that of entries."""
    for piece in pieces_saved(config):
        yield piece._replace(theirs=piece.theirs.replace(".attn.kv_norm.", ".attn.norm."))


def name_saved(name: str) -> str:
    """What transformers makes of a name on the hub when it saves."""
    if name == "head.weight":
        return name
    if name == "embed.weight":
        return "model.embed_tokens.weight"
    return "model." + name.replace("hc_head_", "hc_head.hc_")


FAMILIES = (
    Family(
        "deepseek_v4",
        "DeepseekV4ForCausalLM",
        PAIRS,
        pieces,
        fixed=FIXED,
        expects=EXPECTS,
        read_more=read_more,
        write_more=write_more,
        aliases={"num_local_experts": "n_routed_experts"},
        instead=(pieces_saved, pieces_saved_renamed),
        # MTP modules run on all streams, ours on one.
        left_out=(r"mtp\..*",),
    ),
)
