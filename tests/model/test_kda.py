"""Equal to transformers' Kimi-Linear and GLM-5.3 layers with random weights."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.mixers.kda import KdaConfig
from tests.architectures import small_architecture
from tests.closeness import in_float64
from tests.layers import assert_same_layer

pytestmark = pytest.mark.filterwarnings("ignore")


def theirs_of(config: KdaConfig, width: int) -> torch.nn.Module:
    """transformers' layer of the same dimensions."""
    fields = {
        "hidden_size": width,
        "linear_num_heads": config.num_heads,
        "linear_head_dim": config.key_dim,
        "linear_conv_kernel_dim": config.conv_width,
        "rms_norm_eps": config.norm_eps,
        "num_hidden_layers": 1,
        "layer_types": ["linear_attention"],
        "mlp_layer_types": ["sparse"],
    }
    if config.decay == "softplus":
        from transformers import KimiLinearConfig
        from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

        return KimiLinearDeltaAttention(KimiLinearConfig(**fields), 0)
    from transformers import Glm5NextTextConfig
    from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextLinearAttention

    theirs = Glm5NextTextConfig(**fields, linear_lower_bound=config.decay_bound)
    return Glm5NextTextLinearAttention(theirs, 0)


def import_kda(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors in our names and layout; theirs have a projection for each of q, k, v and beta."""
    names = {
        "decay_down_proj.weight": "forget_gate.f_a_proj.weight",
        "decay_up_proj.weight": "forget_gate.f_b_proj.weight",
        "gate_down_proj.weight": "g_a_proj.weight",
        "gate_up_proj.weight": "g_b_proj.weight",
        "decay.dt_bias": "forget_gate.dt_bias",
        "out_norm.weight": "o_norm.weight",
        "out_proj.weight": "o_proj.weight",
    }
    inner = [theirs[f"{part}_proj.weight"] for part in "qkvb"]
    return {ours: theirs[name] for ours, name in names.items()} | {
        "in_proj.weight": torch.cat(inner),
        "conv.weight": theirs["conv1d.weight"][:, 0],
        "decay.A_log": theirs["forget_gate.A_log"].flatten(),
    }


@settings(max_examples=6, phases=[Phase.explicit, Phase.generate])
@given(
    decay=st.sampled_from(["softplus", "bounded_sigmoid"]),
    tokens=st.integers(1, 100),
    heads=st.integers(2, 4),
    dim=st.sampled_from([8, 12]),
    seed=st.integers(0, 2**20),
)
def test_layer_equals_theirs(decay: str, tokens: int, heads: int, dim: int, seed: int) -> None:
    torch.manual_seed(seed)
    # Theirs has one dim for all: queries, keys, values and both ranks.
    dims = [f"mixer.kda.{name}={dim}" for name in ("key_dim", "value_dim", "decay_rank", "gate_rank")]
    config = small_architecture([*dims, f"mixer.kda.num_heads={heads}", f"mixer.kda.decay={decay}"])
    kda, width = config.mixer["kda"], config.model.width
    assert isinstance(kda, KdaConfig)
    with in_float64():
        theirs = theirs_of(kda, width)
    ours = kda.build(width, 0, 1, 0.02)

    def run(x: Tensor) -> Tensor:
        out = theirs(x)
        return out[0] if isinstance(out, tuple) else out

    assert_same_layer(ours, theirs, run, import_kda, width=width, tokens=tokens)
