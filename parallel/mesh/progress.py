"""What this process is at, for others to read when it hangs; and what it leaves behind when it is ended."""

import faulthandler
import time
from contextlib import suppress
from pathlib import Path

# Not in torch's stubs.
from torch._C._distributed_c10d import _dump_fr_trace_json  # pyright: ignore[reportAttributeAccessIssue]


class Progress:
    """The section of the run that the main thread is in, and the step. Mutated by `enter`."""

    def __init__(self) -> None:
        self._section, self._step, self._since = "set-up", 0, time.monotonic()

    def enter(self, section: str, step: int) -> None:
        """The main thread is in a section from here on."""
        self._section, self._step, self._since = section, step, time.monotonic()

    def said(self) -> str:
        """Section, step and how long it has been in it."""
        return f"in {self._section} of step {self._step} for {time.monotonic() - self._since:.0f} s"


def leave_record(folder: Path, rank: int) -> str:
    """Writes stacks of all threads and the last collectives into the folder; a line that says so.

    Where that fails the line says nothing of it: the process is about to end for a better reason.
    """
    written = []
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank_{rank}.stacks"
        with path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        written.append(path)
    with suppress(OSError, RuntimeError):
        path = folder / f"rank_{rank}.collectives.json"
        path.write_bytes(_dump_fr_trace_json())
        written.append(path)
    return f"; see {' and '.join(map(str, written))}" if written else ""
