"""Equal to transformers' Nemotron-H Mamba-2 layer with random weights."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.mixer import Sequence
from model.mixers.mamba2 import Mamba2Config
from tests.architectures import randomise, small_architecture
from tests.closeness import assert_close, relative

pytestmark = pytest.mark.filterwarnings("ignore")
LIMIT = 2e-5


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
    theirs, ours = NemotronHMamba2Mixer(theirs_config, 0).float(), mamba2.build(width, 0, 1, 0.02)
    randomise(theirs)
    ours.load_state_dict(import_mamba2(theirs.state_dict()))
    x = torch.randn(2, tokens, width)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, reference = ours(ours_x, Sequence.whole(torch.zeros(2, tokens, dtype=torch.long))), theirs(theirs_x)
    weight = torch.randn_like(reference)
    (out * weight).sum().backward()
    (reference * weight).sum().backward()
    assert_close([out, ours_x.grad], [reference, theirs_x.grad], LIMIT)
    expected = import_mamba2({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, expected[name]) < 1e-4, name
