"""A layout that does not fit is refused with its key, what was found, and values that really are legal."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from conf.errors import ConfigError, Violation
from tests.train.runs import overrides_of
from train.config.load import load_config

# One softmax layer beside one linear: sizes that six ranks can share, but for what a case changes.
BASE = (
    *overrides_of(Path("dataset"), Path("tree"), Path("run")),
    "data.sequence_length=96",
    "layout.ffn.pattern=moe dense",
    "mixer.gdn.num_key_heads=12",
    "mixer.gdn.num_value_heads=12",
    "mixer.attn.num_heads=12",
    "mixer.attn.num_key_heads=12",
    "model.vocab_size=480",
    "model.ffn_hidden=48",
    "moe.shared_hidden=48",
    "train.global_batch=12",
    "moe.num_experts=12",
)


class Refusal(NamedTuple):
    """What is typed on how many processes, the key of the violation, and what must stand in it.

    fixes: the values that are named, each with the key that they are for. A key of None is the number of
    processes.
    """

    typed: tuple[str, ...]
    world_size: int
    key: str
    says: str
    fixes: tuple[tuple[str | None, int], ...]


def values(key: str | None, *named: int) -> tuple[tuple[str | None, int], ...]:
    return tuple((key, value) for value in named)


REFUSALS = {
    "tensor degree": Refusal(
        ("parallel.tp=5",),
        4,
        "parallel.tp",
        "5 does not divide the 4 processes started; legal values are 1, 2, 4",
        values("parallel.tp", 1, 2, 4),
    ),
    "tensor degree beside another": Refusal(
        ("parallel.tp=3", "parallel.cp=2"),
        4,
        "parallel.tp",
        "3 does not divide the 4 processes started over 2 of the other axes; legal values are 1, 2",
        values("parallel.tp", 1, 2),
    ),
    "context degree": Refusal(
        ("parallel.cp=3",),
        4,
        "parallel.cp",
        "3 does not divide the 4 processes started; legal values are 1, 2, 4",
        values("parallel.cp", 1, 2, 4),
    ),
    "copies": Refusal(
        ("parallel.dp_replicate=4",),
        6,
        "parallel.dp_replicate",
        "4 does not divide the 6 processes started; legal values are 1, 2, 3, 6",
        values("parallel.dp_replicate", 1, 2, 3, 6),
    ),
    "two degrees at once": Refusal(
        ("parallel.tp=4", "parallel.cp=4"),
        6,
        "parallel.tp",
        "cp 4 x tp 4 = 16 does not divide the 6 processes started; lower them, or start a multiple of 16",
        values(None, 16, 32),
    ),
    "shards": Refusal(
        ("parallel.dp_shard=3",),
        4,
        "parallel.dp_shard",
        "= 3, but 4 processes were started; set it to 4 or -1, or start 3 processes",
        values("parallel.dp_shard", 4, -1) + values(None, 3),
    ),
    "expert degree": Refusal(
        ("parallel.ep=8", "parallel.tp=2", "parallel.cp=2"),
        8,
        "parallel.ep",
        "8 does not divide the 12 experts and the 8 ranks of dp_shard x cp x tp; legal values are 1, 2, 4",
        values("parallel.ep", 1, 2, 4),
    ),
    "expert degree of copies": Refusal(
        ("parallel.ep=4", "parallel.dp_replicate=2"),
        4,
        "parallel.ep",
        "4 does not divide the 12 experts and the 2 ranks of dp_shard x cp x tp; legal values are 1, 2",
        values("parallel.ep", 1, 2),
    ),
    "row": Refusal(
        ("data.sequence_length=90", "parallel.cp=2", "parallel.tp=2"),
        4,
        "data.sequence_length",
        "90 tokens are not a multiple of 8, two chunks for each rank of cp 2 in parts for tp 2; use 88 or 96",
        values("data.sequence_length", 88, 96),
    ),
    "row of one cut": Refusal(
        ("data.sequence_length=9", "parallel.cp=2"),
        2,
        "data.sequence_length",
        "9 tokens are not a multiple of 4, two chunks for each rank of cp 2 in parts for tp 1; use 8 or 12",
        values("data.sequence_length", 8, 12),
    ),
    "row below the shortest": Refusal(
        ("data.sequence_length=11", "parallel.cp=3"),
        3,
        "data.sequence_length",
        "11 tokens are not a multiple of 6, two chunks for each rank of cp 3 in parts for tp 1; use 12",
        values("data.sequence_length", 12),
    ),
    "query heads": Refusal(
        ("mixer.attn.num_heads=6", "mixer.attn.num_key_heads=2", "parallel.tp=4"),
        12,
        "parallel.tp",
        "mixer.attn: 4 ranks cannot share num_heads 6, num_key_heads 2; legal are 1, 2, 6",
        values("parallel.tp", 1, 2, 6),
    ),
    "states": Refusal(
        ("mixer.gdn.num_key_heads=3", "mixer.gdn.num_value_heads=6", "parallel.tp=2"),
        6,
        "parallel.tp",
        "mixer.gdn: 2 ranks cannot share num_value_heads 6, num_key_heads 3; legal are 1, 3, 6",
        values("parallel.tp", 1, 3, 6),
    ),
    "groups of heads": Refusal(
        (
            *("layout.pattern=nsa attn", "mixer.nsa.num_heads=12", "mixer.nsa.num_key_heads=3"),
            "parallel.tp=4",
        ),
        12,
        "parallel.tp",
        "mixer.nsa: 4 ranks cannot share num_heads 12, num_key_heads 3; legal are 1, 3, 6, 12",
        values("parallel.tp", 1, 3, 6, 12),
    ),
    "vocabulary": Refusal(
        ("model.vocab_size=470", "parallel.tp=4"),
        4,
        "parallel.tp",
        "4 ranks cannot share model.vocab_size 470; 2 can, or make it 472",
        values("parallel.tp", 2) + values("model.vocab_size", 472),
    ),
    "hidden units": Refusal(
        ("model.ffn_hidden=45", "parallel.tp=6"),
        6,
        "parallel.tp",
        "6 ranks cannot share model.ffn_hidden 45; 3 can, or make it 48",
        values("parallel.tp", 3) + values("model.ffn_hidden", 48),
    ),
    "hidden units of the shared expert": Refusal(
        ("moe.shared_hidden=45", "parallel.tp=2"),
        2,
        "parallel.tp",
        "2 ranks cannot share moe.shared_hidden 45; 1 can, or make it 46",
        values("parallel.tp", 1) + values("moe.shared_hidden", 46),
    ),
    "uneven batch": Refusal(
        ("train.global_batch=10", "parallel.cp=2"),
        8,
        "train.global_batch",
        "10 sequences cannot be shared evenly by 4 data-parallel ranks; use 8 or 12",
        values("train.global_batch", 8, 12),
    ),
    "uneven micro-batch": Refusal(
        ("train.micro_batch=4",),
        2,
        "train.micro_batch",
        "4 does not divide the 6 sequences of a rank; legal values are 1, 2, 3, 6",
        values("train.micro_batch", 1, 2, 3, 6),
    ),
}


def violations(typed: tuple[str, ...], world_size: int) -> tuple[Violation, ...]:
    try:
        load_config([*BASE, *typed], world_size)
    except ConfigError as error:
        return error.violations
    return ()


@pytest.mark.parametrize("name", REFUSALS)
def test_the_message_names_key_found_and_legal_values(name: str) -> None:
    typed, world_size, key, says, fixes = REFUSALS[name]
    found = violations(typed, world_size)
    assert any(one.key == key and one.message.endswith(says) for one in found), found
    # The table above lists every number that the message offers.
    offered = re.split(r"legal values are|legal are|; use|; set it to|; lower them|\d+ can, or", says)[-1]
    numbers = {int(number) for number in re.findall(r"-?\d+", offered)}
    assert numbers <= {value for _, value in fixes}


@pytest.mark.parametrize("name", REFUSALS)
def test_every_value_that_is_named_is_legal(name: str) -> None:
    typed, world_size, _, _, fixes = REFUSALS[name]
    for key, value in fixes:
        size = value if key is None else world_size
        fixed = typed if key is None else (*typed, f"{key}={value}")
        assert not violations(fixed, size), (key, value)


def test_all_that_does_not_fit_comes_at_once() -> None:
    typed = ("parallel.ep=5", "data.sequence_length=90", "train.global_batch=10", "parallel.tp=4")
    # Nine processes for four ranks of one axis: nobody knows yet how many ranks have rows of their own.
    assert {found.key for found in violations(typed, 9)} == {
        "parallel.tp",
        "parallel.ep",
        "data.sequence_length",
    }
    assert {found.key for found in violations(typed, 16)} == {
        "parallel.ep",
        "data.sequence_length",
        "train.global_batch",
    }
