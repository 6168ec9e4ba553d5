"""For each family of checkpoints: small configs to draw from, as overrides of our config groups."""

from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import strategies as st

Draw = Callable[[Any], list[str]]


class Drawn(NamedTuple):
    """One family under test.

    overrides: a strategy of config overrides. has_no_head: transformers has the text model only.
    """

    overrides: st.SearchStrategy[list[str]]


def lines(groups: list[str], **drawn: st.SearchStrategy) -> st.SearchStrategy[list[str]]:
    """Overrides with the drawn values; `__` in a name stands for a dot."""
    return st.fixed_dictionaries(drawn).map(
        lambda values: [*groups, *(f"{name.replace('__', '.')}={value}" for name, value in values.items())]
    )


heads = st.sampled_from([(4, 2), (2, 1), (6, 3), (4, 4)])


def with_heads(strategy: st.SearchStrategy[list[str]], mixer: str = "attn") -> st.SearchStrategy[list[str]]:
    """With query and key heads that fit each other."""
    return st.tuples(strategy, heads).map(
        lambda pair: [
            *pair[0],
            f"mixer.{mixer}.num_heads={pair[1][0]}",
            f"mixer.{mixer}.num_key_heads={pair[1][1]}",
        ]
    )


MOE = ["moe=softmax", "residual=pre_norm", "residual.has_zero_centered_norm=false"]
GQA = [
    "mixer.attn.output_gate=none",
    "mixer.attn.rotary_dim=8",
    "moe.shared_hidden=0",
    "moe.has_shared_gate=false",
]
ATTN = ["layout=attn", *MOE, *GQA]
normalized = st.booleans()
top_k = st.integers(2, 4)  # with one expert the normalised weight is 1 and the router has no gradient
window = st.sampled_from(["null", "1", "9", "200"])

FAMILIES: dict[str, Drawn] = {
    "qwen3_next": Drawn(
        with_heads(
            lines(
                ["moe=softmax", "residual=pre_norm"],
                layout__pattern=st.sampled_from(["3*gdn attn", "gdn attn", "attn", "2*gdn"]),
                layout__ffn__pattern=st.sampled_from(["moe", "moe dense"]),
                mixer__attn__rotary_dim=st.sampled_from([2, 4, 8]),
                mixer__gdn__num_key_heads=st.sampled_from([1, 2, 4]),
                mixer__gdn__key_dim=st.sampled_from([8, 12]),
                moe__top_k=top_k,
            )
        )
    ),
    "qwen3_moe": Drawn(
        with_heads(
            lines(
                [*ATTN, "mixer.attn.qk_norm=head", "mixer.attn.has_output_bias=${mixer.attn.has_bias}"],
                mixer__attn__has_bias=st.booleans(),
                layout__ffn__pattern=st.sampled_from(["moe", "dense moe"]),
                moe__has_normalized_weights=normalized,
                moe__top_k=top_k,
            )
        )
    ),
    "mixtral": Drawn(
        with_heads(lines([*ATTN, "mixer.attn.qk_norm=none"], mixer__attn__window=window, moe__top_k=top_k))
    ),
    "mistral": Drawn(
        with_heads(
            lines([*ATTN, "layout.ffn.pattern=dense", "mixer.attn.qk_norm=none"], mixer__attn__window=window)
        )
    ),
    "olmoe": Drawn(
        # Its head dim is always width over heads.
        lines(
            [*ATTN, "mixer.attn.qk_norm=all_heads", "mixer.attn.num_heads=4"],
            mixer__attn__num_key_heads=st.sampled_from([1, 2, 4]),
            mixer__attn__clip=st.sampled_from(["null", "0.3"]),
            moe__has_normalized_weights=normalized,
            moe__top_k=top_k,
        )
    ),
    "minimax_m2": Drawn(
        with_heads(
            lines(
                [*ATTN, "moe=sigmoid", *GQA, "mixer.attn.qk_norm=all_heads", "moe.weight_scale=1.0"],
                mixer__attn__rotary_dim=st.sampled_from([2, 4, 8]),
                moe__top_k=top_k,
            )
        )
    ),
}
