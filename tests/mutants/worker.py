"""A process that has imported torch and pytest, and forks itself for each set of tests.

It runs in a copy of the tree and never imports the project: each fork does so anew, as the copy then is.
One JSON line of input is a job, one of output its outcome.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import hypothesis
import pytest


class Failures:
    """A plugin of pytest that keeps which tests failed, and which files could not be collected."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.uncollected: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        """A failure is enough: nobody reads the smallest example of it, which takes long to find."""
        found = hypothesis.settings.default
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile("mutants", found, phases=phases)
        hypothesis.settings.load_profile("mutants")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a test that failed, in its set-up or after it too."""
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep a file that could not be imported."""
        if report.failed:
            self.uncollected.append(report.nodeid)


def main() -> None:
    """Import the modules named as arguments, then answer jobs until the input ends."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(_outcome(job)), flush=True)


def _outcome(job: dict[str, Any]) -> dict[str, Any]:
    # By fork, so that what is imported above is there; each fork has a session of its own to be ended by.
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(job, writer))
    process.start()
    writer.close()
    try:
        if not reader.poll(job["seconds"]):
            return {"exit": None, "failed": [], "uncollected": []}
        return reader.recv()
    except EOFError:
        process.join()
        return {"exit": process.exitcode, "failed": [], "uncollected": []}
    finally:
        # Processes that a test left behind go too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or -1, signal.SIGKILL)
        process.kill()
        process.join()


def _run(job: dict[str, Any], writer: Connection) -> None:
    os.setsid()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    failures = Failures()
    status = pytest.main([*job["arguments"], *job["tests"]], plugins=[failures])
    sys.stdout.flush()
    writer.send({"exit": int(status), "failed": failures.failed, "uncollected": failures.uncollected})
    os._exit(0)


if __name__ == "__main__":
    main()
