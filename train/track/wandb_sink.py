"""Weights & Biases beside a run: it may lose lines, never hold up or stop the run."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.track import wandb_process
from train.track.config import TrackConfig

_QUEUED_LINES = 1000


class WandbSink:
    """Sends numbers from another process; construction and `log` return at once.

    Online, an unreachable or silent server makes the run record itself offline; any other failure
    turns the sink off. Both print one line. The run keeps `run_id` over restarts. Lines that arrive
    while wandb is slow are queued, the oldest dropped and counted in `dropped`. Everything in
    `run_config` is sent, so it must hold no secrets. `command` is the process that is fed.
    """

    def __init__(
        self,
        config: TrackConfig,
        directory: Path,
        run_id: str,
        run_config: Mapping[str, Any],
        *,
        command: Sequence[str] = (sys.executable, wandb_process.__file__),
    ) -> None:
        self.dropped = 0
        self._timeout_seconds = config.timeout_seconds
        self._offline_dir = directory / "wandb" if config.wandb == "offline" else None
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(_QUEUED_LINES)
        self._is_off = False
        self._process: subprocess.Popen[bytes] | None = None
        settings = {
            "mode": config.wandb,
            "project": config.project,
            "entity": config.entity,
            "name": config.name,
            "group": config.group,
            "tags": list(config.tags),
            "timeout_seconds": config.timeout_seconds,
            "run_id": run_id,
            "directory": str(directory),
            "config": dict(run_config),
            "pid": os.getpid(),
        }
        try:
            # A session of its own: Ctrl-C is for the run, and all that wandb starts ends together.
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            self._turn_off(f"cannot start its process: {error}")
            return
        # A daemon: a process that is done does not wait for a pipe that is not read.
        self._thread = threading.Thread(
            target=self._feed, args=(self._process, settings), name="wandb", daemon=True
        )
        self._thread.start()

    def log(self, values: Mapping[str, Any], kind: str = "") -> None:
        """Queue one line; returns at once.

        Values are numbers, or those of train.track.panels. A line of a step up to which another start of the
        run recorded lines of its kind is left out: steps that are done again stand once.
        """
        while not self._is_off:
            try:
                self._lines.put_nowait({"log": dict(values), "kind": kind})
                return
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._lines.get_nowait()
                    self.dropped += 1

    def close(self, *, is_failed: bool = False) -> None:
        """Wait for what is queued, at most the configured seconds, then end all that wandb runs.

        `is_failed` marks the run as failed.
        """
        if self._process is None:
            return
        deadline = time.monotonic() + self._timeout_seconds
        for line in ({"exit_code": int(is_failed)}, None):
            with contextlib.suppress(queue.Full):
                self._lines.put(line, timeout=max(0.0, deadline - time.monotonic()))
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._turn_off(f"not finished after {self._timeout_seconds:g} s")
        # Also after an orderly end: wandb's own processes must not outlive the run.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        if self._offline_dir is not None and not self._is_off:
            at = self._offline_dir
            print(
                f"wandb: recorded in {at}: `wandb leet {at}` draws it, `wandb sync {at}` sends it", flush=True
            )
        if self.dropped:
            print(f"wandb: {self.dropped} lines dropped; metrics.jsonl has all of them", flush=True)

    def _feed(self, process: subprocess.Popen[bytes], settings: Mapping[str, Any]) -> None:
        # Whatever goes wrong here must end here: training does not depend on it.
        try:
            assert process.stdin is not None, "it was opened as a pipe"
            with process.stdin as pipe:
                message: Mapping[str, Any] | None = settings
                while message is not None:
                    pipe.write(json.dumps(message, default=str).encode() + b"\n")
                    pipe.flush()
                    message = self._lines.get()
        except OSError:
            code = process.wait()
            self._turn_off(None if code == wandb_process.EXPLAINED else f"its process ended with code {code}")
        except Exception as error:
            self._turn_off(f"{type(error).__name__}: {error}")

    def _turn_off(self, reason: str | None) -> None:
        if not self._is_off:
            self._is_off = True
            if reason is not None:
                print(f"wandb: off: {reason}; metrics.jsonl goes on", flush=True)
