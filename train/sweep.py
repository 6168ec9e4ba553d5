"""Hydra's own command line: multirun sweeps and its launchers, --help, --cfg."""

import sys
from collections.abc import Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from conf.compose import CONF_DIR, hydra_overrides, validate
from conf.errors import ConfigError, exit_on_error


def hydra_main(arguments: Sequence[str]) -> None:
    """Hands the arguments to Hydra, value keys made harmless so that our own check names the typos."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    with exit_on_error():
        overrides = hydra_overrides([argument for argument in arguments if not argument.startswith("-")])
    sys.argv = [sys.argv[0], *flags, *overrides]
    hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")(one_job)()


def one_job(composed: Any) -> None:
    """One run of a sweep. Each has its own directory: run.dir/NUMBER."""
    from omegaconf import OmegaConf

    from train.config.checks import violations
    from train.config.environment import read_environment
    from train.config.load import with_global_batch
    from train.config.run_config import RunConfig
    from train.loop.run import run_checked

    with exit_on_error():
        tree = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(tree, dict), f"{type(tree)=}"
        known = {str(name): value for name, value in tree.items()}
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            known["run"]["dir"] = f"{known['run']['dir']}/{HydraConfig.get().job.num}"
        environment = read_environment()
        config = validate(RunConfig, with_global_batch(known, environment.world_size))
        found = violations(config, environment.world_size, is_run_here=True)
        if found:
            raise ConfigError(found)
        run_checked(config, environment)
