"""The line `parallel.recompute`: what it names, and what it may."""

import pytest

from conf.errors import ConfigError
from parallel.config.regions import region_names, region_violations
from train.config.load import load_config

MIXERS = ("gdn", "attn")


@pytest.mark.parametrize("line", ["none", "full", "moe", "dense", "attn gdn moe", "gdn dense"])
def test_names_of_the_model_are_legal(line: str) -> None:
    assert not region_violations(line, MIXERS)


def test_none_names_nothing() -> None:
    assert region_names("none") == frozenset()
    assert region_names("gdn  moe") == {"gdn", "moe"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gnd moe", "'gnd' is not one of none, full, moe, dense, attn, gdn; did you mean gdn?"),
        ("mamba2", "'mamba2' is not one of none, full, moe, dense, attn, gdn"),
        ("full attn", "full stands alone; found 'full attn'"),
        ("attn none", "none stands alone; found 'attn none'"),
        ("", "found nothing; legal are none, full, moe, dense, attn, gdn"),
    ],
)
def test_what_cannot_be_computed_again_is_refused(line: str, message: str) -> None:
    found = region_violations(line, MIXERS)
    assert [(one.key, one.message) for one in found] == [("parallel.recompute", message)]


def test_a_run_is_refused_with_the_keys_that_were_typed() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["parallel.recompute=gnd moe", "parallel.offload=activation"], 1)
    assert {violation.key for violation in caught.value.violations} >= {"parallel.offload"}
    with pytest.raises(ConfigError) as caught:
        load_config(["layout.pattern=gdn attn", "parallel.recompute=gnd moe"], 1)
    assert [str(violation) for violation in caught.value.violations] == [
        "parallel.recompute: 'gnd' is not one of none, full, moe, dense, attn, gdn; did you mean gdn?"
    ]
    assert load_config(["parallel.recompute=gdn moe"], 1).parallel.recomputed == {"gdn", "moe"}
