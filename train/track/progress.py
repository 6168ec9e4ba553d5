"""How far a run is, as a bar on a terminal."""

from collections.abc import Mapping
from typing import Any


class Progress:
    """Shows steps, loss, learning rate, speed and time left; closed at the end."""

    def __init__(self, total_steps: int) -> None:
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
        text = f"loss {values['loss']:.3f}  lr {values['lr']:.2e}"
        speed = values.get("speed/tokens_per_second")
        if speed is not None:
            text += f"  {speed:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, text=text)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()
