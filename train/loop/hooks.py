"""What runs beside the steps of a run: the protocol, garbage collection and the profiler."""

import gc
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from conf.errors import as_storage_error
from data.loader import Batch
from train.config.fields import ProfileConfig
from train.eval.heldout import Evaluation
from train.loop.state import TrainState
from train.loop.step import StepResult


class Saved(NamedTuple):
    """What a save took: seconds of this rank, and bytes of the files of all ranks."""

    seconds: float
    bytes: int


class StepHook:
    """Called around the steps of a run; a subclass overrides what it needs.

    Every rank calls its hooks in the same order, so that they may be collective. What they
    raise ends the run.
    """

    def before_data(self, state: TrainState) -> None:
        """The batch of the next step is not awaited yet."""

    def before_step(self, state: TrainState, batch: Batch) -> None:
        """This rank's rows are here."""

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """The weights are updated, the counters of the state count the step."""

    def after_evaluation(self, state: TrainState, held_out: Evaluation, seconds: float) -> None:
        """Held-out documents were scored between two steps, in so many seconds."""

    def after_save(self, state: TrainState, saved: Saved) -> None:
        """A checkpoint of the state is committed."""

    def close(self) -> None:
        """No step follows, after the last one or after an error."""


class GarbageCollection(StepHook):
    """Collects Python's garbage on all ranks at the same steps, every `every` of them.

    Left to itself each rank pauses at another moment and the others wait for it. Mutates the collector of
    this process until `close`.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        gc.collect()
        gc.disable()

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Collects the young generations: what a step leaves behind."""
        if state.step % self._every == 0:
            gc.collect(1)

    def close(self) -> None:
        """Python collects by itself again."""
        gc.enable()


class Profiler(StepHook):
    """Writes a trace of some steps of this rank to profile/ in the run directory, for Perfetto.

    Without effect on what the steps compute; they take longer.
    """

    def __init__(self, config: ProfileConfig, run_dir: Path, rank: int) -> None:
        assert config.first_step is not None, f"{config=}"
        self._first, self._last = config.first_step, config.first_step + config.steps - 1
        self._path = run_dir / "profile" / f"steps_{self._first}_to_{self._last}_rank_{rank}.json.gz"
        self._profiler: torch.profiler.profile | None = None
        self._range: AbstractContextManager[Any] = nullcontext()

    def before_data(self, state: TrainState) -> None:
        """Starts before the data of the first step, and marks each."""
        if state.step + 1 == self._first:
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()
        if self._profiler is not None:
            self._range = torch.profiler.record_function(f"step {state.step + 1}")
            self._range.__enter__()

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Writes after the last step."""
        self._end_range()
        if state.step == self._last:
            self.close()

    def close(self) -> None:
        """Writes what there is. Raises StorageError."""
        if self._profiler is None:
            return
        self._end_range()
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        partial = self._path.with_name("partial_" + self._path.name)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(partial))
            os.replace(partial, self._path)
        except OSError as error:
            raise as_storage_error(error, self._path) from error
        print(f"profile: {self._path}", flush=True)

    def _end_range(self) -> None:
        self._range.__exit__(None, None, None)
        self._range = nullcontext()
