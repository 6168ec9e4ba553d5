"""`python -m train -m`: one run after the other, and a table of how they ended."""

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.errors import STOPPED, ConfigError, Violation, as_weft_error
from conf.groups import group_options
from conf.overrides import sweep_jobs
from conf.user_files import SEARCH_KEY, read_given
from train.config.environment import Environment, read_environment
from train.config.load import load_config, read_run
from train.config.run_names import sweep_names

if TYPE_CHECKING:
    from train.config.run_config import RunConfig
    from train.loop.sweep_table import Ended


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its checked config, and the overrides in which it differs from others."""

    config: "RunConfig"
    own: str

    @property
    def name(self) -> str:
        """The directory, and what is tried in it."""
        return f"{self.config.run.dir} ({self.own})" if self.own else self.config.run.dir


def flagged(arguments: Sequence[str]) -> int:
    """The exit code of a sweep, or of what Hydra does with flags and keys of its own.

    Raises ConfigError, also for a sweep of several processes.
    """
    typed = [argument for argument in arguments if argument not in ("-m", "--multirun")]
    if any(is_of_hydra(argument) for argument in typed):
        from train.loop.hydra_line import hydra_main

        hydra_main(arguments)
        return 0
    environment = read_environment()
    if environment.world_size > 1:
        message = f"a sweep has one process; found {environment.world_size}; start each of its runs by itself"
        raise ConfigError([Violation("-m", message)])
    return sweep(checked_jobs(typed), environment)


def is_of_hydra(argument: str) -> bool:
    """Whether an argument is a flag or a key of Hydra's own, but for where it finds options."""
    word = argument.lstrip("+~")
    return word.startswith(("-", "hydra")) and not word.startswith(SEARCH_KEY)


def checked_jobs(typed: Sequence[str]) -> list[Job]:
    """The runs that overrides with several values ask for, in run.dir/NUMBER.

    Raises ConfigError with the violations of all of them, before the first one starts.
    """
    jobs, found = [], dict[Violation, list[str]]()
    directories = read_given([line for line in typed if line.startswith(SEARCH_KEY)]).directories
    combinations = sweep_jobs(typed, lambda group: group_options(group, directories))
    for number, overrides in enumerate(combinations):
        own = ", ".join(line.lstrip("+") for line, same in zip(overrides, typed, strict=True) if line != same)
        try:
            config = load_config(overrides, 1)
        except ConfigError as error:
            for violation in error.violations:
                found.setdefault(violation, []).append(own)
            continue
        directory = config.run.model_copy(update={"dir": f"{config.run.dir}/{number}"})
        names, keys = sweep_names(config.run.dir, number, own), read_run(overrides).all_keys()
        free = {key: name for key, name in names.items() if f"track.{key}" not in keys}
        track = config.track.model_copy(update=free)
        jobs.append(Job(config.model_copy(update={"run": directory, "track": track}), own))
    if found:
        raise ConfigError([_of_some(*violation, len(combinations)) for violation in found.items()])
    return jobs


def _of_some(violation: Violation, where: Sequence[str], runs: int) -> Violation:
    if len(where) == runs:
        return violation
    more = f" and {len(where) - 1} more" if len(where) > 1 else ""
    return Violation(violation.key, f"{violation.message} (in the run of {where[0]}{more})")


def sweep(jobs: Sequence[Job], environment: Environment) -> int:
    """Trains one after the other, those that can, until a request to stop; then prints the table.

    Gives STOPPED after such a request, else the code of the first run that failed, else 0.
    """
    from train.loop.interrupt import listen
    from train.loop.sweep_table import Ended, show_sweep

    ended = [Ended(job.config.run.dir, job.own) for job in jobs]
    for number, job in enumerate(jobs):
        print(f"run {number + 1} of {len(jobs)}: {job.name}", flush=True)
        ended[number] = train_one(job, environment, ended[number])
        # Also one that comes between two runs, or too late for the one before.
        if ended[number].code == STOPPED or listen(says=True).is_heard:
            break
    show_sweep(ended)
    codes = [run.code for run in ended]
    if STOPPED in codes or None in codes:
        return STOPPED
    return next((code for code in codes if code), 0)


def train_one(job: Job, environment: Environment, ended: "Ended") -> "Ended":
    """How the run ended; an error is printed with the name of the run."""
    from train.loop.run import run_checked

    try:
        return ended.with_code(run_checked(job.config, environment))
    except Exception as error:
        known = as_weft_error(error)
        if known is None:
            traceback.print_exc()
        is_config = isinstance(known, ConfigError)
        for said in known.violations if is_config else [known or f"{type(error).__name__}: {error}"]:
            print(f"error: {job.name}: {said}", file=sys.stderr, flush=True)
        return ended.with_code(known.exit_code if known else 1, is_claimed=not is_config)
