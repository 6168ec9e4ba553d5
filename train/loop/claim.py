"""A run directory becomes this start's: of the same run, with all that it saved, without old requests."""

from pathlib import Path

from conf.errors import ConfigError, Violation, as_storage_error
from train.checkpoint.records import write_record
from train.checkpoint.run_files import (
    CONFIG_FILE,
    RunFiles,
    new_identity,
    read_identity,
    refuse_lost_progress,
)
from train.config.run_config import RunConfig
from train.config.saved import saved_differences
from train.config.versions import VERSION, VERSION_KEY
from train.loop.interrupt import PREEMPT, REQUEUE


def claim(directory: Path, config: RunConfig) -> RunFiles:
    """The files of the run: its config saved, its identity drawn, old stop requests removed.

    Raises ConfigError with every key in which the config differs from the one that the run was started
    with, CheckpointError where files of the run are damaged without a copy or its newest checkpoint is gone,
    StorageError when the directory cannot be written.
    """
    wanted = config.model_dump(mode="json")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if found := saved_differences(directory, wanted):
            raise ConfigError([*found, _other_directory(directory)])
        identity = read_identity(directory) or new_identity(directory)
        refuse_lost_progress(directory, identity.step, config.checkpoint.accept_step)
        files = RunFiles(directory, {VERSION_KEY: VERSION, **wanted}, identity)
        write_record(directory / CONFIG_FILE, files.config)
        files.write_step(identity.step)
        for name in (PREEMPT, REQUEUE):
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise as_storage_error(error, directory) from error
    return files


def _other_directory(directory: Path) -> Violation:
    return Violation("run.dir", f"{directory} holds that run; choose another directory, or set the keys back")
