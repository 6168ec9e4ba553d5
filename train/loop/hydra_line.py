"""Hydra's own command line: --cfg and other flags of its own, and sweeps by one of its launchers."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from conf.compose import VALUES, composed_value, hydra_lines, model_option, values_option
from conf.errors import exit_on_error
from conf.groups import CONF_DIR
from conf.user_files import FILE_KEY, SEARCH_KEY, Given, with_absolute_paths
from train.config.load import read_run, started_architecture

# Hydra's flags whose value is the next word.
_VALUED = ("--cfg", "-c", "--package", "-p", "--info", "-i")


def hydra_main(arguments: Sequence[str]) -> None:
    """Hands the arguments to Hydra, value keys made harmless so that our own check names the typos."""
    flags, typed = told_apart(arguments)
    with ExitStack() as stack:
        with exit_on_error():
            given = read_run(typed)
            with given.naming_file():
                overrides = hydra_arguments(flags, given, stack)
        own = own_lines(typed)
        sys.argv = [sys.argv[0], *flags, *overrides]

        def job(composed: Any) -> None:
            one_job(own)

        hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")(job)()


def hydra_arguments(flags: Sequence[str], given: Given, stack: ExitStack) -> list[str]:
    """The lines by which Hydra composes what is given; temporary files of the stack stand behind some.

    One run, or what is shown of it, has the model of train.start. Runs of a sweep may each have another one;
    `one_job` sees to it.
    """
    directories, lines = list[Path](), list[str]()
    is_sweep = "-m" in flags or "--multirun" in flags
    if not is_sweep and "model" not in given.all_keys():
        architecture = started_architecture(composed_value(given, "train.start"))
        if architecture is not None:
            directory, line = stack.enter_context(model_option(architecture))
            directories.append(directory)
            lines.append(line)
    last = list[str]()
    if given.file is not None:
        directory, line = stack.enter_context(values_option(given.file))
        directories.append(directory)
        last.append(line)
    return [*given.search_lines(directories), *lines, *hydra_lines(given), *last]


def own_lines(typed: Sequence[str]) -> list[str]:
    """The overrides that name files and directories of the user's own; `one_job` composes from them again."""
    return [line for line in with_absolute_paths(typed) if line.startswith((f"{FILE_KEY}=", SEARCH_KEY))]


def told_apart(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags with the words that belong to them, and overrides."""
    flags, typed = [], []
    for before, argument in pairwise(["", *arguments]):
        is_value = before in _VALUED and "=" not in argument
        (flags if argument.startswith("-") or is_value else typed).append(argument)
    return flags, typed


@contextmanager
def outside() -> Iterator[None]:
    """Lets the block compose a config of its own within a job of Hydra, which allows one at a time."""
    hydra_of_job = GlobalHydra.instance().hydra
    assert hydra_of_job is not None, "within a job"
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().initialize(hydra_of_job)


def one_job(own: Sequence[str]) -> None:
    """One run of a sweep. Each has its own directory: run.dir/NUMBER."""
    from train.config.environment import read_environment
    from train.config.load import checked, compose_run, mixer_keys

    with exit_on_error():
        # What is composed again brings its mixers, directories and files itself.
        lines = HydraConfig.get().overrides.task
        typed = [line for line in lines if not line.startswith(("mixer=[", f"+{VALUES}="))]
        given = read_run([*own, *typed])
        with outside(), given.naming_file():
            known = compose_run(given)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                known["run"]["dir"] = f"{known['run']['dir']}/{HydraConfig.get().job.num}"
            environment = read_environment()
            config = checked(known, environment.world_size, mixer_keys(given))
        from train.loop.run import run_checked

        code = run_checked(config, environment)
    if code:
        # What Hydra would begin next is not begun.
        sys.exit(code)
