"""The lines of a run for people: one for each event and every so many steps, printed and kept."""

import contextlib
import os
import re
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from conf.errors import StorageError
from train.track.line_file import LineFile
from train.track.progress import Progress

LOG = "log.txt"
# What a value may hold beside others on a line.
_PLAIN = re.compile(r"[^\s\"\x00-\x1f\x7f]+")


class RunLog:
    """Prints lines `TIME EVENT key value ...`, and appends the same ones to log.txt in the run directory.

    On a terminal a bar stands for the lines of steps, which the file has nevertheless. A step has a line
    where `every` divides it, where it is the first of this start or the last, and where it was skipped.
    has_peak: the share of peak is that of a peak which the config gives.
    """

    def __init__(self, run_dir: Path, total_steps: int, *, every: int, ranks: int, has_peak: bool) -> None:
        self._file = LineFile(run_dir / LOG)
        self._total, self._every, self._ranks, self._has_peak = total_steps, every, ranks, has_peak
        self._bar: Progress | None = None
        self._first: tuple[int, float] | None = None
        # Of the steps since the last line.
        self._seconds = self._tokens = self._busy = 0.0

    def start(self, what: str, step: int, values: Mapping[str, Any]) -> None:
        """The first line of this start, and the bar where there is a terminal. Raises StorageError."""
        if _is_torn(self._file.path):
            self._file.add("")
        self.event(what, step, values)
        if sys.stdout.isatty():
            self._bar = Progress(self._total)

    def event(self, what: str, step: int, values: Mapping[str, Any]) -> None:
        """A line that says what happened at a step. Raises StorageError where the file does not take it."""
        line = self._line(what, step, values)
        print(line, flush=True)
        self._file.add(line)

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers of a step that is done, as metrics.jsonl has them. Raises StorageError as `event`."""
        now = time.monotonic()
        is_first, self._first = self._first is None, self._first or (step, now)
        seconds = values["seconds"]
        self._seconds += seconds
        self._tokens += seconds * values.get("speed/tokens_per_second", 0.0)
        self._busy += seconds * values.get("speed/share_of_peak", 0.0)
        if self._bar is not None:
            self._bar.update(step, values)
        is_skipped = bool(values.get("optimizer/skipped"))
        if not (is_first or is_skipped or step == self._total or step % self._every == 0):
            return
        numbers = self._numbers(step, values, now) | {"skipped": 1 if is_skipped else None}
        line = self._line("step", step, numbers)
        if self._bar is None:
            print(line, flush=True)
        self._file.add(line)
        self._seconds = self._tokens = self._busy = 0.0

    def sync(self) -> None:
        """Makes the lines durable. Raises StorageError."""
        self._file.sync()

    def close(self, what: str, step: int, values: Mapping[str, Any]) -> None:
        """The last line, also where the file takes none any more; the bar stays as it is."""
        if self._bar is not None:
            self._bar.close()
        with contextlib.suppress(StorageError):
            self.event(what, step, values)
        self._file.close()

    def _line(self, what: str, step: int, values: Mapping[str, Any]) -> str:
        # Of one width wherever it is written; the offset says which hour it was.
        when = datetime.now().astimezone().isoformat(timespec="seconds")
        pairs = (f" {name} {_shown(value)}" for name, value in values.items() if value is not None)
        at = f"step {step}/{self._total}"
        return f"{when} {at if what == 'step' else f'{what} {at}'}{''.join(pairs)}"

    def _numbers(self, step: int, values: Mapping[str, Any], now: float) -> dict[str, Any]:
        numbers: dict[str, Any] = {
            "loss": f"{values['loss']:.4f}",
            "grad_norm": f"{values['grad_norm']:#.3g}",
            "lr": f"{values['lr']:.2e}",
        }
        if self._tokens:
            speed = self._tokens / self._seconds
            each = "gpu" if "memory/gpu_peak_gib" in values else "rank"
            numbers |= {"tokens/s": f"{speed:.0f}", f"tokens/s/{each}": f"{speed / self._ranks:.0f}"}
        if self._has_peak:
            numbers["mfu"] = f"{self._busy / self._seconds:.3f}"
        if (memory := values.get("memory/gpu_peak_gib")) is not None:
            numbers["gpu_gib"] = f"{memory:.1f}"
        assert self._first is not None, "step sets it"
        if done := step - self._first[0]:
            numbers["left"] = duration((self._total - step) * (now - self._first[1]) / done)
        return numbers


def duration(seconds: float) -> str:
    """Seconds as the two largest of days, hours, minutes and seconds: 3d04h, 5m09s, 42s."""
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"


def rounded(seconds: float) -> str:
    """Seconds to the hundredth."""
    return f"{seconds:.2f}"


def _shown(value: Any) -> str:
    """A value as one word."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}"
    text = str(value)
    if _PLAIN.fullmatch(text):
        return text
    # As Python and JSON write it; a message of several lines stays on one.
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(char if char.isprintable() else repr(char)[1:-1] for char in escaped) + '"'


def _is_torn(path: Path) -> bool:
    """Whether a kill left a line without its end."""
    try:
        if not path.is_file() or not path.stat().st_size:
            return False
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:
        # A log that is not read can still be written, or says by itself why not.
        return False
