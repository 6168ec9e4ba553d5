"""How far a run is: a bar on a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Mapping
from typing import Any

_LINE_SECONDS = 10.0


class Progress:
    """Shows steps, loss, learning rate, speed and time left; closed at the end."""

    def __init__(self, total_steps: int) -> None:
        self._total, self._bar, self._task = total_steps, None, None
        self._last_line = 0.0
        self._first: tuple[int, float] | None = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns)
            self._task = self._bar.add_task("training", total=total_steps, text="")
            self._bar.start()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the numbers of a step that is done."""
        now = time.monotonic()
        self._first = self._first or (step, now)
        text = f"loss {values['loss']:.3f}  lr {values['lr']:.2e}"
        speed = values.get("speed/tokens_per_second")
        if speed is not None:
            text += f"  {speed:,.0f} tokens/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif step == self._first[0] or step == self._total or now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            print(f"step {step}/{self._total}  {text}{self._left(step, now)}", flush=True)

    def _left(self, step: int, now: float) -> str:
        assert self._first is not None, "update sets it"
        done, since = step - self._first[0], now - self._first[1]
        if not done:
            return ""
        return f"  {(self._total - step) * since / done:,.0f} s left"

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()
