"""Checkpoints read, of either kind, and found again."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from switchkit.checkpoints.content import check_classes, content_of
from switchkit.checkpoints.folder import read_folder
from switchkit.parallel import shards

__all__ = ["callback_state", "intact", "last", "read", "read_settings"]

ARCHIVE = b"PK\x03\x04"
"""How a file of torch.save begins."""
FOLDER = "checkpoints"
"""A folder of this name holds the checkpoints of one run."""


def read(path: str | os.PathLike[str], *, ours: bool = True) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU, without running anything that the file says.

    Without `ours` it may be that of any LightningModule.

    Raises:
        ValueError: no such file, a truncated or damaged one, one that holds more than plain data, one that switchkit
            did not write, or a later switchkit did.
    """
    path = Path(path)
    if path.is_dir():
        return read_folder(path, ours=ours)
    if not path.is_file():
        raise ValueError(
            f"there is no checkpoint {path}: give a file, or 'last' for the newest one below the run folder"
        )
    if (path.parent / shards.MANIFEST).is_file():
        raise ValueError(f"{path} is a part of the checkpoint {path.parent}: give that folder")
    with path.open("rb") as file:
        begins = file.read(len(ARCHIVE))
    if begins not in (ARCHIVE, b""):
        raise ValueError(f"{path} is no checkpoint, but a file of another kind: give the .ckpt file of a run")
    if not intact(path):
        raise ValueError(f"checkpoint {path} ({path.stat().st_size} bytes) is truncated or damaged{_instead(path)}")
    return content_of(path, path, ours=ours)


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """``{"model": spec, "data": spec or None, "source": ..., "step": n}`` of a checkpoint, every class in it known.

    Beside them `resume`: the description of the module that goes on training, where it is not that of the model.

    Raises:
        ValueError: as `read`, and for a part that is not imported.
    """
    path = Path(path)
    content = read_folder(path, {}) if path.is_dir() else read(path)
    ours = content["switchkit"]
    check_classes(ours["model"], ours.get("data"), ours.get("resume"))
    return {
        "model": ours["model"],
        "data": ours.get("data"),
        "source": ours.get("source"),
        "resume": ours.get("resume"),
        "step": content.get("global_step", 0),
    }


def callback_state(path: str | os.PathLike[str], key: str) -> Any:
    """What a callback saved in a checkpoint, without reading its weights; None: nothing, or it cannot be read."""
    path = Path(path)
    try:
        content = (
            read_folder(path, {}, ours=False)
            if path.is_dir()
            else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        )
        return content["callbacks"].get(key)
    except (OSError, ValueError, RuntimeError, EOFError, LookupError, AttributeError, TypeError, UnpicklingError):
        return None


def intact(path: str | os.PathLike[str]) -> bool:
    """True: the file is a whole archive whose checksums hold, or a folder as its manifest says."""
    if Path(path).is_dir():
        try:
            shards.check(Path(path), alone=True)
        except ValueError:
            return False
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def last(root: str | os.PathLike[str]) -> Path:
    """The newest intact ``last.ckpt`` below a folder, over all runs and versions in it; failing that, any checkpoint.

    Raises:
        ValueError: there is none. Never a silent fresh start.
    """
    found = sorted(Path(root).rglob("*.ckpt"), key=lambda p: (p.name.startswith("last"), p.stat().st_mtime))
    for path in reversed(found):
        if intact(path):
            return path
    broken = f" ({len(found)} damaged)" if found else ""
    raise ValueError(
        f"no checkpoint below {Path(root)}{broken}: start a run without --ckpt_path, or name another folder with "
        "--trainer.default_root_dir (--default_root_dir of commands that have no trainer)"
    )


def _instead(path: Path) -> str:
    if path.absolute().parent.name != FOLDER:
        return ""  # what lies elsewhere may be of any model
    others = sorted((p for p in path.parent.glob("*.ckpt") if p != path), key=lambda p: p.stat().st_mtime)
    good = next(filter(_readable, reversed(others)), None)
    return "" if good is None else f"; the newest good one beside it is {good}"


def _readable(path: Path) -> bool:
    if not intact(path):
        return False
    try:
        read(path)
    except ValueError:
        return False
    return True
