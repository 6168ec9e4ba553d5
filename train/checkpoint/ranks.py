"""Work that every rank does and whose outcome every rank learns, so that no rank waits for a failed one."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist

from conf.errors import CheckpointError, StorageError, as_storage_error
from train.checkpoint.transient import FULL


class Ranks(NamedTuple):
    """This process among `size` of them; a group of one needs no torch.distributed.

    group has all ranks; None is the default one.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None = None

    def together(self, action: str, work: Callable[[], Any]) -> list[Any]:
        """Run `work` here and return what it returned on every rank, by rank. Collective.

        What `work` returns must be JSON-able. `action` starts the message of a failure.

        Raises on every rank when it raised on any: StorageError if a rank could not write,
        CheckpointError if a rank could not use a checkpoint, else RuntimeError.
        """
        failure: Exception | None = None
        value: Any = None
        try:
            value = work()
        except Exception as error:
            failure = error
        reports = self._gather({"value": value, "failure": None if failure is None else _described(failure)})
        failed = [(rank, *report["failure"]) for rank, report in enumerate(reports) if report["failure"]]
        if not failed:
            return [report["value"] for report in reports]
        for name, kind in _KINDS.items():
            messages = [self._message(rank, text) for rank, found, text in failed if found == name]
            if messages:
                raise kind(f"{action}: {'; '.join(messages)}") from failure
        raise AssertionError(f"{failed=}")

    def on_first(self, action: str, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 and return its JSON-able result on every rank. Collective.

        Raises on every rank as `together` does.
        """
        return self.together(action, work if self.rank == 0 else _nothing)[0]

    def _gather(self, report: dict[str, Any]) -> list[dict[str, Any]]:
        # Text, so that nothing but a string is ever unpickled from a peer.
        text = json.dumps(report)
        texts: list[Any] = [text]
        if self.size > 1:
            texts = [None] * self.size
            dist.all_gather_object(texts, text, group=self.group)
        return [json.loads(text) for text in texts]

    def _message(self, rank: int, text: str) -> str:
        return text if self.size == 1 else f"rank {rank}: {text}"


class PeerFailed(Exception):
    """This rank is well, but the work needed another rank that failed and reports the cause itself."""


# In the order in which a mixture of failures is judged.
_KINDS: dict[str, type[Exception]] = {
    "storage": StorageError,
    "checkpoint": CheckpointError,
    "bug": RuntimeError,
    "peer": RuntimeError,
}


def _described(error: Exception) -> tuple[str, str]:
    if isinstance(error, StorageError):
        return "storage", str(error)
    if isinstance(error, OSError):
        action = "write" if error.errno in FULL else "read or write"
        return "storage", str(as_storage_error(error, error.filename or "a file in it", action))
    if isinstance(error, CheckpointError):
        return "checkpoint", str(error)
    return "peer" if isinstance(error, PeerFailed) else "bug", f"{type(error).__name__}: {error}"


def _nothing() -> None:
    return None
