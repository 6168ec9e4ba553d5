"""The process that talks to Weights & Biases for a run: JSON lines in, nothing out but one line on trouble.

Started by `WandbSink` as a script. It imports nothing of ours, so that it starts fast, and it may hang
or die at any point: the run does not notice.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

# Tells the sink that the reason was printed already.
EXPLAINED = 3


def main() -> int:
    """Follow the lines of standard input to their end: settings, then steps, then how the run ended."""
    # Signals that ask a job to save and leave are for the run; this process leaves after it.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    settings = json.loads(sys.stdin.readline())
    threading.Thread(target=_outlive, args=(settings["timeout_seconds"],), daemon=True).start()
    try:
        run = _start(settings)
        # An end without a word is that of a killed run.
        exit_code = 1
        for line in sys.stdin:
            message = json.loads(line)
            if "exit_code" in message:
                exit_code = message["exit_code"]
                break
            run.log(message["log"])
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
        # The command line and the environment of a run are not Weights & Biases' business.
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
