"""`python -m slurm.submit [group=option] [key=value] [--dry-run]`: one training job, sized by its cluster."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import Field

from conf.compose import Config, compose_tree, validate
from conf.errors import ConfigError, DataError, Violation
from conf.help import Page, run
from conf.keys import sections

SCRIPT = "slurm/pretrain.sbatch"
ROOT = Path(__file__).parent.parent

# What Hydra's grammar needs, and nothing by which a shell starts a command, a substitution, a
# redirection or a second line. No shell reads these tokens here; sites wrap sbatch in scripts of theirs.
_KEY = r"[A-Za-z_][A-Za-z0-9_./@-]*"
_VALUE = r"[A-Za-z0-9_ .,:/=+*%@()\[\]{}'\"-]*"
_OVERRIDE = re.compile(rf"\+{{0,2}}{_KEY}={_VALUE}|~{_KEY}(={_VALUE})?")
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


# N is a whole number; a flag without a second word takes none.
FLAGS = {
    "--dry-run": "show the command and stop",
    "--nodes N": "machines; those of the cluster if absent",
    "--gpus-per-node N": "GPUs of a machine; those of the cluster if absent",
    "--time TIME": "limit of one attempt, [D-]HH:MM:SS",
    "--partition NAME": "partition, or several with commas",
    "--account NAME": "account to charge",
    "--job-name NAME": "name in the queue and of the log file",
}

PAGE = Page(
    __doc__ or "",
    (
        "python -m slurm.submit recipe=kimi_linear_48b_h100_8n --dry-run",
        "python -m slurm.submit recipe=kimi_linear_48b_h100_8n --time 24:00:00 --partition gpu --account me",
    ),
    {
        "GROUP=OPTION": "a file of conf/GROUP, as for python -m train",
        "KEY=VALUE": "a value within a group, as for python -m train",
        **FLAGS,
    },
    sections=sections,
    shown_by="train",
)


class Job(Config):
    """What sbatch is asked for. None leaves the choice to the site."""

    nodes: int = Field(ge=1, le=100_000)
    tasks_per_node: int = Field(ge=1, le=1024)
    gpus_per_node: int = Field(ge=0, le=1024)
    time: str | None = Field(default=None, pattern=r"^([0-9]{1,3}-)?[0-9]{1,3}:[0-5][0-9]:[0-5][0-9]$")
    partition: str | None = Field(default=None, pattern=rf"^{_NAME}(,{_NAME})*$")
    account: str | None = Field(default=None, pattern=rf"^{_NAME}$")
    job_name: str | None = Field(default=None, pattern=rf"^{_NAME}$")


def main(arguments: Sequence[str]) -> int:
    """Show the sbatch command of a run, and run it unless `--dry-run` is given.

    Returns sbatch's exit code, or that of `train.check` where the run could not start on the job's processes.

    Raises ConfigError for arguments, overrides or a cluster that cannot be submitted, and DataError
    when there is no sbatch here.
    """
    options = _parser().parse_intermixed_args(arguments)
    check_overrides(options.overrides)
    cluster = compose_tree(options.overrides)["cluster"]
    job = plan_job(vars(options), cluster)
    if code := check_run(job, options.overrides):
        return code
    command = sbatch_command(job, options.overrides)
    print(shlex.join(command), flush=True)
    if options.dry_run:
        return 0
    try:
        return subprocess.run(command, cwd=ROOT, check=False).returncode
    except FileNotFoundError as error:
        raise DataError("sbatch: not on the PATH; submit from a login node of the cluster") from error


def plan_job(options: Mapping[str, Any], cluster: Mapping[str, Any]) -> Job:
    """The job that the options ask for; what they leave out comes from the cluster.

    One task per GPU; on a cluster without GPUs its `gpus_per_node` counts processes. Raises ConfigError.
    """
    per_node = options["gpus_per_node"]
    gpus = (cluster["gpus_per_node"] if cluster["device"] == "cuda" else 0) if per_node is None else per_node
    nodes = options["nodes"]
    names = ("time", "partition", "account", "job_name")
    sizes = {
        "nodes": cluster["nodes"] if nodes is None else nodes,
        "gpus_per_node": gpus,
        "tasks_per_node": gpus if gpus > 0 else cluster["gpus_per_node"],
    }
    try:
        return validate(Job, sizes | {name: options[name] for name in names})
    except ConfigError as error:
        flags = [Violation("--" + key.replace("_", "-"), message) for key, message in error.violations]
        raise ConfigError(flags) from error


def sbatch_command(job: Job, overrides: Sequence[str]) -> list[str]:
    """The arguments of sbatch, one element each. The overrides come last and unchanged."""
    flags = {
        "job-name": job.job_name,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks_per_node,
        "gpus-per-node": job.gpus_per_node or None,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
    }
    given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    return ["sbatch", *given, SCRIPT, *overrides]


def check_run(job: Job, overrides: Sequence[str]) -> int:
    """The exit code of `python -m train.check` on all processes of the job: 0 when the run can start."""
    sizes = [f"cluster.nodes={job.nodes}", f"cluster.gpus_per_node={job.tasks_per_node}"]
    command = [sys.executable, "-m", "train.check", *overrides, *sizes]
    # Its tables would stand between the reader and the one line that can be copied.
    return subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL).returncode


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises ConfigError that names every override holding more than Hydra's grammar needs."""
    violations = [
        Violation(
            repr(override),
            "not a key=value of letters, digits and _ . , : / = + - * % @ ( ) [ ] { } quotes and spaces",
        )
        for override in overrides
        if not _OVERRIDE.fullmatch(override)
    ]
    if violations:
        raise ConfigError(violations)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError([Violation("slurm.submit", f"{message}; --help lists the options")])


def _parser() -> argparse.ArgumentParser:
    # Without abbreviations: a new option must not change what an old command means.
    parser = _Parser("python -m slurm.submit", allow_abbrev=False, add_help=False)
    parser.add_argument("overrides", nargs="*")
    for flag in FLAGS:
        name, _, kind = flag.partition(" ")
        if kind:
            parser.add_argument(name, type=int if kind == "N" else str)
        else:
            parser.add_argument(name, action="store_true")
    return parser


if __name__ == "__main__":
    # Relative paths of the config, and of the log, are those of the repository.
    os.chdir(ROOT)
    run(main, PAGE)
