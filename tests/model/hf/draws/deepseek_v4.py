"""DeepSeek-V4."""

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k

SMALL = [
    # The published model's small form has the links between the mixers' rotaries.
    *("model=deepseek_v4_flash_small", "model.activation.limit=0.5", "model.depth=3"),
    *("moe.score=sqrt_softplus", "mixer.hca.num_heads=4", "mixer.csa.index_heads=16"),
    *("mixer.hca.rotary_scaling.original_context=16", "mixer.hca.rotary_scaling.beta_fast=4.0"),
]

FAMILIES: dict[str, Drawn] = {
    "deepseek_v4": Drawn(
        lines(
            SMALL,
            layout__first=st.just(""),
            layout__pattern=st.sampled_from(["swa_shared csa hca", "hca csa", "csa", "swa_shared", "hca"]),
            layout__ffn__first=st.sampled_from(["", "hash", "2*hash"]),
            mixer__hca__rotary_scaling__kind=st.sampled_from(["none", "yarn"]),
            mixer__hca__rotary_dim=st.sampled_from([2, 4]),
            mixer__hca__window=st.sampled_from([1, 5, 100]),
            mixer__hca__output_groups=st.sampled_from([1, 2, 4]),
            mixer__hca__compression=st.sampled_from([3, 8]),
            mixer__csa__compression=st.sampled_from([2, 4]),
            mixer__csa__index_top_k=st.sampled_from([1, 3, 50]),
            # With two streams that are nearly parallel the gradient of the last gates is all cancellation.
            residual__streams=st.sampled_from([3, 4]),
            residual__iterations=st.sampled_from([1, 3, 20]),
            moe__top_k=top_k,
        )
    ),
}
