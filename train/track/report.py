"""Tables and the loss plot of a run."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.checkpoint.atomic import write_atomically


def print_table(title: str, rows: Mapping[str, str | Sequence[str]], head: Sequence[str] = ()) -> None:
    """Prints columns under a title, two where the values are not several; head names the columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=bool(head), title_justify="left")
    names = head or ("", "")
    table.add_column(names[0], no_wrap=True)
    for name in names[1:]:
        table.add_column(name, overflow="fold")
    for name, value in rows.items():
        table.add_row(name, *([value] if isinstance(value, str) else value))
    Console().print(table)


def plot_losses(
    metrics: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], path: Path
) -> None:
    """Writes the plot: training loss with its centred mean, held-out loss, learning rate, gradient norm.

    Both take lines with `step` and `loss`, metrics `lr` and `grad_norm` too, evaluations `targets`; null is
    a number that was not finite, and is marked. Raises StorageError.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(2.2, 1))
    loss = figure.add_subplot(grid[0, :])
    _plot_loss(loss, metrics, evaluations)
    rate = figure.add_subplot(grid[1, 0])
    rate.plot(*_series(metrics, "lr"), color="#525252", linewidth=1)
    rate.set(xlabel="step", ylabel="learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    norm = figure.add_subplot(grid[1, 1])
    steps, norms = _series(metrics, "grad_norm")
    norm.plot(steps, norms, color="#525252", linewidth=0.7)
    norm.set(xlabel="step", ylabel="gradient norm, log scale")
    if np.any(norms > 0):
        norm.set_yscale("log")
    for panel in (loss, rate, norm):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.set_major_locator(MaxNLocator(8 if panel is loss else 5, integer=True))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def _plot_loss(
    panel: Any, metrics: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> None:
    steps, losses = _series(metrics, "loss")
    is_finite = np.isfinite(losses)
    # A single step is a dot: a line needs two.
    single = "." if is_finite.sum() == 1 else None
    panel.plot(steps, losses, color="#9ecae1", linewidth=0.8, marker=single, label="training, each step")
    window = len(losses) // 40
    if window > 1:
        label = f"training, mean of about {2 * window + 1} steps"
        means = centred_mean(losses[is_finite], window)
        panel.plot(steps[is_finite], means, color="#08519c", linewidth=1.6, label=label)
    if not is_finite.all():
        bad = steps[~is_finite]
        at_bottom = panel.get_xaxis_transform()
        label = "training, not finite"
        panel.plot(
            bad, np.zeros(len(bad)), "x", color="#a50f15", transform=at_bottom, clip_on=False, label=label
        )
    _plot_held_out(panel, evaluations)
    panel.set(xlabel="step", ylabel="loss (nats per token)")
    panel.legend(frameon=False)


def _plot_held_out(panel: Any, evaluations: Sequence[Mapping[str, Any]]) -> None:
    # A score over fewer windows is not on the same line as one over all.
    largest = max((line["targets"] for line in evaluations), default=0)
    parts = {
        "part of the held-out documents": ("o-", [e for e in evaluations if e["targets"] < largest]),
        "all held-out documents": ("D-", [e for e in evaluations if e["targets"] == largest]),
    }
    for color, (label, (style, lines)) in zip(("#fdae6b", "#d94801"), parts.items(), strict=True):
        points, values = _series(lines, "loss")
        if not len(points):
            continue
        panel.plot(points, values, style, color=color, markersize=4, linewidth=1.2, label=label)
        if lines[-1] is evaluations[-1] and np.isfinite(values[-1]):
            style = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
            panel.annotate(f"{values[-1]:.3f}", (points[-1], values[-1]), color=color, **style)


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    steps = np.array([line["step"] for line in lines], dtype=np.int64)
    return steps, np.array([np.nan if line[name] is None else line[name] for line in lines], dtype=np.float64)


def centred_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over `window` values on either side and the value itself, fewer near the ends, always as many
    before as after: a curve that falls evenly is its own mean, without the lag of a running one.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, len(values) - 1 - index), window)
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
