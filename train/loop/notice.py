"""How long before its end a job must ask the run to save, from what steps and saves took."""

import math
import time
from pathlib import Path

from train.checkpoint.atomic import write_atomically
from train.loop.hooks import Saved, StepHook
from train.loop.state import TrainState
from train.loop.step import StepResult

NOTICE = "NOTICE"
# Seconds for what is not measured: signals on their way, the tracker's end, SLURM's own.
MARGIN = 60


def notice_seconds(step: float, save: float) -> int:
    """Seconds of notice for a run whose steps and saves take so many: twice both, and a minute."""
    return math.ceil(2 * (step + save)) + MARGIN


class Notice(StepHook):
    """Keeps the seconds of notice in the run directory, where the job script reads them.

    The first step of a process is left out, which compiles and allocates. What an earlier process wrote stays
    until the first save of this one.
    """

    def __init__(self, directory: Path) -> None:
        self._file, self._written = directory / NOTICE, 0
        self._step = self._save = 0.0
        self._start = self._end = time.monotonic()
        self._is_first = True

    def before_data(self, state: TrainState) -> None:
        """Starts the clock of a step."""
        self._start = time.monotonic()

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Notes the longest step."""
        self._end = time.monotonic()
        if not self._is_first:
            self._step = max(self._step, self._end - self._start)
        self._is_first = False

    def after_save(self, state: TrainState, saved: Saved) -> None:
        """Notes the longest save, and writes the notice where it grew. Raises StorageError."""
        self._save = max(self._save, time.monotonic() - self._end)
        seconds = notice_seconds(self._step, self._save)
        if seconds > self._written:
            write_atomically(self._file, f"{seconds}\n".encode())
            self._written = seconds
