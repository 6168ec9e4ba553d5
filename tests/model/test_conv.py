"""The gated short convolution equals that of LFM2 in transformers."""

import pytest
import torch

from model.mixers.conv import ConvConfig
from tests.closeness import in_float64
from tests.layers import assert_same_layer

WIDTH = 32


@pytest.mark.parametrize("taps", [2, 3, 5])
def test_lfm2(taps: int) -> None:
    from transformers.models.lfm2.configuration_lfm2 import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    config = Lfm2Config(
        hidden_size=WIDTH, conv_L_cache=taps, conv_bias=False, layer_types=["conv"], num_hidden_layers=1
    )
    with in_float64():
        theirs = Lfm2ShortConv(config, 0).double()
    ours = ConvConfig(num_channels=WIDTH, conv_width=taps).build(WIDTH, 0, 4, 0.02)
    names = {"in_proj.weight": "in_proj.weight", "out_proj.weight": "out_proj.weight"}

    def weights(given):
        found = {ours: given[name] for name, ours in names.items()}
        return found | {"conv.weight": given["conv.weight"][:, 0]}

    out = assert_same_layer(ours, theirs, theirs, weights, width=WIDTH, tokens=19)
    assert torch.isfinite(out).all()
