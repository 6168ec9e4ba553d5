"""Ranks that end or hang while others wait for them: who it was, said by every rank that is left."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from conf.errors import PeerError, leave
from parallel.config.degrees import ORDER, Degrees, coordinates
from parallel.mesh.progress import UNKNOWN, Progress, leave_record, waits_for
from parallel.mesh.rendezvous import host_of, process_of

# What the libraries beneath say when a peer is the cause; torch has no type for it.
_OF_PEERS = ("gloo/transport", "Application timeout caused pair closure", "ncclRemoteError")
_CLOSED = ("closed by peer", "reset by peer", "ncclRemoteError")


# Seconds that it takes at most to find out and say who it was, once a rank gave up waiting.
_VERDICT = 14.0


def patience(deadline: float) -> float:
    """Seconds that a rank may wait for another so that all have ended by the deadline, one of 28 s or more.

    With a shorter one they end at most 14 s after half of it.
    """
    return max(deadline - _VERDICT, deadline / 2)


class Verdict(NamedTuple):
    """Which ranks are the cause and why, in words, and their machine where it is one and to blame."""

    said: str
    lost: str | None = None


class Heartbeat:
    """A thread that sends this rank's heartbeat, and learns which other rank has none.

    Rank 0 judges, from what ranks report and from who has fallen silent; the others read what it found, and
    watch rank 0's heartbeat. Once there is a verdict this process has a moment to end by itself, then it is
    ended: a thread that waits in a collective cannot be interrupted. timeout is in seconds. Into the folder
    `record` each rank then writes where its threads are and which collectives it called. own is a second
    connection to the store.
    """

    def __init__(
        self,
        store: TCPStore,
        own: TCPStore,
        rank: int,
        degrees: Degrees,
        timeout: float,
        progress: Progress,
        record: Path | None = None,
    ) -> None:
        self._progress, self._record = progress, record
        self.rank, self.size, self.degrees, self.timeout = rank, degrees.size, degrees, timeout
        self.interval = min(1.0, timeout / 5)
        # Silence that counts once something is known to be wrong.
        self.silence = max(3 * self.interval, 1.0)
        # Two connections: what one thread waits for must not hold up the other.
        self._store, self._own = store, own
        store.set(f"beat/{rank}", json.dumps([0, progress.said()]))
        self._verdict: str | None = None
        self._is_known, self._is_over = threading.Event(), threading.Event()
        self._heard = {peer: (b"", time.monotonic()) for peer in self._peers()}
        self._failure_seen: float | None = None
        self._has_told = False
        # Asked for while it can be: rank 0 takes the store with it.
        self._first_host = host_of(store, 0)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begins to beat. Every rank must have begun before any thread looks at others."""
        self._thread.start()

    @contextmanager
    def bounded(self, error: BaseException) -> Iterator[None]:
        """Ends the process where the block, which asks the store, waits for it in vain."""
        limit = 2 * self.silence + 8 * self.interval

        def give_up() -> None:
            found = Verdict(f"{self._described(0)} hangs: {error}", self._first_host)
            leave(PeerError(f"rank {self.rank}: {self._with_record(found)}"))

        timer = threading.Timer(limit, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def stop(self) -> None:
        """Ends the thread."""
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join(2 * self.interval)

    def report(self, error: BaseException, *, is_of_peer: bool) -> None:
        """Tells the others what ended this rank."""
        said = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        with suppress(dist.DistError):
            self._store.set(f"failed/{self.rank}", json.dumps([is_of_peer, said]))
            self._store.add("failures", 1)
            if not is_of_peer:
                # It knows the cause and reads no verdict.
                self._store.add("heard", int(self.rank > 0))

    def verdict(self) -> str | None:
        """Which rank is the cause, None where that is not found in time."""
        self._is_known.wait(self.silence + 4 * self.interval)
        return self._verdict

    def linger(self) -> None:
        """Keeps the store alive until the others have read the verdict, at most for a moment."""
        deadline = time.monotonic() + self.silence + 2 * self.interval
        with suppress(dist.DistError):
            while self.rank == 0 and time.monotonic() < deadline:
                if self._store.add("heard", 0) >= self.size - 1:
                    return
                time.sleep(self.interval / 4)

    def _peers(self) -> range:
        return range(1, self.size) if self.rank == 0 else range(1)

    def _run(self) -> None:
        beat = 0
        while not self._is_over.wait(self.interval):
            beat += 1
            try:
                self._own.set(f"beat/{self.rank}", json.dumps([beat, self._progress.said()]))
                found = self._judged() if self.rank == 0 else self._read()
            except dist.DistError:
                said = f"{self._named(0)} ended, or its machine is gone: the connection to it is lost"
                found = Verdict(said, self._first_host)
            if found is not None:
                self._end(found)
                return

    def _end(self, found: Verdict) -> None:
        self._verdict = self._with_record(found)
        self._is_known.set()
        if not self._is_over.wait(self.silence + 4 * self.interval):
            leave(PeerError(f"rank {self.rank}: {self._verdict}"))

    def _with_record(self, found: Verdict) -> str:
        """Its words and what `leave_record` says; without that where the disk takes too long to say it.

        The disk may be why a rank hangs.
        """
        if self._record is None:
            return found.said
        written = SimpleQueue[str]()
        folder = self._record
        writing = threading.Thread(
            target=lambda: written.put(leave_record(folder, self.rank, found.lost)), daemon=True
        )
        writing.start()
        with suppress(Empty):
            return found.said + written.get(timeout=2 * self.interval)
        return found.said

    def _read(self) -> Verdict | None:
        if self._own.check(["verdict"]):
            found = Verdict(*json.loads(self._own.get("verdict")))
            self._own.add("heard", 1)
            return found
        has_failed = self._own.add("failures", 0) > 0
        if has_failed:
            self._tell()
        seconds = self.silence if has_failed else self.timeout
        return self._of_silent([0], seconds, is_closed=False) if self._silent(seconds) else None

    def _tell(self) -> None:
        """Says once what this rank waits for while another one waits in vain."""
        if not self._has_told:
            self._own.set(f"waits/{self.rank}", json.dumps(waits_for()))
            self._has_told = True

    def _judged(self) -> Verdict | None:
        found = self._judge()
        if found is not None:
            self._own.set("verdict", json.dumps(found))
        return found

    def _judge(self) -> Verdict | None:
        silent = self._silent(self.timeout)
        if silent:
            return self._of_silent(silent, self.timeout, is_closed=False)
        if not self._own.add("failures", 0):
            return None
        self._tell()
        reports = self._reports()
        for peer, (is_of_peer, said) in sorted(reports.items()):
            if not is_of_peer:
                return Verdict(f"{self._named(peer)} failed: {said}")
        if self._failure_seen is None:
            self._failure_seen = time.monotonic()
        if time.monotonic() - self._failure_seen < self.silence:
            return None
        silent = [peer for peer in self._silent(self.silence) if peer not in reports]
        said = next(iter(reports.values()))[1]
        if silent:
            is_closed = any(word in text for _, text in reports.values() for word in _CLOSED)
            return self._of_silent(silent, self.silence, is_closed=is_closed)
        return self._of_alive(list(reports), said)

    def _of_alive(self, reporters: list[int], said: str) -> Verdict:
        """Who keeps the reporters waiting, where no rank is lost: one that waits for none itself."""
        others = [peer for peer in range(self.size) if peer not in reporters]
        waits = {peer: self._waits_of(peer) for peer in others}
        text = f"rank {', '.join(map(str, sorted(reporters)))} waited in vain for another"
        idle = [peer for peer in others if waits[peer] is None]
        if idle:
            text = f"{self._all_named(idle)}: waits for no other rank, and {text}"
        else:
            named = "; ".join(f"{self._named(peer)}, waits for {waits[peer]}" for peer in others[:8])
            text += f"; nothing was reported by {named}" if named else ""
        return Verdict(f"every rank is alive, but {text}: {said}", self._host_of(idle))

    def _waits_of(self, rank: int) -> str | None:
        with suppress(dist.DistError):
            if self._own.check([f"waits/{rank}"]):
                return json.loads(self._own.get(f"waits/{rank}"))
        return UNKNOWN

    def _host_of(self, ranks: list[int]) -> str | None:
        """The machine of these ranks, where it is one."""
        hosts = {self._first_host if rank == 0 else host_of(self._own, rank) for rank in ranks}
        return hosts.pop() if len(hosts) == 1 else None

    def _of_silent(self, silent: list[int], seconds: float, *, is_closed: bool) -> Verdict:
        what = "ended without a word" if is_closed else "hangs, or its machine is gone"
        said = f"{self._all_named(silent)}: {what}; silent for {seconds:g} s"
        return Verdict(said, self._host_of(silent))

    def _all_named(self, ranks: list[int]) -> str:
        named = ", ".join(self._named(rank) for rank in ranks[:8])
        return f"{named} and {len(ranks) - 8} more" if len(ranks) > 8 else named

    def _silent(self, seconds: float) -> list[int]:
        """Peers whose beat has stood still for so long."""
        now = time.monotonic()
        beats = self._own.multi_get([f"beat/{peer}" for peer in self._heard])
        for peer, beat in zip(self._heard, beats, strict=True):
            if beat != self._heard[peer][0]:
                self._heard[peer] = (beat, now)
        return [peer for peer, (_, since) in self._heard.items() if now - since >= seconds]

    def _reports(self) -> dict[int, tuple[bool, str]]:
        ranks = [rank for rank in range(self.size) if self._own.check([f"failed/{rank}"])]
        return {rank: tuple(json.loads(self._own.get(f"failed/{rank}"))) for rank in ranks}

    def _named(self, rank: int) -> str:
        with suppress(dist.DistError):
            at = json.loads(self._own.get(f"beat/{rank}"))[1]
            return f"{self._described(rank)}, {process_of(self._own, rank)}, {at}"
        return self._described(rank)

    def _described(self, rank: int) -> str:
        own = coordinates(self.degrees, rank)
        axes = [f"{name} {own[name]}" for name in ORDER if getattr(self.degrees, name) > 1]
        return f"rank {rank} ({', '.join(axes)})"


@contextmanager
def monitored(watch: Heartbeat) -> Iterator[None]:
    """Runs the block under a Heartbeat. Collective.

    Raises PeerError instead of the errors of a collective that another rank broke.
    """
    rank = watch.rank
    try:
        dist.barrier()
        watch.start()
        yield
        # Rank 0 keeps the store: it must not leave before the others are done.
        dist.barrier()
    except BaseException as error:
        is_of_peer = comes_from_peer(error)
        with watch.bounded(error):
            watch.report(error, is_of_peer=is_of_peer)
            found = watch.verdict() if is_of_peer or rank == 0 else None
            watch.linger()
        if is_of_peer:
            raise PeerError(f"rank {rank}: {found or error}") from error
        raise
    finally:
        watch.stop()


def comes_from_peer(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is that of a collective."""
    seen: list[Any] = []
    while error is not None and error not in seen:
        if isinstance(error, dist.DistError) or any(word in str(error) for word in _OF_PEERS):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False
