"""How long before its end a job asks a run to save, from what its steps and saves took."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from train.loop import notice


def test_the_notice_covers_the_longest_step_and_save_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, nothing = 0.0, Any
    monkeypatch.setattr(notice, "time", SimpleNamespace(monotonic=lambda: now))
    hook = notice.Notice(tmp_path)
    written = tmp_path / "NOTICE"
    written.write_text("999\n")
    # Seconds of a step and of the save behind it, and what stands in the file then.
    for step, save, expected in (
        # The first step compiles: 2 * 40 + 60.
        (500.0, 40.0, 140),
        # 2 * (25.5 + 40) + 60
        (25.5, None, 140),
        (10.0, 3.0, 191),
        # 2 * (25.5 + 50.2) + 60 = 211.4
        (1.0, 50.2, 212),
        (1.0, 1.0, 212),
    ):
        hook.before_data(nothing)
        now += step
        hook.after_step(nothing, nothing)
        if save is not None:
            now += save
            hook.after_save(nothing, nothing)
        assert int(written.read_text()) == expected
