"""Keeping freed memory in the process."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_memory"]

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_memory() -> bool:
    """Tell glibc's malloc to reuse large blocks rather than to give them back to the kernel at every `free`.

    By default glibc maps blocks of 32 MB and more anew each time, and every page of them faults again: the gradients of
    a layer can cost more than its products. Freed memory then stays with the process until it ends. Once said it cannot
    be taken back.

    Returns:
        False where there is no glibc, and nothing was done.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # No block is a mapping of its own; and the top of the heap is never returned (-1 becomes the largest size_t).
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, -1))
