"""Whatever is typed either reaches sbatch as it is, one argument each, or is refused with exit code 64."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conf.errors import ConfigError, DataError, exit_on_error
from slurm import submit

CLUSTER = {"nodes": 8, "gpus_per_node": 4, "device": "cuda"}
EMPTY: dict[str, Any] = dict.fromkeys(("nodes", "gpus_per_node", "time", "partition", "account", "job_name"))
DANGEROUS = "\n\r\t\0`$;&|<>\\!?#^"


def plan(**options: Any) -> submit.Job:
    return submit.plan_job(EMPTY | options, CLUSTER)


def command_or_refusal(overrides: list[str], **options: Any) -> list[str] | int:
    try:
        submit.check_overrides(overrides)
        return submit.sbatch_command(plan(**options), overrides)
    except ConfigError as error:
        return error.exit_code


@given(st.lists(st.text(max_size=12) | st.from_regex(r"\A[a-z.]{1,9}=[a-z0-9*() \[\]'-]{0,9}\Z"), max_size=4))
@example(["layout.pattern='3*(gdn kda) attn'"])
@example(["a=1; rm -rf /"])
def test_an_override_is_one_unchanged_argument_or_refused(overrides: list[str]) -> None:
    command = command_or_refusal(overrides)
    if isinstance(command, int):
        assert command == 64
        return
    assert command[command.index(submit.SCRIPT) + 1 :] == overrides
    assert shlex.split(shlex.join(command)) == command
    assert not any(char in override for override in overrides for char in DANGEROUS)
    assert not any(override.startswith("-") for override in overrides)


@pytest.mark.parametrize("char", [*DANGEROUS, "é", "\u2028", "\x7f"])
def test_each_dangerous_character_is_refused_wherever_it_stands(char: str) -> None:
    for override in (f"a={char}", f"a=1{char}", f"{char}a=1", f"a{char}=1", f"a=1{char}b=2"):
        with pytest.raises(ConfigError):
            submit.check_overrides([override])
    for name in (f"x{char}", f"{char}x", f"x{char}y"):
        for field in ("job_name", "partition", "account", "time"):
            with pytest.raises(ConfigError, match="--" + field.replace("_", "-")):
                plan(**{field: name})


@given(st.text(min_size=1, max_size=12))
def test_a_job_name_is_one_flag_or_refused(name: str) -> None:
    command = command_or_refusal([], job_name=name)
    if isinstance(command, int):
        assert command == 64
        return
    assert command[1] == f"--job-name={name}"
    assert shlex.quote(name) == name


@pytest.mark.parametrize(
    "override",
    [
        "recipe=smoke",
        "layout.pattern='3*(gdn kda) attn'",
        "optim.betas=[0.9, 0.95]",
        "+data.extra={a: 1, b: 2}",
        "~track",
        "++optim.lr=3e-4",
        "parallel@inner=fsdp",
        "run.dir=/scratch/me/run-1",
        'sample.prompt="def "',
    ],
)
def test_what_hydra_understands_passes(override: str) -> None:
    submit.check_overrides([override])


def test_the_cluster_sizes_the_job_and_flags_win() -> None:
    command = submit.sbatch_command(plan(), ["a=1"])
    sizes = ["--nodes=8", "--ntasks-per-node=4", "--gpus-per-node=4"]
    assert command == ["sbatch", *sizes, "slurm/pretrain.sbatch", "a=1"]
    assert plan(nodes=2, gpus_per_node=1) == submit.Job(nodes=2, tasks_per_node=1, gpus_per_node=1)


def test_a_cluster_without_gpus_asks_for_processes() -> None:
    job = submit.plan_job(EMPTY, CLUSTER | {"device": "cpu"})
    assert submit.sbatch_command(job, [])[1:3] == ["--nodes=8", "--ntasks-per-node=4"]
    assert "--gpus-per-node" not in " ".join(submit.sbatch_command(job, []))


@pytest.mark.parametrize("time", ["1:00:00", "24:00:00", "7-00:00:00", "01:30:59"])
def test_times_that_slurm_reads_pass(time: str) -> None:
    assert f"--time={time}" in submit.sbatch_command(plan(time=time), [])


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"gpus_per_node": -1}, {"time": "90"}, {"time": "1:60:00"}])
def test_impossible_sizes_are_refused_by_flag(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="^--" + next(iter(wrong)).replace("_", "-")):
        plan(**wrong)


def test_all_violations_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(nodes=0, job_name="a b", time="x")
    assert {violation.key for violation in caught.value.violations} == {"--nodes", "--job-name", "--time"}


def test_a_dry_run_shows_the_command_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    stock = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda *args, **more: started.append(args[0]) or stock(*args, **more)
    )
    flags = ["--dry-run", "--job-name=night", "--time", "1:00:00"]
    assert submit.main(["cluster=h100_8n", *flags, "layout.pattern='gdn attn'"]) == 0
    assert [command[1:3] for command in started] == [["-m", "train.check"]]
    shown = shlex.split(capsys.readouterr().out)
    assert shown[:3] == ["sbatch", "--job-name=night", "--nodes=8"]
    assert shown[-3:] == ["slurm/pretrain.sbatch", "cluster=h100_8n", "layout.pattern='gdn attn'"]


def test_a_run_that_cannot_start_is_not_submitted(capfd: pytest.CaptureFixture[str]) -> None:
    # Seven nodes: what the cluster alone would allow does not fit the job.
    assert submit.main(["cluster=h100_8n", "--nodes=7", "parallel.tp=16"]) == 64
    captured = capfd.readouterr()
    assert "parallel.tp: 16 does not divide the 56 processes" in captured.err
    assert "sbatch" not in captured.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["a=$(reboot)"],
        ["cluster=h100_8n\nreboot"],
        ["--job-name", "a;b"],
        ["--nod", "3"],
        ["recipe"],
        ["--nodes", "three"],
        ["--wrap=reboot"],
        ["cluster=h100_9n"],
    ],
)
def test_refusals_exit_with_64(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_error():
        submit.main(["--dry-run", *arguments])
    assert ended.value.code == 64
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")


def test_sbatch_gets_the_tokens_from_the_repository_root(tmp_path: Path) -> None:
    log = tmp_path / "log"
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\npwd >"{log}"\nprintf "%s\\n" "$@" >>"{log}"\nexit 3\n')
    (tmp_path / "sbatch").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "slurm.submit", "sample.prompt='a  b'", "--partition=long"]
    done = subprocess.run(command, cwd=submit.ROOT, env=environment, check=False)
    assert done.returncode == 3
    root, *rest = log.read_text().splitlines()
    assert root == str(submit.ROOT)
    sizes = ["--nodes=1", "--ntasks-per-node=1", "--partition=long"]
    assert rest == [*sizes, "slurm/pretrain.sbatch", "sample.prompt='a  b'"]


def test_a_machine_without_sbatch_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(submit, "check_run", lambda job, overrides: 0)
    with pytest.raises(DataError, match="sbatch: not on the PATH"):
        submit.main([])
