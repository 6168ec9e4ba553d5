"""Equal to transformers' Jamba and Mamba layers with random weights."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.initial import initial_values, sample
from model.mixers.mamba import MambaConfig
from tests.architectures import small_architecture
from tests.closeness import assert_rounded, in_float64
from tests.layers import assert_same_layer

pytestmark = pytest.mark.filterwarnings("ignore")


def import_mamba(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors by our names; the layout is the same."""
    names = {
        "in_proj.weight": "in_proj.weight",
        "conv.bias": "conv1d.bias",
        "x_proj.weight": "x_proj.weight",
        "dt_norm.weight": "dt_layernorm.weight",
        "k_norm.weight": "b_layernorm.weight",
        "q_norm.weight": "c_layernorm.weight",
        "dt_proj.weight": "dt_proj.weight",
        "step.A_log": "A_log",
        "step.dt_bias": "dt_proj.bias",
        "skip": "D",
        "out_proj.weight": "out_proj.weight",
    }
    found = {ours: theirs[name] for ours, name in names.items() if name in theirs}
    return found | {"conv.weight": theirs["conv1d.weight"][:, 0]}


def theirs_of(config: MambaConfig, width: int) -> torch.nn.Module:
    """transformers' layer of the same dimensions; Jamba's has the inner norms, Mamba's does not."""
    if config.has_inner_norm:
        from transformers import JambaConfig
        from transformers.models.jamba.modeling_jamba import JambaMambaMixer

        jamba = JambaConfig(
            hidden_size=width,
            mamba_expand=config.num_channels // width,
            mamba_d_state=config.state_dim,
            mamba_dt_rank=config.dt_rank,
            mamba_d_conv=config.conv_width,
            mamba_conv_bias=config.has_conv_bias,
            rms_norm_eps=config.norm_eps,
        )
        return JambaMambaMixer(jamba, 0)
    from transformers import MambaConfig as Theirs
    from transformers.models.mamba.modeling_mamba import MambaMixer

    mamba = Theirs(
        hidden_size=width,
        expand=config.num_channels // width,
        state_size=config.state_dim,
        time_step_rank=config.dt_rank,
        conv_kernel=config.conv_width,
        use_conv_bias=config.has_conv_bias,
    )
    return MambaMixer(mamba, 0)


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(
    tokens=st.integers(1, 60),
    expand=st.sampled_from([1, 2]),
    state_dim=st.sampled_from([3, 8]),
    has_norm=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_layer_equals_theirs(
    tokens: int, expand: int, state_dim: int, has_norm: bool, has_bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    fields = {
        "num_channels": 32 * expand,
        "state_dim": state_dim,
        "has_inner_norm": str(has_norm).lower(),
        "has_conv_bias": str(has_bias).lower(),
    }
    config = small_architecture([f"mixer.mamba.{name}={value}" for name, value in fields.items()])
    mamba, width = config.mixer["mamba"], config.model.width
    assert isinstance(mamba, MambaConfig)
    with in_float64():
        theirs = theirs_of(mamba, width)
    ours = mamba.build(width, 0, 1, 0.02)
    assert_same_layer(ours, theirs, theirs, import_mamba, width=width, tokens=tokens)


def test_first_rates_are_those_of_theirs() -> None:
    mamba = small_architecture(["mixer.mamba.num_channels=64"]).mixer["mamba"]
    assert isinstance(mamba, MambaConfig)
    ours = mamba.build(32, 0, 1, 0.02)
    initial = initial_values(ours)["step.A_log"]
    rates = sample("step.A_log", initial, ours.get_parameter("step.A_log").shape, 0)
    with in_float64():
        theirs = theirs_of(mamba, 32).get_parameter("A_log").detach()
    assert_rounded([rates], lambda: [theirs], [])
