"""ERNIE 4.5 with experts: softmax experts chosen with a bias, interleaved rotary."""

from collections.abc import Iterator
from typing import Any

from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.families.gqa import EXPECTS, HEADS, ExpertNames, head_dim_of, moe_family
from model.hf.family import Family
from model.hf.fields import Fields
from model.hf.parts import Pairs, attn_of, layout_lines, rope_parameters, rotary_lines
from model.hf.pieces import Piece

NAMES = ExpertNames("mlp.gate", "mlp.experts")
PAIRS: Pairs = HEADS | {
    "tie_word_embeddings": ("model.has_tied_embeddings", True),
    "intermediate_size": "model.ffn_hidden",
    "rms_norm_eps": ("residual.norm_eps", 1e-5),
    "moe_num_experts": "moe.num_experts",
    "moe_k": "moe.top_k",
    "moe_intermediate_size": "moe.hidden",
}
FIXED = (
    *("moe=softmax", "residual=pre_norm", "residual.has_zero_centered_norm=false"),
    *("moe.has_normalized_weights=true", "moe.weight_scale=1.0", "moe.has_shared_gate=false"),
    *("mixer.attn.output_gate=none", "mixer.attn.qk_norm=none", "mixer.attn.rotary_layout=interleaved"),
)
# Of training, and of MTP modules, which are left out.
UNUSED = ("router_aux_loss_coef", "moe_capacity", "num_nextn_predict_layers")


def read_more(fields: Fields) -> list[str]:
    """Which layers have experts, from a start, an end and an interval; heads that are rotated wholly."""
    for name in UNUSED:
        fields.take(name, None)
    depth, dim = fields.take("num_hidden_layers"), head_dim_of(fields)
    start, interval = fields.take("moe_layer_start_index", 1), fields.take("moe_layer_interval", 1)
    end = fields.take("moe_layer_end_index", -1)
    end = depth - 1 if end == -1 else end
    ffns = has_experts(depth, start, end, interval)
    shared = fields.take("moe_num_shared_experts", 2)
    return [
        f"moe.shared_hidden={shared * fields.take('moe_intermediate_size')}",
        f"mixer.attn.head_dim={dim}",
        f"mixer.attn.rotary_dim={dim}",
        *rotary_lines(fields, "attn", 500_000.0),
        *layout_lines(["attn"] * depth, ["moe" if has else "dense" for has in ffns]),
    ]


def has_experts(depth: int, start: int, end: int, interval: int) -> list[bool]:
    """For each layer, counted from one, whether the interval divides it between start and end."""
    return [(layer + 1) % interval == 0 and start <= layer <= end for layer in range(depth)]


def write_more(config: Architecture) -> dict[str, Any]:
    """What `read_more` reads. Raises CheckpointError for experts that come in no such interval."""
    attn, moe = attn_of(config), config.moe
    found = [layer.ffn == "moe" for layer in config.layers]
    depth, layers = len(found), [index for index, has in enumerate(found) if has]
    start, end = (layers[0], layers[-1]) if layers else (depth, depth)
    intervals = (n for n in range(1, depth + 1) if has_experts(depth, start, end, n) == found)
    interval = next(intervals, None)
    if interval is None:
        raise CheckpointError("has no layout in which experts do not come in one interval")
    return {
        "head_dim": attn.head_dim,
        "rope_parameters": rope_parameters(attn.rotary_theta, attn.rotary_scaling),
        "moe_num_shared_experts": moe.shared_hidden // moe.hidden,
        "moe_layer_start_index": start,
        "moe_layer_end_index": end,
        "moe_layer_interval": interval,
        "router_aux_loss_coef": moe.balance_loss,
    }


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands; biases of experts are one row."""
    yield from moe_family(NAMES)(config)
    for index, layer in enumerate(config.layers):
        if layer.ffn == "moe":
            name = f"model.layers.{index}.mlp.moe_statics.e_score_correction_bias"
            yield Piece(f"blocks.{index}.moe.router.bias", name, lambda x: x[None])


FAMILIES = (
    Family(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        PAIRS,
        pieces,
        fixed=FIXED,
        expects={"hidden_act": EXPECTS["hidden_act"], "use_bias": (False,), "moe_norm_min": (1e-12,)}
        | {"moe_gate": ("topk",), "moe_use_aux_free": (True,)},
        read_more=read_more,
        write_more=write_more,
        aliases={"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
        left_out=(r"model\.mtp_.*",),
        float32=(r".*\.mlp\.gate\.weight",),
    ),
)
