"""Permissions that bind root too."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

# Linux's numbers: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, and the version of the structure below.
OVERRIDES, VERSION_3 = (1 << 1) | (1 << 2), 0x20080522


@contextmanager
def bound_by_permissions() -> Iterator[None]:
    """This thread may read what its user may read, also where that user is root."""
    libc = ctypes.CDLL(None, use_errno=True)
    head, held = (ctypes.c_uint32 * 2)(VERSION_3, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(head, held) == 0, os.strerror(ctypes.get_errno())
    less = (ctypes.c_uint32 * 6)(*held)
    less[0] &= ~OVERRIDES
    assert libc.capset(head, less) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert libc.capset(head, held) == 0, os.strerror(ctypes.get_errno())
