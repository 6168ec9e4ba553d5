"""A finished or running run, opened from its directory for reading, by one process or several."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from conf.errors import ConfigError, Violation
from parallel.apply import Parallel, StepShape, build_empty
from parallel.mesh.world import World, open_world
from train.checkpoint.foreign_ids import Ids, compare_ids
from train.checkpoint.run_files import CHECKPOINTS
from train.checkpoint.store import CheckpointStore
from train.config.environment import Environment
from train.config.run_config import RunConfig
from train.loop.out_of_memory import memory_explained
from train.loop.same_ranks import facts_of


class Restored(NamedTuple):
    """A rank's share of a model, the step of its checkpoint, and whose ids it has learned.

    ids name the checkpoint and the tokenizer.
    """

    built: Parallel
    step: int
    ids: Ids

    def compare(self, data: Ids) -> str | None:
        """As `compare_ids`: the line to print where the ids of `data` cannot be compared with the model's.

        Raises ConfigError for those of another tokenizer.
        """
        fix = "put the dataset back that the run was trained on, or prepare it again with that tokenizer"
        return compare_ids(self.ids, data, "run", fix)


@contextmanager
def open_readers(config: RunConfig, environment: Environment, keys: Sequence[str] = ()) -> Iterator[World]:
    """The World of the processes that read a run. keys are what to try where memory does not suffice.

    Raises as `open_world` does, ConfigError where memory runs out.
    """
    facts = facts_of(config) if environment.world_size > 1 else None
    ranks = (environment.rank, environment.world_size, environment.local_rank)
    advice = (*keys, "more processes (torchrun --nproc-per-node)")
    with (
        memory_explained(config, environment.rank, advice),
        open_world(config.parallel, *ranks, environment.rendezvous, facts) as world,
    ):
        yield world


def open_store(directory: str, config: RunConfig, world: World) -> CheckpointStore:
    """The checkpoints of a run, to be read by these processes."""
    options = {"rank": world.rank, "size": world.size, "group": world.storage}
    return CheckpointStore(Path(directory) / CHECKPOINTS, keep=config.checkpoint.keep, **options)


def dtypes_of(config: RunConfig) -> tuple[torch.dtype, torch.dtype]:
    """Those of a run's weights and of its computation."""
    return getattr(torch, config.precision.parameters), getattr(torch, config.precision.compute)


def without_checkpoint(directory: str) -> ConfigError:
    """What to raise for a run that has saved nothing yet."""
    message = f"{Path(directory) / CHECKPOINTS}: no checkpoint yet; wait for the first save"
    return ConfigError([Violation("run", message)])


def restore(
    directory: str, config: RunConfig, world: World, *, step: int | None = None, rows: int = 1
) -> Restored:
    """The model of the newest good checkpoint, or of that of `step`, on the devices of the world.

    rows are those that go through it at a time. The run may go on. Collective.

    Raises ConfigError when there is no checkpoint yet, CheckpointError when none is usable, or that of `step`
    is damaged.
    """
    plan = config.parallel.plan(1)
    # As many micro-batches as any schedule takes; only single ones go through.
    shape = StepShape(1 if plan is None else plan.stages, rows, config.data.sequence_length)
    built = build_empty(config.architecture, dtypes_of(config), config.parallel, world, shape)
    state = {"model": built.checkpoint_state()}
    loaded = open_store(directory, config, world).load_latest(
        state, partial=("model",), read_only=True, step=step
    )
    if loaded is None:
        raise without_checkpoint(directory)
    with torch.no_grad():
        for first, last in built.tied_copies():
            last.copy_(first)
    return Restored(built, loaded.step, Ids(str(loaded.path), loaded.extra.get("tokenizer")))
