"""What people look at: progress, the result table, the loss plot."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from train.track.report import centred_mean, plot_losses, print_table


def line_of(step: int, **changed: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 5 / step,
        "lr": 1e-3 / step,
        "grad_norm": 1.0 / step,
        "seconds": 0.1,
    } | changed


def pixels(path: Path) -> np.ndarray:
    image = imread(path)
    assert image.ndim == 3
    return image


@pytest.mark.parametrize("count", [0, 1, 2, 300])
def test_runs_of_any_length_have_a_plot(tmp_path: Path, count: int) -> None:
    metrics = [line_of(step) for step in range(1, count + 1)]
    evaluations = [{"step": step, "loss": 4 / step, "targets": 9} for step in range(20, count, 20)]
    evaluations.append({"step": count, "loss": 0.1, "targets": 90})
    plot_losses(metrics, evaluations, tmp_path / "loss.png")
    assert pixels(tmp_path / "loss.png").shape[:2] == (780, 1080)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_numbers_that_were_not_finite_are_marked_and_do_not_stop_the_plot(tmp_path: Path) -> None:
    def has_mark(path: Path) -> bool:
        red, green, blue = np.moveaxis(pixels(path)[..., :3], -1, 0)
        return bool(((red > 0.55) & (green < 0.15) & (blue < 0.15)).any())

    metrics = [line_of(step) for step in range(1, 200)]
    plot_losses(metrics, [], tmp_path / "good.png")
    metrics[100] |= {"loss": None, "grad_norm": None}
    plot_losses(metrics, [{"step": 50, "loss": None, "targets": 9}], tmp_path / "bad.png")
    assert not has_mark(tmp_path / "good.png")
    assert has_mark(tmp_path / "bad.png")


def test_zero_gradients_do_not_stop_the_plot(tmp_path: Path) -> None:
    plot_losses([line_of(step, grad_norm=0.0) for step in (1, 2, 3)], [], tmp_path / "loss.png")
    assert pixels(tmp_path / "loss.png").size


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.integers(0, 50))
def test_the_mean_is_that_of_equally_many_neighbours(values: list[float], window: int) -> None:
    array = np.array(values)
    found = centred_mean(array, window)
    for index in range(len(values)):
        reach = min(window, index, len(values) - 1 - index)
        assert found[index] == pytest.approx(array[index - reach : index + reach + 1].mean(), abs=1e-9)


def test_the_mean_of_a_line_is_the_line() -> None:
    line = np.linspace(10, 2, 101)
    assert np.allclose(centred_mean(line, 9), line, rtol=0, atol=1e-12)


def test_a_result_table_shows_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("Result", {"steps": "100", "held-out loss (nats per token)": "2.345"})
    printed = capsys.readouterr().out
    assert "Result" in printed
    assert "held-out loss (nats per token)" in printed
    assert "2.345" in printed
