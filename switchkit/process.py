"""What a process is told of memory and threads."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["keep_memory", "threads"]

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


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch computes with `count` threads within it (None: with as many as before)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
