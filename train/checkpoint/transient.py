"""Errors of storage that may pass by themselves, and trying again until one has."""

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# A shared file system that fails over, a path that is switched, a disk that somebody makes room on.
PASSING = frozenset(
    (
        errno.EIO,
        errno.EBUSY,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ENOLCK,
        errno.EREMOTEIO,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
    )
)
FULL = frozenset((errno.ENOSPC, errno.EDQUOT))

# Seconds before the second, third and fourth try, each half as long again or half as short by chance: many
# ranks must not come back in one moment.
WAITS = (0.1, 0.5, 2.0)


def retried(work: Callable[[], T]) -> T:
    """What `work` gives, tried again where storage fails in a way that may pass.

    Raises OSError, the last one where none of the tries went well.
    """
    for wait in WAITS:
        try:
            return work()
        except OSError as error:
            if error.errno not in PASSING:
                raise
        time.sleep(wait * random.uniform(0.5, 1.5))
    return work()
