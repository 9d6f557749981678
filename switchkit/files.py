"""Files and folders that appear whole or not at all: written beside their place, then moved there."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["appearing", "put", "sync_folder", "write_text", "writes"]


@contextmanager
def writes(path: Path) -> Iterator[None]:
    """What keeps a file from being written is told of that file, which is written under another name.

    Raises:
        OSError: it cannot be written; of a full disk, torch.save makes a RuntimeError.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


@contextmanager
def appearing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Where to write what takes the place of `path` when all of it is written, and is gone if that fails: a file, or a
    folder where there is none.

    `shared`: several processes may write it at once, so that each needs a place of its own.
    """
    mark = f".{secrets.token_hex(4)}" if shared else ""
    temporary = path.parent / f".{path.name}{mark}.part"
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # what went wrong first is told
            _remove(temporary)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text; what was there stays until all of it is written.

    Raises:
        OSError: it cannot be written.
    """
    with appearing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def put(temporary: Path, target: Path) -> None:
    """Move a file or folder into place; a folder cannot be replaced in one step, so the old one steps aside first."""
    previous = target.with_name(f"{target.stem}.previous{target.suffix}")
    if target.is_dir() or temporary.is_dir():
        if target.exists():
            _remove(previous)
            os.rename(target, previous)
        os.rename(temporary, target)
        sync_folder(target.parent)
        _remove(previous)
    else:
        os.replace(temporary, target)
        sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system can (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
