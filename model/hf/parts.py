"""What many families share: pieces of projections, feed-forwards and experts, and config fields."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.fields import Fields, shown
from model.hf.pieces import Piece, TensorView, entry, rows, whole
from model.layout import NONE, Layer
from model.mixers.attn import AttnConfig
from model.rotary import RotaryScaling
from model.shape import ActivationConfig

# What the layer_types of a config call our mixers.
WINDOWS = {"sliding_attention": "swa", "full_attention": "attn"}
# Fields that nearly every family has, as Family.pairs.
Pairs = dict[str, str | tuple[str, Any]]
SIZES: Pairs = {
    "hidden_size": "model.width",
    "num_hidden_layers": "model.depth",
    "vocab_size": "model.vocab_size",
    "tie_word_embeddings": ("model.has_tied_embeddings", False),
    "initializer_range": ("model.init_std", 0.02),
}
SPLIT = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def skeleton(
    config: Architecture,
    *,
    embed: str = "model.embed_tokens.weight",
    norm: str = "model.norm.weight",
    head: str = "lm_head.weight",
) -> Iterator[Piece]:
    """Embedding, last norm and head."""
    yield Piece("embed.weight", embed)
    yield Piece("norm.weight", norm)
    if not config.model.has_tied_embeddings:
        yield Piece("head.weight", head)


def joined_rows(ours: str, theirs: dict[str, int]) -> Iterator[Piece]:
    """One matrix of ours whose rows are several of theirs, in order: names to numbers of rows."""
    for (name, _), view in zip(theirs.items(), rows(*theirs.values()), strict=True):
        yield Piece(ours, name, view)


def feed_forward(
    ours: str, theirs: str, hidden: int, activation: ActivationConfig, names: tuple[str, str, str] = SPLIT
) -> Iterator[Piece]:
    """A dense feed-forward; an ungated one has no gate."""
    gate, up, down = names
    parts = {theirs + gate: hidden, theirs + up: hidden} if activation.is_gated else {theirs + up: hidden}
    yield from joined_rows(f"{ours}gate_up.weight", parts)
    yield Piece(f"{ours}down.weight", theirs + down)


def experts_apart(
    config: Architecture, ours: str, theirs: str, names: tuple[str, str, str] = SPLIT
) -> Iterator[Piece]:
    """Routed experts with tensors of their own: theirs + "0." + names and so on."""
    moe = config.moe
    gate, up, down = names
    views = rows(moe.hidden, moe.hidden) if moe.activation.is_gated else rows(moe.hidden)
    for expert in range(moe.num_experts):
        for name, view in zip((gate, up) if moe.activation.is_gated else (up,), views, strict=True):
            yield Piece(f"{ours}gate_up", f"{theirs}{expert}.{name}", entry(expert, view))
        yield Piece(f"{ours}down", f"{theirs}{expert}.{down}", entry(expert))


def experts_fused(
    ours: str, theirs: str, names: tuple[str, str], view: TensorView = whole
) -> Iterator[Piece]:
    """Routed experts in one tensor each way; `view` turns one of ours into the shape of theirs."""
    for mine, name in zip(("gate_up", "down"), names, strict=True):
        yield Piece(f"{ours}{mine}", f"{theirs}{name}", view)


def lines(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Overrides for nested values."""
    found = []
    for name, value in tree.items():
        if isinstance(value, dict):
            found += lines(value, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}={shown(value)}")
    return found


def layout_lines(mixers: Sequence[str], ffns: Sequence[str]) -> list[str]:
    """Overrides for a layout given layer by layer, as the shortest pattern that repeats."""
    return [
        *lines({"layout": {"pattern": pattern_of(mixers), "first": "", "last": ""}}),
        *lines({"layout": {"ffn": {"pattern": pattern_of(ffns), "first": "", "last": ""}}}),
    ]


def pattern_of(names: Sequence[str]) -> str:
    """The shortest pattern that gives these names when it is tiled over them."""
    count = len(names)
    period = next(n for n in range(1, count + 1) if all(names[i] == names[i % n] for i in range(count)))
    runs = [(name, len(list(same))) for name, same in groupby(names[:period])]
    return " ".join(name if length == 1 else f"{length}*{name}" for name, length in runs)


