"""Llama 4."""

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, with_heads

PLAIN = [
    *("moe=sigmoid", "residual=pre_norm", "residual.has_zero_centered_norm=false"),
    *("mixer.attn.output_gate=none", "mixer.attn.rotary_layout=interleaved", "mixer.attn.rotary_dim=8"),
    *("moe.has_normalized_weights=false", "moe.weight_scale=1.0", "moe.scales_input=true"),
    *("mixer.attn.has_output_bias=${mixer.attn.has_bias}", "moe.shared_hidden=${moe.hidden}"),
]
LLAMA3 = ["kind=llama3", "factor=16.0", "original_context=16", "low_frequency=1.0", "high_frequency=1.5"]
rotary = st.sampled_from([[], [f"mixer.attn.rotary_scaling.{line}" for line in LLAMA3]])
layouts = lines(
    PLAIN,
    layout__pattern=st.sampled_from(["3*chunked nope", "chunked nope", "nope", "chunked"]),
    layout__ffn__pattern=st.sampled_from(["moe", "dense moe"]),
    mixer__attn__qk_norm=st.sampled_from(["weightless", "none"]),
    mixer__attn__has_bias=st.booleans(),
    mixer__chunked__chunk=st.sampled_from([1, 6, 100]),
    mixer__nope__temperature=st.sampled_from([0.0, 0.1]),
    moe__top_k=st.integers(1, 2),
)
drawn = Drawn(st.tuples(with_heads(layouts), rotary).map(lambda pair: [*pair[0], *pair[1]]))

FAMILIES: dict[str, Drawn] = {"llama4_text": drawn, "llama4": drawn}
