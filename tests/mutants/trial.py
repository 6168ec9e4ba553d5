"""A copy of the tree in which one defect at a time is tried."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from tests.mutants.defects import FOLDERS, Defect

# What most tests import, of other people alone: the project is imported anew for each defect.
HEAVY = (
    "hydra",
    "jaxtyping",
    "matplotlib.figure",
    "numpy",
    "pydantic",
    "rich.progress",
    "safetensors.torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor",
    "torch.nn.attention.flex_attention",
    "torch.utils.flop_counter",
    "transformers.modeling_utils",
    "triton.language",
    "triton.runtime.interpreter",
)

# What tests read of the tree, beside its code.
COPIED = (*FOLDERS, "tests", "bench", "docs", ".ci")
LEFT_OUT = shutil.ignore_patterns("runs", "corpora", "*.egg-info", ".*_cache")


@dataclass(frozen=True)
class Outcome:
    """What became of one defect."""

    defect: Defect
    verdict: str  # caught, timed out, lived or broken
    seconds: float
    failed: tuple[str, ...] = ()  # tests that noticed
    log: str = ""  # the end of what pytest wrote, where the verdict is broken


class Trials:
    """A copy of `tree` in a temporary directory, with a process that runs tests in it."""

    def __init__(self, tree: Path, *, interpreted: bool = False, heavy: Sequence[str] = HEAVY) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mutants-")
        self._copy = Path(self._folder.name) / "tree"
        self._log = Path(self._folder.name) / "log"
        self._marks = "interpreted and not prove" if interpreted else "not (interpreted or prove or equality)"
        self._changes = 0
        copy_tree(tree, self._copy)
        # As `make test` and `make prove` have it.
        ours = ("TRITON_INTERPRET", "OMP_NUM_THREADS", "PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")
        environment = {key: value for key, value in os.environ.items() if key not in ours}
        if interpreted:
            environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self._worker = subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.worker", *heavy],
            cwd=self._copy,
            env=environment | {"PYTHONNOUSERSITE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The end of its input ends the worker; one that waits for a test is stopped.
        self._worker.terminate()
        self._worker.communicate()
        self._folder.cleanup()

    def attempt(self, defect: Defect, seconds: float) -> Outcome:
        """What the tests of `defect` say when it is in the tree, in at most `seconds`."""
        path = self._copy / defect.file
        text, before = path.read_text(), path.stat()
        changed = defect.text(self._copy)
        self._changes += 1
        began = time.monotonic()
        try:
            path.write_text(changed)
            # Compiled modules are known by whole seconds and size, which may both be those of another change.
            moment = before.st_mtime_ns + self._changes * 10**9
            os.utime(path, ns=(moment, moment))
            found = self._ask(defect.tests, seconds, "-x")
        finally:
            path.write_text(text)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        verdict = _verdict(found)
        log = self._log.read_text()[-1000:] if verdict == "broken" else ""
        return Outcome(defect, verdict, time.monotonic() - began, tuple(found["failed"]), log)

    def failing(self, tests: Sequence[str], seconds: float) -> list[str]:
        """Those of `tests` that do not pass in the tree as it is."""
        found = self._ask(tests, seconds)
        if found["exit"] not in (0, 1):
            return list(tests)
        return [*found["failed"], *found["uncollected"]]

    def _ask(self, tests: Sequence[str], seconds: float, *more: str) -> dict[str, Any]:
        # Its plugins are imported before it: nobody reads the assertions in them.
        warnings = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        # A folder of its own: the common one is swept by every pytest that ends on this machine.
        own = f"--basetemp={self._folder.name}/tmp"
        arguments = ["-q", "-p", "no:cacheprovider", own, *warnings, "-m", self._marks, *more]
        job = {"tests": list(tests), "arguments": arguments, "seconds": seconds, "log": str(self._log)}
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        self._worker.stdin.write(json.dumps(job) + "\n")
        self._worker.stdin.flush()
        answer = self._worker.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that runs tests ended with {self._worker.wait()}")
        return json.loads(answer)


def attempt_all(
    defects: Sequence[Defect],
    tree: Path,
    *,
    workers: int = 1,
    seconds: float = 180.0,
    heavy: Sequence[str] = HEAVY,
) -> list[Outcome]:
    """What became of each defect, with a line printed as each is known.

    One that was noticed is `unproven` where the test that failed also fails without the defect, or where its
    tests need more than `seconds` without it too.
    """
    outcomes: list[Outcome] = []
    for interpreted in (False, True):
        part = [defect for defect in defects if defect.interpreted == interpreted]
        with ExitStack() as stack:
            free: SimpleQueue[Trials] = SimpleQueue()
            for _ in range(min(workers, len(part))):
                free.put(stack.enter_context(Trials(tree, interpreted=interpreted, heavy=heavy)))
            if part:
                outcomes += _attempt_with(free, part, seconds)
    return outcomes


def _attempt_with(free: "SimpleQueue[Trials]", defects: Sequence[Defect], seconds: float) -> list[Outcome]:
    def attempt(defect: Defect) -> Outcome:
        trials = free.get()
        try:
            return trials.attempt(defect, seconds)
        finally:
            free.put(trials)

    pool = ThreadPoolExecutor(free.qsize())
    try:
        outcomes = list(_printed(pool.map(attempt, defects), len(defects)))
    finally:
        pool.shutdown(cancel_futures=True)
    noticed = sorted({test for outcome in outcomes for test in outcome.failed})
    trials = free.get()
    wrong = trials.failing(noticed, 60.0 + 30.0 * len(noticed)) if noticed else []

    def is_proven(outcome: Outcome) -> bool:
        if outcome.verdict == "timed out":
            return not trials.failing(outcome.defect.tests, seconds)
        return not {*outcome.failed} & {*wrong}

    return [outcome if is_proven(outcome) else replace(outcome, verdict="unproven") for outcome in outcomes]


def _printed(outcomes: Iterator[Outcome], count: int) -> Iterator[Outcome]:
    for number, outcome in enumerate(outcomes, 1):
        line = f"[{number}/{count}] {outcome.verdict:9} {outcome.seconds:5.1f} s  {outcome.defect.name}"
        print(line if not outcome.failed else f"{line}  {outcome.failed[0]}", flush=True)
        if outcome.log:
            print(outcome.log, flush=True)
        yield outcome


def copy_tree(tree: Path, target: Path) -> None:
    """Copy what tests read of `tree`, with the times of files, so that compiled modules stay true."""
    target.mkdir()
    for path in tree.iterdir():
        if path.is_file():
            shutil.copy2(path, target)
        elif path.name in COPIED:
            shutil.copytree(path, target / path.name, ignore=LEFT_OUT)
    # The job script starts the Python of its tree.
    (target / ".venv").symlink_to(tree / ".venv")


def _verdict(found: dict[str, Any]) -> str:
    if found["exit"] is None:
        return "timed out"
    if found["exit"] == 0:
        return "lived"
    # A file that cannot be imported says nothing of its tests; nor does a test that is not there.
    return "caught" if found["failed"] else "broken"
