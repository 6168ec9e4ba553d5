"""The job that is submitted: slurm/pretrain.sbatch with directives and settings filled in, and its code."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import as_storage_error
from conf.groups import is_group
from conf.revision import PACKAGES, REVISION_FILE, revision
from conf.user_files import moved, own_paths
from slurm.settings import ROOT, lines_of

TEMPLATE = ROOT / "slurm/pretrain.sbatch"
# What the job has where neither the key nor the run itself says more, in seconds.
NOTICE_SECONDS = 120
_LONGEST_NOTICE = 65535


@dataclass(frozen=True)
class Submission:
    """One job, ready to be written: its folder below the run directory, and what it consists of."""

    folder: Path
    config: Mapping[str, Any]
    overrides: Sequence[str]

    @property
    def script(self) -> Path:
        """The rendered script."""
        return self.folder / "job.sbatch"

    @property
    def code(self) -> Path:
        """Where the job finds the packages."""
        return self.folder / "code" if self.config["slurm"]["snapshot"] else ROOT

    def directives(self) -> list[str]:
        """The #SBATCH lines."""
        return [f"#SBATCH {_as_directive(flag)}" for flag in sbatch_flags(self.config)]

    def text(self) -> str:
        """The whole script."""
        text = _filled(TEMPLATE.read_text(), "directives", self.directives())
        return _filled(text, "settings", self._settings())

    def _settings(self) -> list[str]:
        return [
            f"root={shlex.quote(str(ROOT))}",
            f"code={shlex.quote(str(self.code.resolve()))}",
            'cd "$root" || exit 74',
            f"python={shlex.quote(sys.executable)}",
            shlex.join(["set", "--", *self._overrides()]),
            *lines_of(self.config),
        ]

    def _overrides(self) -> list[str]:
        """The overrides, files of the user's own by the copies that the job has of them."""
        copies = {path: str(copy.absolute()) for path, copy in self._copies()}
        return moved(self.overrides, lambda path: Path(copies[path]))

    def _copies(self) -> list[tuple[Path, Path]]:
        """Each file and directory of the user's own that the config comes from, and its copy."""
        found = own_paths(self.overrides)
        return [(path, self.folder / "own" / f"{n}-{path.name}") for n, path in enumerate(found)]

    def parts(self) -> list[str]:
        """What `write` makes, as lines for people."""
        made = [str(self.script), str(self.folder / "config.json")]
        if self.config["slurm"]["snapshot"]:
            made.append(f"{self.code}/ ({', '.join(PACKAGES)})")
        return made + [f"{copy} ({path})" for path, copy in self._copies()]

    def write(self) -> None:
        """Makes the folder with script, resolved config, code and own files. Raises StorageError."""
        try:
            self.folder.mkdir(parents=True)
            # sbatch makes no directory, and without one a job ends with no word.
            (ROOT / self.config["run"]["dir"] / "logs").mkdir(exist_ok=True)
            (self.folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
            if self.config["slurm"]["snapshot"]:
                copy_code(self.code)
            for path, copy in self._copies():
                copy_own(path, copy)
            self.script.write_text(self.text())
            self.script.chmod(0o755)
        except OSError as error:
            raise as_storage_error(error, self.folder) from error


def copy_code(target: Path) -> None:
    """Copies the packages as they are now, changes that nobody committed included. Raises OSError."""
    target.mkdir()
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.out")
        shutil.copytree(ROOT / package, target / package, ignore=ignored)
    # Its version is asked for by --version and recorded.
    shutil.copy(ROOT / "pyproject.toml", target)
    (target / REVISION_FILE).write_text(json.dumps(revision(ROOT)) + "\n")


def copy_own(path: Path, target: Path) -> None:
    """Copies a config file of the user's, or the options in a directory. Raises OSError."""
    target.parent.mkdir(exist_ok=True)
    if path.is_file():
        shutil.copyfile(path, target)
        return
    for file in path.glob("*/*.yaml"):
        if is_group(file.parent.name):
            (target / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / file.parent.name / file.name)


def sbatch_flags(config: Mapping[str, Any]) -> list[str]:
    """What sbatch is asked for: sizes from the cluster, the rest from the keys of slurm.

    One task per GPU; on a cluster without GPUs its `gpus_per_node` counts processes.
    """
    cluster, slurm = config["cluster"], config["slurm"]
    has_gpus = cluster["device"] == "cuda"
    values = {
        "job-name": slurm["job_name"],
        "nodes": cluster["nodes"],
        "ntasks-per-node": cluster["gpus_per_node"],
        "gpus-per-node": cluster["gpus_per_node"] if has_gpus else None,
        "time": slurm["time"],
        "partition": slurm["partition"],
        "account": slurm["account"],
        "qos": slurm["qos"],
        "reservation": slurm["reservation"],
        "constraint": slurm["constraint"],
        "mem": slurm["memory"],
        "exclude": slurm["exclude"],
        "mail-user": slurm["mail_user"],
        "mail-type": ",".join(slurm["mail_types"]) if slurm["mail_user"] else None,
        "signal": f"B:USR1@{notice_of(config)}",
        "open-mode": "append",
        # A file for all attempts of a job, which `tail -F` follows; sbatch has no name for one of them.
        "output": str(log_folder(config) / "%x-%j.out"),
    }
    given = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return [*given, "--requeue", *(["--exclusive"] if slurm["exclusive"] else [])]


def log_folder(config: Mapping[str, Any]) -> Path:
    """Where the output of jobs goes, as sbatch writes a path: a percent sign is two."""
    return Path(str(ROOT / config["run"]["dir"] / "logs").replace("%", "%%"))


def notice_of(config: Mapping[str, Any]) -> int:
    """Seconds before the time limit: the key, else what an earlier start of the run measured, else 120."""
    if (wanted := config["slurm"]["notice_seconds"]) is not None:
        return wanted
    measured = Path(config["run"]["dir"]) / "NOTICE"
    text = measured.read_text().strip() if measured.exists() else ""
    seconds = int(text) if text.isdecimal() else 0
    return min(max(seconds, NOTICE_SECONDS), _LONGEST_NOTICE)


def _as_directive(flag: str) -> str:
    """A flag as sbatch reads it in a script, where quotes keep a value with spaces together."""
    name, sign, value = flag.partition("=")
    if not sign or not re.search(r"[\s#'\"]", value):
        return flag
    quoted = value.replace('"', '\\"')
    return f'{name}="{quoted}"'


def _filled(text: str, part: str, lines: Sequence[str]) -> str:
    """The script, one of its parts replaced."""
    head, mark, rest = text.partition(f"# >>> {part}\n")
    _, end, tail = rest.partition("# <<<\n")
    assert mark, f"{TEMPLATE} has a part {part}"
    assert end, f"{TEMPLATE}: the part {part} ends"
    return head + mark + "".join(f"{line}\n" for line in lines) + end + tail
