"""Equal to transformers' Nemotron-H Mamba-2 layer with random weights."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.mixers.mamba2 import Mamba2Config
from tests.architectures import small_architecture
from tests.closeness import in_float64
from tests.layers import assert_same_layer

pytestmark = pytest.mark.filterwarnings("ignore")


def import_mamba2(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors by our names; the layout is the same."""
    names = {
        "in_proj.weight": "in_proj.weight",
        "conv.bias": "conv1d.bias",
        "step.A_log": "A_log",
        "step.dt_bias": "dt_bias",
        "skip": "D",
        "out_norm.weight": "norm.weight",
        "out_proj.weight": "out_proj.weight",
    }
    found = {ours: theirs[name] for ours, name in names.items() if name in theirs}
    return found | {"conv.weight": theirs["conv1d.weight"][:, 0]}


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(
    tokens=st.integers(1, 150),
    key_heads=st.sampled_from([1, 2, 3]),
    repeat=st.sampled_from([1, 2]),
    dims=st.sampled_from([(8, 12), (16, 8)]),
    has_bias=st.booleans(),
    floor=st.sampled_from([0.001, 0.6]),
    seed=st.integers(0, 2**20),
)
def test_layer_equals_theirs(
    tokens: int, key_heads: int, repeat: int, dims, has_bias: bool, floor: float, seed: int
) -> None:
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    torch.manual_seed(seed)
    fields = {
        "num_heads": key_heads * repeat,
        "num_key_heads": key_heads,
        "key_dim": dims[0],
        "value_dim": dims[1],
        "has_conv_bias": str(has_bias).lower(),
        "dt_floor": floor,
    }
    config = small_architecture([f"mixer.mamba2.{name}={value}" for name, value in fields.items()])
    mamba2, width = config.mixer["mamba2"], config.model.width
    assert isinstance(mamba2, Mamba2Config)
    theirs_config = NemotronHConfig(
        hidden_size=width,
        layers_block_type=["linear_attention"],
        mamba_num_heads=mamba2.num_heads,
        mamba_head_dim=mamba2.value_dim,
        ssm_state_size=mamba2.key_dim,
        n_groups=mamba2.num_key_heads,
        conv_kernel=mamba2.conv_width,
        use_conv_bias=has_bias,
        chunk_size=16,
        time_step_min=floor,
        layer_norm_epsilon=mamba2.norm_eps,
    )
    with in_float64():
        theirs = NemotronHMamba2Mixer(theirs_config, 0)
    ours = mamba2.build(width, 0, 1, 0.02)
    assert_same_layer(ours, theirs, theirs, import_mamba2, width=width, tokens=tokens)
