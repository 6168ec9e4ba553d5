"""Garbage collection and the profiler run beside a run and change nothing of it."""

import gc
import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conf.errors import ConfigError
from tests.train.conftest import Corpus
from tests.train.runs import TINY, metrics_of, run_to_end
from train.config.fields import ProfileConfig
from train.config.load import load_config
from train.loop.hooks import GarbageCollection, Profiler


def at(step: int) -> Any:
    return SimpleNamespace(step=step)


def events(path: Path) -> list[str]:
    trace = json.loads(gzip.decompress(path.read_bytes()))
    return [str(event["name"]) for event in trace["traceEvents"]]


def test_a_profiled_run_is_the_same_run(corpus: Corpus, tmp_path: Path) -> None:
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    # The largest seed that there is goes through all that takes one.
    keys = ("train.steps=5", "train.profile.steps=2", f"train.seed={2**63 - 1}")
    assert run_to_end(corpus.overrides(plain, *keys, "train.gc_every=null")) == 0
    more = ("train.profile.first_step=3", "train.gc_every=1")
    assert run_to_end(corpus.overrides(profiled, *keys, *more)) == 0
    assert metrics_of(profiled) == metrics_of(plain)
    assert not (plain / "profile").exists()
    (path,) = (profiled / "profile").iterdir()
    assert path.name == "steps_3_to_4_rank_0.json.gz"
    names = events(path)
    assert {"step 3", "step 4"} == {name for name in names if name.startswith("step ")}
    assert any(name.startswith("autograd::engine") for name in names)


@pytest.mark.parametrize("axis", ["dp_shard", "pp"])
def test_a_sampled_run_is_the_same_run(corpus: Corpus, tmp_path: Path, axis: str) -> None:
    plain, sampled = tmp_path / "plain", tmp_path / "sampled"
    # Two ranks, which gather their shards for it, or pass the hidden state on.
    keys = ("train.steps=6", "train.micro_batch=2", f"parallel.{axis}=2")
    assert run_to_end(corpus.overrides(plain, *keys), size=2) == 0
    assert run_to_end(corpus.overrides(sampled, *keys, "sample.every=2"), size=2) == 0
    lines = [json.loads(line) for line in (sampled / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert metrics_of(sampled) == metrics_of(plain)


def test_steps_before_an_error_are_written(tmp_path: Path) -> None:
    profiler = Profiler(ProfileConfig(first_step=2, steps=5, ranks=[0]), tmp_path, 0)
    for step in range(3):
        profiler.before_data(at(step))
        profiler.after_step(at(step + 1), at(step + 1))
    assert not list(tmp_path.iterdir())
    profiler.close()
    (path,) = (tmp_path / "profile").iterdir()
    assert {"step 2", "step 3"} <= set(events(path))


def test_garbage_is_collected_at_given_steps_only() -> None:
    collected: list[int] = []
    step = 0

    def note(phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            collected.append(step)

    hook = GarbageCollection(3)
    gc.callbacks.append(note)
    try:
        for step in range(1, 8):
            loops: list[Any] = [[] for _ in range(2000)]
            for loop in loops:
                loop.append(loop)
            hook.after_step(at(step), at(step))
    finally:
        gc.callbacks.remove(note)
        hook.close()
    assert collected == [3, 6]
    assert gc.isenabled()


def test_a_rank_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.profile.ranks: found 4 of 2 ranks"):
        load_config(
            [
                *TINY,
                "data.directory=nowhere",
                "data.corpora.documents.source=nowhere",
                "train.profile.ranks=[0,4]",
            ],
            2,
        )
