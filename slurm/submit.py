"""`python -m slurm.submit [group=option] [key=value] [--dry-run]`: one training job, checked and submitted.

The job is written into run.dir first: its script, its config, and a copy of the code that every attempt runs.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from conf.errors import DataError
from conf.help import Page, run
from conf.keys import sections
from conf.user_files import with_absolute_paths
from slurm.options import DRY_RUN, KEYS, Options, quoted, read_options
from slurm.script import Submission
from slurm.settings import ROOT

FLAGS = {
    DRY_RUN: "show what would be written and submitted, and stop; nothing is written",
    **{f"{flag} VALUE": f"the key {key}" for flag, key in KEYS.items()},
    "--OPTION[=VALUE]": "any other option goes to sbatch as it is",
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


def main(arguments: Sequence[str]) -> int:
    """Writes the job into the run directory and submits it; with `--dry-run` only shows both.

    The working directory becomes that of the repository.

    Returns sbatch's exit code, or that of `train.resolve --check` where the run cannot start on the job's
    processes.

    Raises ConfigError for arguments that cannot be submitted, StorageError where the run directory cannot be
    written, and DataError when there is no sbatch here.
    """
    options = read_options(arguments)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    # A run without a directory of its own gets one, as every job by hand does.
    lines = [f"run.name=job-{stamp}", *with_absolute_paths(options.lines)]
    # Relative paths of the config, and of the log, are those of the repository.
    os.chdir(ROOT)
    code, config = resolve(lines, options)
    if config is None:
        return code
    folder = Path(config["run"]["dir"]) / "slurm" / stamp
    job = Submission(folder, config, [*lines, quoted("run.dir", config["run"]["dir"])])
    command = ["sbatch", *options.passed, str(job.script)]
    print("\n".join(job.directives()))
    for part in job.parts():
        print(f"{'would write' if options.is_dry else 'writes'} {part}")
    print(shlex.join(command), flush=True)
    if options.is_dry:
        return 0
    job.write()
    try:
        return subprocess.run(command, cwd=ROOT, check=False).returncode
    except FileNotFoundError as error:
        raise DataError("sbatch: not on the PATH; submit from a login node of the cluster") from error


def resolve(lines: Sequence[str], options: Options) -> tuple[int, Mapping[str, Any] | None]:
    """The config of the run, checked for all processes of the job; its exit code and None if it cannot start.

    What is wrong is printed, the value of a flag under the name of the flag.
    """
    command = [sys.executable, "-m", "train.resolve", "--check", *lines]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = found.stderr
    for flag in options.flags:
        said = said.replace(f"error: {KEYS[flag]}: ", f"error: {flag}: ")
    sys.stderr.write(said)
    return found.returncode, json.loads(found.stdout) if found.returncode == 0 else None


if __name__ == "__main__":
    run(main, PAGE)
