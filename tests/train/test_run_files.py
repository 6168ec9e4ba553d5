"""No start forgets how far a run came or with which config, whatever happened to its files."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import CheckpointError, ConfigError, StorageError
from tests.train.conftest import Corpus
from tests.train.runs import log_path, metrics_of, run_to_end
from train.checkpoint import transient
from train.checkpoint.entries import list_entries
from train.checkpoint.manifest import step_name
from train.config.load import load_config
from train.loop.claim import claim

STEPS = ("train.steps=8", "train.evaluate_every=100")


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 4 and 8."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    assert run_to_end(corpus.overrides(directory, *STEPS)) == 0
    return directory


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / step_name(step)


def config_of(run: Path) -> dict:
    """What config.json says, but where the run is."""
    config = json.loads((run / "config.json").read_text())
    return {key: value for key, value in config.items() if key not in ("run", "sha256")}


def claimed(corpus: Corpus, run: Path, *more: str):
    return claim(run, load_config(corpus.overrides(run, *STEPS, *more), 1))


def refusal(corpus: Corpus, run: Path, *more: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        claimed(corpus, run, *more)
    return str(caught.value)


def test_checkpoints_out_of_sight_start_no_run_anew(corpus: Corpus, run: Path, tmp_path: Path) -> None:
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    metrics = (run / "metrics.jsonl").read_bytes()
    overrides = corpus.overrides(run, *STEPS)
    assert run_to_end(overrides) == 66
    assert (run / "metrics.jsonl").read_bytes() == metrics
    (error,) = [line for line in log_path(overrides).read_text().splitlines() if line.startswith("error:")]
    for part in (str(run / "checkpoints"), "step 8", "checkpoint.accept_step=0"):
        assert part in error
    before = metrics_of(run)
    assert run_to_end([*overrides, "checkpoint.accept_step=0"]) == 0
    assert metrics_of(run) == before
    assert (run / "metrics.undone.jsonl").read_bytes() == metrics
    assert "8 lines after step 0 put aside" in log_path(overrides).read_text()


def test_a_later_checkpoint_that_is_gone_is_missed_once(corpus: Corpus, run: Path) -> None:
    shutil.rmtree(checkpoint(run, 8))
    assert "saved step 8, and its newest is of step 4" in refusal(corpus, run)
    # The step is named, so that the same command does not accept another loss some day.
    refusal(corpus, run, "checkpoint.accept_step=0")
    claimed(corpus, run, "checkpoint.accept_step=4")
    # Not before something newer is committed is the loss forgotten.
    refusal(corpus, run)
    claimed(corpus, run, "checkpoint.accept_step=4").write_step(6)
    checkpoint(run, 4).rename(checkpoint(run, 6))
    claimed(corpus, run)


@pytest.mark.parametrize("ending", [".corrupt", ".corrupt.2", ".replaced"])
def test_one_that_was_set_aside_or_is_put_back_is_no_loss(corpus: Corpus, run: Path, ending: str) -> None:
    checkpoint(run, 8).rename(run / "checkpoints" / (step_name(8) + ending))
    claimed(corpus, run)


def test_a_renamed_one_is_missed(corpus: Corpus, run: Path) -> None:
    checkpoint(run, 8).rename(run / "checkpoints" / "step_00000008.bak")
    refusal(corpus, run)


def removed(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def not_finite(path: Path) -> None:
    path.write_text(path.read_text().rstrip().removesuffix("}") + ', "more": NaN}')


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def edited(path: Path) -> None:
    path.write_text(path.read_text().replace("0.01", "0.02").replace('"step": 8', '"step": 4'))


@pytest.mark.parametrize("damage", [removed, emptied, torn, edited, not_finite])
def test_a_config_that_is_lost_comes_from_the_newest_checkpoint(
    corpus: Corpus, run: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = config_of(run)
    damage(run / "config.json")
    with pytest.raises(ConfigError, match=r"optim\.lr: the run was started with 0.01; found 0.02"):
        claimed(corpus, run, "optim.lr=0.02")
    assert "taken from the copy in step_00000008" in capsys.readouterr().err
    claimed(corpus, run)
    assert config_of(run) == whole


@pytest.mark.parametrize("damage", [emptied, torn, edited, not_finite])
def test_an_identity_that_is_damaged_comes_from_the_newest_checkpoint(
    corpus: Corpus, run: Path, damage: Callable[[Path], None]
) -> None:
    identity = json.loads((run / "run.json").read_text())
    damage(run / "run.json")
    assert claimed(corpus, run).id == identity["id"]
    # With it what the run had reached.
    assert json.loads((run / "run.json").read_text()) == identity


def test_an_identity_of_an_older_version_counts_what_is_there(corpus: Corpus, run: Path) -> None:
    (run / "run.json").write_text('{"id": "abc"}')
    assert claimed(corpus, run).id == "abc"
    assert json.loads((run / "run.json").read_text())["step"] == 8


def test_a_copy_without_its_identity_is_a_run_of_its_own(corpus: Corpus, run: Path) -> None:
    identity = json.loads((run / "run.json").read_text())
    (run / "run.json").unlink()
    assert claimed(corpus, run).id != identity["id"]
    shutil.rmtree(checkpoint(run, 8))
    refusal(corpus, run)


@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_what_is_damaged_without_a_copy_starts_nothing(corpus: Corpus, run: Path, name: str) -> None:
    shutil.rmtree(run / "checkpoints")
    torn(run / name)
    assert "damaged" in refusal(corpus, run)


@pytest.mark.parametrize("name", ["config.json", "run.json", "checkpoints"])
@pytest.mark.parametrize("times", [3, 10_000])
def test_storage_that_fails_is_asked_again(
    corpus: Corpus, run: Path, monkeypatch: pytest.MonkeyPatch, name: str, times: int
) -> None:
    left = [times]

    def failing(original: Callable) -> Callable:
        def attempt(path: Path, *args, **kwargs):
            if path.name == name and left[0]:
                left[0] -= 1
                raise OSError(errno.EIO, "Input/output error", str(path))
            return original(path, *args, **kwargs)

        return attempt

    monkeypatch.setattr(transient, "WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(
        Path,
        "iterdir" if name == "checkpoints" else "read_bytes",
        failing(Path.iterdir if name == "checkpoints" else Path.read_bytes),
    )
    if times == 3:
        assert claimed(corpus, run).id == json.loads((run / "run.json").read_text())["id"]
        return
    with pytest.raises(StorageError, match=f"{name}: cannot .*Input/output error"):
        claimed(corpus, run)


def test_a_finished_run_without_its_metrics_has_no_rate(corpus: Corpus, run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    overrides = corpus.overrides(run, *STEPS)
    for kept, missing in ((4, 5), (0, 8)):
        # A line that is whole JSON, and yet no line of ours.
        damaged = [lines[4].replace('"seconds"', '"secondt"')] if kept else []
        (run / "metrics.jsonl").write_text("".join([*lines[kept + 1 :], *damaged] if kept else []))
        assert run_to_end(overrides) == 0
        assert f"no line for {missing} of the steps up to 8" in log_path(overrides).read_text()
        found = json.loads((run / "result.json").read_text())
        assert "training seconds" not in found
        assert ("tokens per second" in found) == bool(kept)


@settings(deadline=None)
@given(st.data())
def test_no_damage_of_a_byte_gives_another_config(
    corpus: Corpus, finished: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    run = tmp_path_factory.mktemp("damaged")
    for name in ("config.json", "run.json"):
        shutil.copy(finished / name, run / name)
    path = run / data.draw(st.sampled_from(["config.json", "run.json"]))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        found = claimed(corpus, run)
    except (CheckpointError, ConfigError):
        return
    # Only white space, and the name of the digest, may differ without a loss.
    assert config_of(run) == config_of(finished)
    identity = json.loads((finished / "run.json").read_text())
    del identity["sha256"]
    assert {"id": found.id, "step": json.loads((run / "run.json").read_text())["step"]} == identity


def test_every_save_notes_its_step(corpus: Corpus, run: Path) -> None:
    assert list_entries(run / "checkpoints").steps == [8, 4]
    assert json.loads((run / "run.json").read_text())["step"] == 8


def test_a_run_goes_on_with_its_own_config(corpus: Corpus, run: Path) -> None:
    before = config_of(run)
    claim(run, load_config([f"run.dir={run}"], 1))
    assert config_of(run) == before
    # What may change does; a group of it replaces the run's whole.
    changed = load_config(
        [f"run.dir={run}", "train.max_skipped=9", "track=offline", "track.project=${run.name}"], 1
    )
    assert (changed.train.max_skipped, changed.track.wandb, changed.track.project) == (
        9,
        "offline",
        "default",
    )
    assert changed.optim.lr == 0.01
    claim(run, load_config([f"run.dir={run}", "slurm.env.MINE=1"], 1))
    assert load_config([f"run.dir={run}"], 1).slurm.env["MINE"] == "1"
    assert "MINE" not in load_config([f"run.dir={run}", "slurm=default"], 1).slurm.env
    claim(run, changed)
    with pytest.raises(ConfigError) as caught:
        claim(run, load_config([f"run.dir={run}", "optim.lr=0.02"], 1))
    assert [violation.key for violation in caught.value.violations] == ["optim.lr", "run.dir"]


def test_groups_and_typos_are_never_passed_over_for_the_config_of_a_run(run: Path) -> None:
    # A group makes a run of its own, whose every key is compared.
    with pytest.raises(ConfigError) as caught:
        claim(run, load_config([f"run.dir={run}", "layout=kda_3to1"], 1))
    assert "layout.pattern" in {violation.key for violation in caught.value.violations}
    # It reaches into groups that are not typed: this one brings a layout of its own.
    vocabulary = "data.tokenizer.vocab_size=400"
    found = load_config([f"run.dir={run}", "model=mixtral_small", vocabulary], 1)
    assert {layer.mixer for layer in found.layers} == {"attn"}
    assert found.optim.lr != 0.01
    with pytest.raises(ConfigError, match=r"optim\.lt: unknown key; did you mean optim\.lr\?"):
        load_config([f"run.dir={run}", "optim.lt=0.02"], 1)
    with pytest.raises(ConfigError, match=r"no such option|unknown option|layout"):
        load_config([f"run.dir={run}", "layout=kda_4to1"], 1)
    assert load_config([f"run.dir={run}-other"], 1).optim.lr != 0.01


def test_weights_are_no_run_directory(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": {}, "model_type": "weft"}))
    for overrides in ([f"run.dir={tmp_path}"], corpus.overrides(tmp_path, *STEPS)):
        with pytest.raises(ConfigError, match=r"run\.dir: .*config\.json is not the config of a run"):
            claim(tmp_path, load_config(overrides, 1))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
