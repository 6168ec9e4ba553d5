"""Biases of products whose outputs ranks sum: each adds its share, and their gradients are whole."""

from parallel.config.degrees import Degrees
from tests.parallel.layouts import alone, architecture_of, assembled, on_rank
from tests.parallel.test_layouts import wrong_parts
from tests.worlds import run_world


def test_a_bias_of_the_output_is_added_once() -> None:
    config = architecture_of(
        ["mixer.attn.has_bias=true", "mixer.attn.has_output_bias=true"], mixers=("attn",)
    )
    reference = alone(config)
    ranks = run_world(2, on_rank, config, Degrees(tp=2), "", timeout=200)
    assert any(name.endswith("out_proj.bias") for name in reference.grads)
    assert not wrong_parts(assembled(reference, ranks), reference)
