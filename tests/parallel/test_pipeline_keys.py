"""A pipeline that cannot be is refused with its key, and what is named as legal is legal."""

import re

import pytest

from conf.errors import ConfigError
from train.config.load import load_config
from train.config.run_config import RunConfig

SMALL = (
    *("layout.pattern=gdn gdn gdn attn", "model.depth=8", "train.global_batch=24"),
    *("parallel.pp=4", "train.micro_batch=2"),
)


def load(*overrides: str, size: int = 4) -> RunConfig:
    return load_config([*SMALL, *overrides], size)


def violations(*overrides: str, size: int = 4) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(*overrides, size=size)
    found: dict[str, str] = {}
    for key, message in caught.value.violations:
        found[key] = f"{found.get(key, '')}{message}\n"
    return found


@pytest.mark.parametrize(
    ("overrides", "key", "says"),
    [
        (["train.micro_batch=12"], "train.micro_batch", "1f1b over 4 ranks needs 4 micro-batches or more"),
        (["train.micro_batch=null"], "train.micro_batch", "found 1; of 24 rows"),
        (["parallel.pp=3"], "parallel.pp", "3 does not divide the 4 processes"),
        (["parallel.pp_schedule=1f1bb"], "parallel.pp_schedule", "1f1b"),
        (["parallel.pp_chunks=3"], "parallel.pp_chunks", "1f1b runs 1 stages per rank; found 3"),
        (["parallel.pp_schedule=interleaved", "parallel.pp_chunks=3"], "parallel.pp", "use 8 stages"),
        (["parallel.pp_layout=E gdn | H"], "parallel.pp_layout", "expected 4"),
        (["parallel.pp_layout=E 2*gdn | gdn atn | 2*gdn | gdn attn H"], "parallel.pp_layout", "attn"),
        (["parallel.pp=1", "parallel.pp_layout=E 4*gdn H"], "parallel.pp_layout", "set parallel.pp above 1"),
    ],
)
def test_each_impossible_pipeline_is_named(overrides: list[str], key: str, says: str) -> None:
    found = violations(*overrides)
    assert key in found, found
    assert says in found[key], found


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe_v"])
def test_the_named_micro_batches_are_legal_and_no_others(schedule: str) -> None:
    message = violations(f"parallel.pp_schedule={schedule}", "train.micro_batch=24")["train.micro_batch"]
    legal = {int(value) for value in re.findall(r"\d+", message.split("legal values are")[1])}
    values = (1, 2, 3, 4, 6, 8, 12)
    assert legal
    assert legal < set(values)
    for value in values:
        typed = (f"parallel.pp_schedule={schedule}", f"train.micro_batch={value}")
        if value in legal:
            assert load(*typed).train.micro_batch == value
        else:
            assert set(violations(*typed)) == {"train.micro_batch"}


def test_a_pipeline_by_hand_is_taken() -> None:
    layout = "E gdn | gdn gdn attn | 3*gdn | attn H"
    assert load(f"parallel.pp_layout={layout}").parallel.pp_layout == layout
