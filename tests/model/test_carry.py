"""What a layer hands on beside the stream passes through layers that have no use for it."""

import pytest
import torch

from conf.errors import ConfigError
from model.block import Carry
from model.mixer import Sequence
from tests.architectures import random_model, small_architecture


def test_keys_that_were_chosen_pass_a_layer_without_a_choice_of_its_own() -> None:
    config = small_architecture(
        ['layout.pattern="dsa attn dsa_shared attn"', "layout.ffn.pattern=dense", "model.depth=4"]
    )
    model = random_model(config, torch.float64)
    tokens = torch.randint(config.model.vocab_size, (2, 15))
    sequence, stream = Sequence.whole(tokens), model.embed.weight[tokens]
    first, second, third, last = model.blocks
    stream, chosen, _ = first(stream, sequence, Carry())
    assert chosen.selection is not None
    stream, *_ = second(stream, sequence, Carry())
    stream, *_ = third(stream, sequence, Carry(selection=chosen.selection))
    stream, *_ = last(stream, sequence, Carry())
    assert torch.equal(model(tokens), model.norm(stream) @ model.head.weight.T)


@pytest.mark.parametrize("ends", [["layout.ffn.last=shortcut"], ["layout.ffn.first=shortcut moe"]])
def test_a_shortcut_needs_a_dense_layer_to_join(ends: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"layer (\d) is a shortcut, so layer \d must be dense"):
        small_architecture(["layout.pattern=attn", "layout.ffn.pattern=dense", *ends])
