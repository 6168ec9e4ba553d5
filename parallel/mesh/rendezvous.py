"""Rendezvous: every process of a run is there, and all agree on how many they are."""

import json
import os
import time
from datetime import timedelta

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
            return TCPStore(
                rendezvous.address,
                rendezvous.port,
                is_master=is_host,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
            )
        except dist.DistError as error:
            if not is_host:
                host = "the launcher" if rendezvous.is_hosted else "rank 0"
                message = (
                    f"{host} did not open {endpoint} within {timeout:g} s; it has not started, has ended, or "
                )
                raise PeerError(message + "is not reached from here; its log says why") from error
            if time.monotonic() > deadline:
                raise PeerError(
                    f"rank 0 cannot open {endpoint}: {_first_line(error)}; if that is no process of this run "
                    "which still ends, choose a free port of its machine by MASTER_PORT"
                ) from error
        time.sleep(0.5)


def wait_for_ranks(store: Store, rendezvous: Rendezvous, rank: int, size: int, timeout: float) -> None:
    """Returns once all `size` ranks are there. timeout is in seconds.

    Raises PeerError that names the ranks that did not come in time, ConfigError where two processes say that
    they are the same rank, or disagree on how many there are.
    """
    own = f"pid {os.getpid()} on {rendezvous.host}"
    if store.add(f"came/{rank}", 1) > 1:
        first = json.loads(store.get(f"here/{rank}"))[1]
        message = f"{own} and {first} both say that they are rank {rank}; start each rank once"
        raise ConfigError([Violation("RANK", message)])
    store.set(f"here/{rank}", json.dumps([size, own]))
    if rank == 0:
        found = _look(store, size, timeout)
        store.set("ranks", json.dumps(found))
        if found["absent"] or found["other"]:
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


def process_of(store: Store, rank: int) -> str:
    """Process and machine of a rank that came."""
    return str(json.loads(store.get(f"here/{rank}"))[1])


def _look(store: Store, size: int, timeout: float) -> dict:
    deadline = time.monotonic() + timeout
    absent, here, other = set(range(size)), dict[int, int](), dict[int, int]()
    while absent and not other:
        for rank in sorted(absent):
            if store.check([f"here/{rank}"]):
                absent.remove(rank)
                here[rank] = json.loads(store.get(f"here/{rank}"))[0]
        other = {rank: count for rank, count in here.items() if count != size}
        if time.monotonic() > deadline:
            break
        time.sleep(LOOK)
    return {"size": size, "absent": [] if other else sorted(absent), "here": sorted(here), "other": other}


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
