"""Requests to stop at the next step boundary: signals, and a file that a batch script may leave."""

import signal
from pathlib import Path
from types import FrameType

PREEMPT, REQUEUE = "PREEMPT", "REQUEUE"


class Interrupt:
    """Whether somebody asked this process to save and stop.

    SIGUSR1 and SIGTERM only set a flag: the step that runs is finished first. The file PREEMPT in the run
    directory asks the same of the rank that watches it.
    """

    def __init__(self, run_dir: Path, *, watches_file: bool) -> None:
        self._is_requested = False
        self._file = run_dir / PREEMPT if watches_file else None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._is_requested = True

    @property
    def is_requested(self) -> bool:
        """True once a signal came or the file appeared."""
        return self._is_requested or (self._file is not None and self._file.exists())
