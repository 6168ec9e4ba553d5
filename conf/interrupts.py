"""Ctrl-C, which a terminal sends to a command and to all processes that it started."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def shielded() -> Iterator[None]:
    """This process hears SIGINT after the block, and those that it starts there after `end_at_interrupt`.

    From the main thread.
    """
    heard: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    # A mask is inherited, a handler is not: a process that still imports would print where it was.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if heard:
            signal.raise_signal(signal.SIGINT)


def end_at_interrupt() -> None:
    """SIGINT ends this process without a word from here on: the one that started it has the last."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
