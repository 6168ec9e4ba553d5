"""`python -m slurm.settings [group=option] [key=value]`: what the job script wants to know, as lines of bash.

The script reads them by eval. They come from the composed config of the run, as the trainer reads it.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.help import Page, run, show

ROOT = Path(__file__).parent.parent
PAGE = Page(
    __doc__ or "",
    ("python -m slurm.settings recipe=smoke run.dir='runs/x_${model.depth}'",),
    {"KEY=VALUE": "as for python -m train"},
    shown_by="train",
)


def main(overrides: Sequence[str]) -> int:
    """Prints the lines; the exit code is that of `train.resolve`."""
    command = [sys.executable, "-m", "train.resolve", *overrides]
    found = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if found.returncode == 0:
        show("\n".join(lines_of(json.loads(found.stdout))) + "\n")
    return found.returncode


def lines_of(config: Mapping[str, Any]) -> list[str]:
    """Assignments to the variables of the job script, quoted for bash."""
    slurm = config["slurm"]
    given = {name: value for name, value in slurm["env"].items() if value is not None}
    unset = [name for name in slurm["env"] if name not in given]
    used = [os.path.abspath(path) for path in (config["run"]["dir"], config["data"]["directory"])]
    return [
        f"run_dir={shlex.quote(config['run']['dir'])}",
        f"max_restarts={int(slurm['max_restarts'])}",
        f"max_crashes={int(slurm['max_crashes'])}",
        f"exclude_failed={'yes' if slurm['exclude_failed'] else ''}",
        f"notice={slurm['notice_seconds'] or ''}",
        f"modules={_array(slurm['modules'])}",
        f"prolog={shlex.quote(slurm['prolog'] or '')}",
        f"job_env={_array([f'{name}={value}' for name, value in given.items()])}",
        f"job_unset={_array(unset)}",
        *_container_lines(slurm["container"], used),
    ]


def _container_lines(container: Mapping[str, Any], needed: Sequence[str]) -> list[str]:
    """Flags of srun, the words before the trainer's command, and its interpreter."""
    here = os.getcwd()
    paths = list(dict.fromkeys([here, *needed]))
    # What lies within a mounted folder comes with it.
    outer = [one for one in paths if not any(one.startswith(f"{two}/") for two in paths)]
    mounts = ",".join([*(f"{path}:{path}" for path in outer), *container["mounts"]])
    flags, words, python = [], [], ""
    if container["kind"] != "none":
        python = container["python"]
    if container["kind"] == "pyxis":
        image, workdir = container["image"], f"--container-workdir={here}"
        flags = [f"--container-image={image}", f"--container-mounts={mounts}", workdir]
    elif container["kind"] == "apptainer":
        words = ["apptainer", "exec", "--nv", "--bind", mounts, "--pwd", here, container["image"]]
    inside = f"trainer_python={shlex.quote(python)}"
    return [f"srun_flags={_array(flags)}", f"container={_array(words)}", inside]


def _array(words: Sequence[str]) -> str:
    return f"({shlex.join(words)})"


if __name__ == "__main__":
    run(main, PAGE)
