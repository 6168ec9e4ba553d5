"""Rendezvous: every process of a run is there, and all agree on how many they are."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from conf.errors import ConfigError, PeerError, Violation
from parallel.config.rendezvous import Rendezvous

# Seconds between two looks at who has come, and those that others have to read what rank 0 found.
LOOK, FAREWELL = 0.05, 3.0
# Seconds that rank 0 waits for a port which a process before it has not given up yet.
PORT_WAIT = 20.0


def open_store(rendezvous: Rendezvous, timeout: float, *, is_host: bool) -> TCPStore:
    """A connection to the keys that all processes share, which one host keeps. timeout is in seconds.

    Raises PeerError where it is not there in time, or the host cannot open it, tried for some time.
    """
    endpoint = f"{rendezvous.address}:{rendezvous.port}"
    deadline = time.monotonic() + min(PORT_WAIT, timeout / 2)
    while True:
        try:
            return _store(rendezvous, timeout, is_host=is_host)
        except dist.DistError as error:
            if not is_host:
                host = "the launcher" if rendezvous.is_hosted else "rank 0"
                raise PeerError(
                    f"{host} did not open {endpoint} within {timeout:g} s; it has not started, has ended, or "
                    "is not reached from here; its log says why"
                ) from error
            if time.monotonic() > deadline:
                raise PeerError(
                    f"rank 0 cannot open {endpoint}: {_first_line(error)}; if that is no process of this run "
                    "which still ends, choose a free port of its machine by MASTER_PORT"
                ) from error
        time.sleep(0.5)


def _store(rendezvous: Rendezvous, timeout: float, *, is_host: bool) -> TCPStore:
    return TCPStore(
        rendezvous.address,
        rendezvous.port,
        is_master=is_host,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
    )


# Facts that an error shows.
_SHOWN = 8


class Difference(NamedTuple):
    """Ranks that differ from the most, in words; a rank of each side."""

    said: str
    others: str
    rank: int
    standard: int


def wait_for_ranks(
    store: Store,
    rendezvous: Rendezvous,
    rank: int,
    size: int,
    timeout: float,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Returns once all `size` ranks are there, with the same facts. timeout is in seconds.

    Raises PeerError that names the ranks that did not come in time, ConfigError where two processes say that
    they are the same rank, disagree on how many there are, or have other facts than the most; it names them.
    """
    text = json.dumps(facts or {}, sort_keys=True)
    store.set(f"facts/{rank}", text)
    store.set(f"host/{rank}", rendezvous.host)
    own = f"pid {os.getpid()} on {rendezvous.host}"
    if store.add(f"came/{rank}", 1) > 1:
        first = json.loads(store.get(f"here/{rank}"))[1]
        message = f"{own} and {first} both say that they are rank {rank}; start each rank once"
        raise ConfigError([Violation("RANK", message)])
    store.set(f"here/{rank}", json.dumps([size, own, hashlib.sha256(text.encode()).hexdigest()]))
    if rank == 0:
        found = _look(store, size, timeout)
        store.set("ranks", json.dumps(found))
        if found["absent"] or found["other"] or found["differ"]:
            _let_read(store, len(found["here"]) - 1)
    else:
        found = _verdict(store, timeout)
        store.add("read", 1)
    if found["absent"]:
        raise PeerError(_absence(found, rendezvous, timeout))
    sizes = {0: found["size"], rank: size} | {int(other): count for other, count in found["other"].items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"rank {other} as one of {count}" for other, count in sorted(sizes.items()))
        message = f"processes of one run were started as parts of different ones: {told}; start them by one "
        raise ConfigError([Violation("WORLD_SIZE", message + "command, or give each job a port of its own")])
    if found["differ"]:
        raise ConfigError([Violation(*pair) for pair in found["differ"]])


def difference(values: Mapping[int, str]) -> Difference | None:
    """Which ranks have another value than the most, of as many those without the lowest; None where none."""
    counts = Counter(values[rank] for rank in sorted(values))
    if len(counts) == 1:
        return None
    common = counts.most_common(1)[0][0]
    odd = [rank for rank in sorted(values) if values[rank] != common]
    standard = next(rank for rank in sorted(values) if values[rank] == common)
    more = f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
    said = f"rank {', '.join(map(str, odd[:_SHOWN]))}{more} {'have' if len(odd) > 1 else 'has'}"
    rest = len(values) - len(odd)
    others = f"rank {standard} and {rest - 1} more have" if rest > 1 else f"rank {standard} has"
    return Difference(said, others, odd[0], standard)


def process_of(store: Store, rank: int) -> str:
    """Process and machine of a rank that came."""
    return str(json.loads(store.get(f"here/{rank}"))[1])


def host_of(store: Store, rank: int) -> str:
    """The machine of a rank that came."""
    return store.get(f"host/{rank}").decode()


def _look(store: Store, size: int, timeout: float) -> dict:
    deadline = time.monotonic() + timeout
    absent, here, other = set(range(size)), dict[int, int](), dict[int, int]()
    digests = dict[int, str]()
    while absent and not other:
        for rank in sorted(absent):
            if store.check([f"here/{rank}"]):
                absent.remove(rank)
                here[rank], _, digests[rank] = json.loads(store.get(f"here/{rank}"))
        other = {rank: count for rank, count in here.items() if count != size}
        if time.monotonic() > deadline:
            break
        time.sleep(LOOK)
    differ = [] if absent or other else _differ(store, digests)
    absent = [] if other else sorted(absent)
    return {"size": size, "absent": absent, "here": sorted(here), "other": other, "differ": differ}


def _differ(store: Store, digests: Mapping[int, str]) -> list[tuple[str, str]]:
    """Facts in which the odd ranks differ from the others, with what to say of each."""
    odd = difference(digests)
    if odd is None:
        return []
    found, expected = (json.loads(store.get(f"facts/{rank}")) for rank in (odd.rank, odd.standard))
    names = [name for name in expected | found if found.get(name) != expected.get(name)]
    fix = "start every rank by the same command, from the same code and environment"
    lines = [
        (name, f"{odd.said} {found.get(name)}, {odd.others} {expected.get(name)}; {fix}")
        for name in names[:_SHOWN]
    ]
    hidden = len(names) - len(lines)
    return lines + ([("others", f"{hidden} more keys differ")] if hidden else [])


def _let_read(store: Store, readers: int) -> None:
    """The store ends with this process: others read first."""
    deadline = time.monotonic() + FAREWELL
    while store.add("read", 0) < readers and time.monotonic() < deadline:
        time.sleep(LOOK)


def _verdict(store: Store, timeout: float) -> dict:
    try:
        store.wait(["ranks"], timedelta(seconds=timeout + FAREWELL))
        return json.loads(store.get("ranks"))
    except dist.DistError as error:
        message = f"rank 0 did not say within {timeout:g} s which ranks are there: it has not started, "
        raise PeerError(message + "or has ended; its log says why") from error


def _absence(found: dict, rendezvous: Rendezvous, timeout: float) -> str:
    absent, size = found["absent"], found["size"]
    named = ", ".join(map(str, absent[:16])) + (f" and {len(absent) - 16} more" if len(absent) > 16 else "")
    return (
        f"{len(absent)} of {size} ranks did not come to {rendezvous.address}:{rendezvous.port} within "
        f"{timeout:g} s (parallel.timeout_seconds): rank {named}; start them, or look into their logs"
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
