"""What this process is at, for others to read when it hangs; and what it leaves behind when it is ended."""

import faulthandler
import json
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

# Not in torch's stubs.
from torch._C._distributed_c10d import _dump_fr_trace_json  # pyright: ignore[reportAttributeAccessIssue]

# Where the main thread stands while it waits for a message; collectives are in torch's flight record.
_MESSAGES = (str(Path(dist.__file__).parent), str(Path(__file__).with_name("collectives.py")))
UNKNOWN = "unknown"
LOST_NODE = "lost_node"


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


def waits_for() -> str | None:
    """What this process waits for from another one; None where it is at work of its own.

    UNKNOWN where torch keeps no record.
    """
    with suppress(OSError, RuntimeError, ValueError):
        entries = json.loads(_dump_fr_trace_json())["entries"]
        if entries:
            open_ones = [entry for entry in entries if _is_waited_for(entry)]
            return _said_of(open_ones[0]) if open_ones else _message()
    return UNKNOWN


def _is_waited_for(entry: dict[str, Any]) -> bool:
    # On a GPU, one that is only scheduled stands behind work of this rank; gloo knows no start.
    has_begun = entry["state"] == "started" or entry["profiling_name"].startswith("gloo:")
    return has_begun and not entry["retired"]


def _said_of(entry: dict[str, Any]) -> str:
    operation = entry["profiling_name"].partition(":")[2]
    return f"{operation} {entry['collective_seq_id']} of {entry['process_group'][1]}"


def _message() -> str | None:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "a message" if frame and frame.f_code.co_filename.startswith(_MESSAGES) else None


def leave_record(folder: Path, rank: int, lost: str | None) -> str:
    """Writes stacks of all threads and the last collectives into the folder; a line that says so.

    The machine that was lost goes into LOST_NODE beside them, for whoever starts the run again. Where that
    fails the line says nothing of it: the process is about to end for a better reason.
    """
    written = []
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if lost is not None:
            # By several ranks, none of which may find half of it.
            beside = folder / f"{LOST_NODE}.{rank}"
            beside.write_text(f"{lost}\n")
            beside.replace(folder / LOST_NODE)
        path = folder / f"rank_{rank}.stacks"
        with path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        written.append(path)
    with suppress(OSError, RuntimeError):
        path = folder / f"rank_{rank}.collectives.json"
        path.write_bytes(_dump_fr_trace_json())
        written.append(path)
    return f"; see {' and '.join(map(str, written))}" if written else ""