def mixers_of(fields: Fields, every: Sequence[str], names: Mapping[str, str] = WINDOWS) -> list[str]:
    """Our mixers of the layer_types, or of `every` where the config has none.

    Raises CheckpointError for a kind that is not among names.
    """
    kinds = fields.take("layer_types", None) or every
    if unknown := sorted(set(kinds) - names.keys()):
        raise CheckpointError(f"layer_types has {', '.join(unknown)}; built are {', '.join(names)}")
    return [names[kind] for kind in kinds]


def layer_types(config: Architecture, names: Mapping[str, str] = WINDOWS) -> list[str]:
    """The layer_types that `mixers_of` reads back. Raises CheckpointError for a mixer that is not there."""
    kinds = {mixer: kind for kind, mixer in names.items()}
    if unknown := sorted({layer.mixer for layer in config.layers} - kinds.keys()):
        raise CheckpointError(f"has no layers with mixer {', '.join(unknown)}; there are {', '.join(kinds)}")
    return [kinds[layer.mixer] for layer in config.layers]


def rotary_share(rotary_dim: int, head_dim: int) -> float:
    """The partial_rotary_factor that gives rotary_dim when its product with head_dim is cut to an int."""
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else math.nextafter(share, 1.0)


def rope_of(fields: Fields, default_theta: float | None = None) -> dict[str, Any]:
    """The rope parameters of all layers, from rope_parameters or older fields, as transformers fills them in.

    default_theta is what transformers takes for the family where the config has none.
    """
    theta, older = fields.take("rope_theta", default_theta), fields.take("rope_scaling", None)
    found = {"rope_theta": theta, **(older or fields.take("rope_parameters", None) or {})}
    fields.take("rope_parameters", None)
    return with_context(found, fields)


