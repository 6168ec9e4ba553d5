"""What an error says to change is done, and the error is gone."""

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from conf.errors import ConfigError, Violation
from train.config.load import load_config

pytestmark = [pytest.mark.prove]

NUMBERS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 17, 64, 1000)
NUMBER_KEYS = (
    *("parallel.pp", "parallel.tp", "parallel.cp", "parallel.ep", "parallel.dp_replicate", "tp"),
    *("parallel.dp_shard", "parallel.pp_chunks", "parallel.prefetch", "train.global_batch"),
    *("train.micro_batch", "data.sequence_length", "model.width", "model.depth", "model.vocab_size"),
    *("moe.num_experts", "moe.top_k", "moe.num_groups", "moe.topk", "mixer.attn.num_heads"),
    *("mixer.attn.num_kv_heads", "mixer.attn.head_dim", "mixer.gdn.num_key_heads", "depth"),
)
CHOICES = {
    "parallel.pp_schedule": ("1f1b", "interleaved", "zero_bubble", "zero_bubble_v", "dualpipe_v", "gpipe"),
    "parallel.data": ("fsdp", "zero"),
    "parallel.zero.offload": ("optimizer", "parameters"),
    "parallel.recompute": ("moe", "full", "selective"),
    "parallel.ep_dispatch": ("deepep", "all_to_all"),
    "parallel.compile": ("true",),
    "parallel.offload": ("activations",),
    "kernels": ("auto", "triton"),
    "layout": ("kda_3to1", "gdn3to1"),
    "moe": ("sigmoid", "softmx"),
    "moe.score": ("softmax_of_chosen",),
    "moe.has_normalized_weights": ("false",),
    "optim": ("lion", "adam"),
    "schedule": ("wsd", "constant"),
    "residual": ("hyper", "add"),
    "precision": ("bf16", "fp16"),
    "model.norm": ("layer",),
    "model.has_zero_centered_norm": ("true",),
}
NAME = r"[a-z_0-9]+(?:\.[a-z_0-9]+)*"
VALUE = r"-?[a-z0-9_]+"
# How advice is worded. Each kind must have come up, or this test has fallen behind the texts.
KINDS = {
    "legal": rf"legal(?: values)? are ({VALUE}(?:, {VALUE})*)",
    "use": r"use (\d+)(?: or (\d+))?(?!.*stages or fewer)",
    "set it to": rf"(?:set it to|, set) ({VALUE})(?= or |$|,|;)(?: or ({VALUE}))?",
    "set key": rf"set ({NAME})=({VALUE})",
    "can": r"ranks cannot share (\S+) \d+; (\d+) can, or make it (\d+)",
    "name": r"did you mean (.*)\?",
    "processes": r"start (?:a multiple of )?(\d+)",
}


class Config(NamedTuple):
    """What is typed, and on how many processes."""

    values: dict[str, str]
    size: int | None

    def violations(self) -> list[Violation]:
        try:
            load_config([f"{key}={value}" for key, value in self.values.items()], self.size)
        except ConfigError as error:
            return list(error.violations)
        return []


def drawn(draw: random.Random) -> Config:
    values = {}
    for _ in range(draw.choice([1, 1, 2, 3])):
        if draw.random() < 0.6:
            values[draw.choice(NUMBER_KEYS)] = str(draw.choice(NUMBERS))
        else:
            key = draw.choice(list(CHOICES))
            values[key] = draw.choice(CHOICES[key])
    size = draw.choice([1, 2, 3, 4, 6, 8, 16, None])
    if "parallel.tp" in values and draw.random() < 0.5:
        # The model is looked into once rows and processes fit.
        size = int(values["parallel.tp"])
        values["data.sequence_length"] = str(24 * size)
    return Config(values, size)


def fixes(config: Config, key: str, message: str) -> Iterator[tuple[str, Config]]:
    """The configs that a message advises, by kind."""
    values, size = config

    def typed(kind: str, name: str, value: str) -> tuple[str, Config]:
        return kind, Config({**values, name: value}, size)

    if found := re.search(KINDS["legal"], message):
        yield from (typed("legal", key, value) for value in found[1].split(", "))
    for kind in ("use", "set it to"):
        if found := re.search(KINDS[kind], message):
            yield from (typed(kind, key, value) for value in found.groups() if value)
    for name, value in re.findall(KINDS["set key"], message):
        # A name without a group is a group, or a key beside the one that is wrong.
        yield typed("set key", name if "." in name or name in CHOICES else f"{key}.{name}", value)
    if found := re.search(KINDS["can"], message):
        yield typed("can", key, found[2])
        yield typed("can", found[1], found[3])
    if found := re.search(KINDS["name"], message):
        for name in re.split(r", | or ", found[1]):
            rest = {typed: value for typed, value in values.items() if typed != key}
            is_value = not message.startswith("unknown key")
            yield "name", Config(rest | ({key: name} if is_value else {name: values[key]}), size)
    if size is not None and (found := re.search(KINDS["processes"], message)):
        yield "processes", Config(values, int(found[1]))


def kind_of(violation: Violation) -> tuple[str, str]:
    return violation.key, re.sub(r"\d+", "N", violation.message)


def test_what_an_error_advises_mends_it() -> None:
    draw, used = random.Random(0), dict.fromkeys(KINDS, 0)
    for _ in range(1000):
        config = drawn(draw)
        for violation in config.violations():
            for kind, fixed in fixes(config, *violation):
                used[kind] += 1
                left = [kind_of(other) for other in fixed.violations()]
                assert kind_of(violation) not in left, (config, violation, kind, fixed)
                unknown = [other for other in fixed.violations() if other.message.startswith("unknown key")]
                assert {other.key for other in unknown} <= {*config.values}, (config, violation, fixed)
    assert all(used.values()), used
