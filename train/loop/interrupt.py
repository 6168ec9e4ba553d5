"""Requests to stop at the next step boundary: signals, and a file that a batch script may leave."""

import os
import signal
import threading
from functools import cache
from pathlib import Path
from types import FrameType

from conf.errors import INTERRUPTED

PREEMPT, REQUEUE = "PREEMPT", "REQUEUE"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """All ranks agreed to stop before the run is done."""


class Signals:
    """Whether this process was sent SIGINT, SIGTERM or SIGUSR1, from its construction on.

    They only set a flag: what runs is finished first. A second SIGINT ends the process at once, with exit
    code 130. says: the first one is answered by a line.
    """

    def __init__(self, *, says: bool) -> None:
        self.is_heard, self._says = False, says
        receiver, sender = os.pipe()
        os.set_blocking(sender, False)
        for number in SIGNALS:
            signal.signal(number, self._hear)
        signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
        # The main thread may wait in a collective, where Python calls no handler.
        threading.Thread(target=self._count, args=(receiver,), name="signals", daemon=True).start()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.is_heard = True

    def _count(self, receiver: int) -> None:
        interrupts = 0
        while received := os.read(receiver, 1):
            if received[0] != signal.SIGINT:
                continue
            interrupts += 1
            if interrupts > 1:
                os.write(2, b"interrupted\n")
                os._exit(INTERRUPTED)
            if self._says:
                print("asked to stop: saves after this step; Ctrl-C again ends at once", flush=True)


@cache
def listen(*, says: bool) -> Signals:
    """The signals of this process, heard from the first call on. From its main thread."""
    return Signals(says=says)


class Interrupt:
    """Whether somebody asked this process to save and stop.

    By a signal, at any time since the process first listened, or by the file PREEMPT in the run directory,
    which the first rank watches.
    """

    def __init__(self, run_dir: Path, *, is_first: bool) -> None:
        self._signals = listen(says=is_first)
        self._file = run_dir / PREEMPT if is_first else None

    @property
    def is_requested(self) -> bool:
        """True once a signal came or the file appeared."""
        return self._signals.is_heard or (self._file is not None and self._file.exists())