def with_context(rope: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """The same, stretched from max_position_embeddings where it does not say from what context."""
    found = {ORIGINAL: fields.take("max_position_embeddings", None)} | rope
    if kind_of(found) == "default":
        del found[ORIGINAL]
    return found


def kind_of(rope: Mapping[str, Any]) -> str:
    """The kind of stretch, under either name."""
    return rope.get("rope_type", rope.get("type", "default"))


def rotary_lines(fields: Fields, key: str, default_theta: float | None = None) -> list[str]:
    """Overrides for the rotary fields of the mixer `key`, from rope_parameters or older fields."""
    return rotary_of(rope_of(fields, default_theta), key)


def rotary_of(found: Mapping[str, Any], key: str) -> list[str]:
    """Overrides for the rotary fields of the mixer `key`, from one set of rope parameters.

    What is absent there is what transformers takes for it, whatever the mixer's own defaults are.

    Raises CheckpointError for a form that is not built, or a field that is missing or not known.
    """
    rest, kind = dict(found), kind_of(found)
    for name in ("partial_rotary_factor", "rope_type", "type"):
        rest.pop(name, None)
    theta = rest.pop("rope_theta", None)
    if theta is None:
        raise CheckpointError("rope_theta is missing, in rope_parameters or beside it")
    tree: dict[str, Any] = {"kind": {"default": "none"}.get(kind, kind)}
    for theirs, (ours, default) in SCALING.get(kind, {}).items():
        value = rest.pop(theirs, None)
        tree[ours] = default if value is None else value
        if tree[ours] is NEEDED:
            raise CheckpointError(f"rope_parameters: {kind} lacks {theirs}, which says how it stretches")
    rest = {name: value for name, value in rest.items() if value is not None}
    if kind not in SCALING or rest:
        raise CheckpointError(
            f"rope_parameters: {kind} with {rest} is not built; kinds are {', '.join(SCALING)}"
        )
    floats = {"factor", "beta_fast", "beta_slow", "low_frequency", "high_frequency", "attention_factor"}
    tree = {
        name: float(value) if name in floats and value is not None else value for name, value in tree.items()
    }
    return lines({"rotary_theta": float(theta), "rotary_scaling": tree}, f"mixer.{key}.")


ORIGINAL = "original_max_position_embeddings"
# Stands for a field that transformers does not run without.
NEEDED = object()
# By kind and name on the hub: our field, and what transformers takes where there is none.
SCALING: dict[str, dict[str, tuple[str, Any]]] = {
    "default": {},
    "yarn": {
        "factor": ("factor", NEEDED),
        ORIGINAL: ("original_context", NEEDED),
        "beta_fast": ("beta_fast", 32.0),
        "beta_slow": ("beta_slow", 1.0),
        "truncate": ("truncates", True),
        "attention_factor": ("attention_factor", None),
        "mscale": ("mscale", None),
        "mscale_all_dim": ("mscale_all_dim", None),
    },
    "llama3": {
        "factor": ("factor", NEEDED),
        ORIGINAL: ("original_context", NEEDED),
        "low_freq_factor": ("low_frequency", NEEDED),
        "high_freq_factor": ("high_frequency", NEEDED),
    },
}


def rope_parameters(theta: float, scaling: RotaryScaling, **more: Any) -> dict[str, Any]:
    """The rope_parameters that `rotary_of` reads back."""
    kind = "default" if scaling.kind == "none" else scaling.kind
    values = {theirs: getattr(scaling, ours) for theirs, (ours, _) in SCALING[kind].items()}
    values = {name: value for name, value in values.items() if value is not None}
    return {"rope_type": kind, "rope_theta": theta, **values, **more}


class AttnNames(NamedTuple):
    """What a family calls the tensors of softmax attention."""

    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    gate: str = "g_proj"
    q_norm: str = "q_norm.weight"
    k_norm: str = "k_norm.weight"
    sinks: str = "sinks"


def attn_pieces(ours: str, theirs: str, attn: AttnConfig, names: AttnNames) -> Iterator[Piece]:
    """Queries, gates, keys and values with tensors of their own; a channel gate is another matter."""
    queries, keys = attn.num_heads * attn.head_dim, attn.num_key_heads * attn.head_dim
    sizes = {names.q: queries}
    if attn.output_gate == "head":
        sizes[names.gate] = attn.num_heads
    sizes |= {names.k: keys, names.v: attn.num_key_heads * attn.value_dim}
    kinds = ("weight", "bias") if attn.has_bias else ("weight",)
    for kind in kinds:
        parts = {f"{theirs}{name}.{kind}": size for name, size in sizes.items()}
        yield from joined_rows(f"{ours}in_proj.{kind}", parts)
    for kind in ("weight", "bias") if attn.has_output_bias else ("weight",):
        yield Piece(f"{ours}out_proj.{kind}", f"{theirs}{names.o}.{kind}")
    if attn.qk_norm in ("head", "all_heads"):
        yield Piece(f"{ours}q_norm.weight", theirs + names.q_norm)
        yield Piece(f"{ours}k_norm.weight", theirs + names.k_norm)
    if attn.has_sinks:
        yield Piece(f"{ours}sinks", theirs + names.sinks)


def norms(index: int, layer: Layer, names: tuple[str, str], theirs: str = "model.layers.") -> Iterator[Piece]:
    """The two norms of a pre-norm layer."""
    for half, absent, name in (("mixer", layer.mixer, names[0]), ("ffn", layer.ffn, names[1])):
        if absent != NONE:
            yield Piece(f"blocks.{index}.{half}_residual.norm.weight", f"{theirs}{index}.{name}")


def plain_layer(index: int, layer: Layer, theirs: str = "model.layers.") -> Iterator[Piece]:
    """The norms of a layer as Llama names them."""
    yield from norms(index, layer, ("input_layernorm.weight", "post_attention_layernorm.weight"), theirs)


def attn_of(config: Architecture, name: str = "attn") -> AttnConfig:
    """The softmax attention with that name. Raises CheckpointError without it."""
    found = config.mixer.get(name)
    if not isinstance(found, AttnConfig):
        raise CheckpointError(f"mixer.{name} is not softmax attention")
    return found
