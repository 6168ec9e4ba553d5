"""Hydra's own command line: --cfg and other flags of its own, and sweeps by one of its launchers."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from conf.compose import CONF_DIR, composed_value, hydra_overrides, model_option, typed_keys
from conf.errors import exit_on_error
from train.config.load import started_architecture

# Hydra's flags whose value is the next word.
_VALUED = ("--cfg", "-c", "--package", "-p", "--info", "-i")


def hydra_main(arguments: Sequence[str]) -> None:
    """Hands the arguments to Hydra, value keys made harmless so that our own check names the typos."""
    flags, typed = told_apart(arguments)
    with ExitStack() as stack:
        with exit_on_error():
            overrides = [*given_model(flags, typed, stack), *hydra_overrides(typed)]
        sys.argv = [sys.argv[0], *flags, *overrides]
        hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")(one_job)()


def given_model(flags: Sequence[str], typed: Sequence[str], stack: ExitStack) -> list[str]:
    """The lines by which one run, or what is shown of it, has the model of train.start.

    Runs of a sweep may each have another one; `one_job` sees to it.
    """
    if "-m" in flags or "--multirun" in flags or "model" in typed_keys(typed):
        return []
    architecture = started_architecture(composed_value(typed, "train.start"))
    return [] if architecture is None else stack.enter_context(model_option(architecture))


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


def one_job(composed: Any) -> None:
    """One run of a sweep. Each has its own directory: run.dir/NUMBER."""
    from omegaconf import OmegaConf

    from train.config.environment import read_environment
    from train.config.load import checked, compose_run, names_mixers

    with exit_on_error():
        # All mixers are composed again by `compose_run`.
        typed = [line for line in HydraConfig.get().overrides.task if not line.startswith("mixer=[")]
        tree = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(tree, dict), f"{type(tree)=}"
        known = {str(name): value for name, value in tree.items()}
        with outside():
            if "model" not in typed_keys(typed) and composed_value(typed, "train.start") is not None:
                known = compose_run(typed)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            known["run"]["dir"] = f"{known['run']['dir']}/{HydraConfig.get().job.num}"
        environment = read_environment()
        config = checked(known, environment.world_size, sees_mixers=names_mixers(typed))
        from train.loop.run import run_checked

        code = run_checked(config, environment)
    if code:
        # What Hydra would begin next is not begun.
        sys.exit(code)
