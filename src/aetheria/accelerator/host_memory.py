"""What the C library does with memory that a step gives back."""

from __future__ import annotations

import ctypes
import os
from functools import cache

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3), the parameters' numbers in malloc.h
_LARGEST_IN_HEAP = 32 << 20  # glibc takes no more
_KEPT = 1 << 30


@cache
def keep_freed_memory() -> bool:
    """Asks glibc to keep up to 1 GiB of freed memory for the next step, instead of giving it back to the system.

    Every step of a training frees the same activations and gradients that the next one allocates. By default they are
    given back at the end of a step if nothing lies above them, by luck, and each page that comes again is a fault:
    150 of them, half a millisecond, in a step of a small language model. It costs no more than the memory that
    the steps need anyway. What a user has set by environment variables is left alone.

    Returns:
        Whether it was done: there is nothing to ask in another C library.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # macOS, or a C library without it
        return False
    # Setting one of them ends glibc's own adjusting of both, so both are set, the other to where adjusting ends.
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP) and mallopt(_TRIM_THRESHOLD, _KEPT))
