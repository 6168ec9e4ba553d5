"""The process that talks to Weights & Biases for a run: JSON lines in, nothing out but one line on trouble.

Started by `WandbSink` as a script. It imports nothing of ours, so that it starts fast, and it may hang
or die at any point: the run does not notice.
"""

import contextlib
import glob
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

# Tells the sink that the reason was printed already.
EXPLAINED = 3
# For the records of one start, which may be those of months.
_READ_SECONDS = 120


def main() -> int:
    """Follow the lines of standard input to their end: settings, then steps, then how the run ended."""
    # Signals that ask a job to save and leave are for the run; this process leaves after it.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    settings = json.loads(sys.stdin.readline())
    threading.Thread(target=_outlive, args=(settings["timeout_seconds"],), daemon=True).start()
    try:
        run = _start(settings)
        recorded = _Recorded(_last_values(settings, run))
        # An end without a word is that of a killed run.
        exit_code = 1
        for line in sys.stdin:
            message = json.loads(line)
            if "exit_code" in message:
                exit_code = message["exit_code"]
                break
            if recorded.takes(message):
                run.log(recorded.marked(_shown(message["log"])))
        run.finish(exit_code=exit_code)
    except (Exception, SystemExit) as error:
        _say(f"off: {_first_line(error)}; metrics.jsonl goes on")
        return EXPLAINED
    return 0


def _start(settings: Mapping[str, Any]) -> Any:
    if settings["mode"] == "online":
        try:
            return _open(settings, "online")
        except Exception as error:
            path = os.path.join(settings["directory"], "wandb")
            _say(f"not online: {_first_line(error)}; recording in {path} for a later `wandb sync`")
            _forget()
    return _open(settings, "offline")


def _forget() -> None:
    """Make wandb start anew: its service still holds the run that could not be opened, and may hang."""
    import psutil
    import wandb

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    # It asks this process to exit with the status of the service that was just killed.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def _open(settings: Mapping[str, Any], mode: str) -> Any:
    import wandb

    options = {
        "console": "off",
        "silent": True,
        "init_timeout": settings["timeout_seconds"],
        # What is told of the start is in the config; the environment may hold secrets.
        "x_disable_meta": True,
        # Utilisation is that of the training process, not of this one.
        "x_stats_pid": settings["pid"],
        # The default of 15 s would lose the header of a run that is killed early.
        "x_transaction_log_flush_interval": 1.0,
    }
    known = {name: value for name, value in options.items() if name in wandb.Settings.model_fields}
    run = wandb.init(
        mode=mode,  # type: ignore[arg-type]
        project=settings["project"],
        entity=settings["entity"],
        name=settings["name"],
        group=settings["group"],
        tags=settings["tags"],
        id=settings["run_id"],
        resume="allow",
        dir=settings["directory"],
        config=settings["config"],
        settings=wandb.Settings(**known),
    )
    # Steps come from the run, so that a restart draws on in the same curves.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


class _Recorded:
    """Up to which steps the starts of a run recorded lines, by kind: what is done again stands once."""

    def __init__(self, last: Mapping[str, Any]) -> None:
        # The step itself counts lines of training; those of other kinds have a hidden value beside them.
        self._steps = {
            name: int(value)
            for name, value in last.items()
            if name == "step" or (name.startswith("_") and name.endswith("_step") and name != "_step")
        }
        self._carried = {name: step for name, step in self._steps.items() if name != "step"}

    def takes(self, message: dict[str, Any]) -> bool:
        """Whether the line of a message is new; notes it then."""
        name = f"_{message['kind']}_step" if message["kind"] else "step"
        step = message["log"]["step"]
        if step <= self._steps.get(name, -1):
            return False
        self._steps[name] = step
        if message["kind"]:
            self._carried[name] = step
        return True

    def marked(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values, with the steps of other kinds that the last values must have."""
        carried, self._carried = self._carried, {}
        return {**carried, **values}


def _last_values(settings: Mapping[str, Any], run: Any) -> Mapping[str, Any]:
    """The last value of each name that earlier starts of the run recorded."""
    if not run.offline:
        # What the server has of a run that goes on.
        return dict(run.summary.items())
    directory = os.path.join(settings["directory"], "wandb")
    own = os.path.basename(os.path.dirname(run.dir))
    found = glob.glob(f"*run-*-{settings['run_id']}/run-*.wandb", root_dir=directory)
    # The newest start first: each records only what is beyond those before it.
    for name in sorted(found, key=lambda name: name.partition("run-")[2], reverse=True):
        log = os.path.join(directory, name)
        is_other = os.path.dirname(name) != own and os.path.getsize(log) > 0
        summary = _summary(log) if is_other else {}
        if "step" in summary:
            return summary
    return {}


def _summary(log: str) -> dict[str, Any]:
    """The last values in the records of one start, as wandb's own reader finds them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", log]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=_READ_SECONDS)
        return json.loads(done.stdout)["summary"]
    except (OSError, ValueError, LookupError, subprocess.SubprocessError) as error:
        _say(f"cannot read {log} ({_first_line(error)}); steps of it that are done again stand twice")
        return {}


def _shown(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as wandb takes them: pictures, histograms and tables of those that train.track.panels made."""
    shown: dict[str, Any] = {}
    for name, value in values.items():
        kind = value["shown_as"] if isinstance(value, dict) else None
        if kind == "heat_map":
            shown |= {name: _picture(value["rows"]), f"{name}_histogram": _histogram(value["rows"])}
        elif kind == "table":
            import wandb

            shown[name] = wandb.Table(columns=value["columns"], data=value["rows"])
        else:
            shown[name] = value
    return shown


def _histogram(rows: list[list[float]]) -> Any:
    import wandb

    return wandb.Histogram([value for row in rows for value in row])


def _picture(rows: list[list[float]]) -> Any:
    """Layers from top to bottom, experts from left to right, each layer's mean 1."""
    import io

    import wandb
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from PIL import Image

    figure = Figure(figsize=(10, 1.5 + 0.15 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.add_subplot()
    # One scale for all steps, as far as the load allows.
    highest = max(2.0, *(value for row in rows for value in row))
    drawn = panel.imshow(rows, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=highest)
    panel.set(xlabel="expert", ylabel="layer with experts")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(drawn, label="tokens over the layer's mean")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return wandb.Image(Image.open(buffer))


def _outlive(seconds: float) -> None:
    """End this process and wandb's own, at most `seconds` after the run was killed."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(seconds)
    os.killpg(0, signal.SIGKILL)


def _say(text: str) -> None:
    print(f"wandb: {text}", flush=True)


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines and lines[0] else type(error).__name__


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Not through wandb's exit hook: all is recorded or sent, and the hook may wait for a silent server.
    os._exit(code)
