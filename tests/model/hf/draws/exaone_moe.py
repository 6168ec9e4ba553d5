"""K-EXAONE."""

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn
from tests.model.hf.draws.glm4_moe import FIRST, experts

FAMILIES: dict[str, Drawn] = {
    "exaone_moe": Drawn(
        experts(
            *("mixer.attn.qk_norm=head", "mixer.nope.qk_norm=head", "mixer.nope.temperature=0.0"),
            "mixer.nope.temperature_interval=8192",
            mixer__attn__has_bias=st.just(False),
            layout__ffn__first=FIRST,
            layout__pattern=st.sampled_from(["2*swa nope", "swa", "nope swa"]),
            mixer__swa__window=st.sampled_from(["1", "9", "200"]),
        )
    )
}
