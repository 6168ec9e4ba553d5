"""A pipeline that cannot be is refused with its key, and what is named as legal is legal."""

import re

import pytest

from conf.errors import ConfigError
from train.config.load import load_config
from train.config.run_config import RunConfig
from train.config.show import batch_line

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


@pytest.mark.parametrize(
    ("overrides", "rows", "micro"),
    [
        (["train.micro_batch=null"], 24, 6),
        (["train.micro_batch=null", "parallel.pp_schedule=dualpipe_v"], 24, 3),
        # Legal as a whole, so as a whole it stays.
        (["train.micro_batch=null", "parallel.pp_schedule=zero_bubble"], 24, 24),
        (["train.micro_batch=null", "train.global_batch=null"], 4, 1),
        (["train.micro_batch=3", "train.global_batch=null"], 12, 3),
        (["train.micro_batch=null", "train.global_batch=null", "parallel.pp=2"], 4, 1),
    ],
)
def test_a_batch_that_nobody_typed_goes_through_the_pipeline(
    overrides: list[str], rows: int, micro: int
) -> None:
    config = load(*overrides)
    assert config.train.global_batch == rows
    ranks = 4 // config.parallel.pp
    assert config.rank_rows(ranks) == (rows // ranks, micro)
    shown = f"{rows} sequences, {micro} at a time on each rank, {rows // ranks // micro} micro-batches"
    assert batch_line(config, 4) == shown


def test_too_few_rows_for_a_pipeline_name_the_batch_that_was_typed() -> None:
    found = violations("train.micro_batch=null", "train.global_batch=3")
    assert "raise train.global_batch" in found["train.global_batch"]


def test_what_no_batch_makes_possible_comes_with_a_batch_that_is_wrong() -> None:
    found = violations("train.micro_batch=5", "parallel.prefetch=1", "parallel.dp_shard=0", "parallel.ep=5")
    assert set(found) == {"train.micro_batch", "parallel.prefetch", "parallel.dp_shard", "parallel.ep"}


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
