"""Which errors are the user's to mend, and how they are told: in one line, without a traceback."""

from __future__ import annotations

import errno
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from switchkit.registry import nearest

__all__ = ["UserError", "disk_is_full", "exit_code", "first_process", "listed", "near", "one_line", "short"]

_PACKAGE = Path(__file__).resolve().parents[1]
_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """A mistake in a command line or configuration; the message says what to write instead."""


def one_line(error: BaseException) -> str | None:
    """The error as one line, or None if it is not known to be the user's and must keep its traceback.

    Known are `UserError`, a ValueError that a switchkit module raised itself, an ImportError in which one says what to
    install, an OSError of a file that a switchkit module asked the standard library for, a full disk, whoever writes,
    and what Lightning, its loops, its tuner or a callback of its own refuse, such as to monitor a metric that nobody
    logs.
    """
    if isinstance(error, OSError):
        full = disk_is_full(error)
        if not full and not _raised_here(error.__traceback__, through_stdlib=True):
            return None
        reason = (error.strerror or str(error)) + (": free some, or write to another disk" if full else "")
        return _flat(f"{error.filename}: {reason}" if error.filename is not None else reason)
    ours = isinstance(error, ValueError) or (isinstance(error, ImportError) and error.name is None)
    if isinstance(error, UserError) or (ours and _raised_here(error.__traceback__)):
        return _flat(str(error))
    if isinstance(error, ValueError) and _raised_by_lightning(error.__traceback__, "loops"):
        return _flat(str(error))  # data that a loop refuses, such as fewer batches than val_check_interval
    # By its name: nothing here imports Lightning.
    refused = type(error).__name__ == "MisconfigurationException"
    if refused or (
        isinstance(error, (RuntimeError, ImportError)) and _raised_by_lightning(error.__traceback__, "callbacks")
    ):
        return _flat(str(error))
    if isinstance(error, AttributeError) and _raised_by_lightning(error.__traceback__, "tuner"):
        return _flat(str(error))  # a model without what LearningRateFinder changes
    return None


def disk_is_full(error: BaseException) -> bool:
    """Whether there was no room for a file."""
    return isinstance(error, OSError) and error.errno in _FULL


def exit_code(exit: SystemExit) -> int:
    """The code of a SystemExit: 143 after SIGTERM and 130 after Ctrl-C, which Lightning ends with 0 and 1."""
    if type(exit).__name__ == "Stopped":
        told = vars(exit)
        if first_process():
            ranks = ", ".join(map(str, told.get("ranks", ())))
            where = f" on rank {ranks}" if ranks else ""
            line = f"stopped by {told['signal']}{where} after step {told['step']}; {_go_on(told['path'])}"
            print(f"switchkit: {line}", file=sys.stderr)
    if type(exit).__name__ == "SIGTERMException":
        return 143
    if isinstance(exit.__context__, KeyboardInterrupt):
        return 130
    if exit.code is None or isinstance(exit.code, int):
        return exit.code or 0
    print(exit.code, file=sys.stderr)
    return 1


def _go_on(path: Path | None) -> str:
    """How a stopped run is continued."""
    if path is None:
        return "there was nothing to save yet"
    config = path.parent.parent / "config.yaml"
    given = f" --config {shlex.quote(str(config))}" if config.is_file() else ""
    return f"go on with: switchkit fit{given} --ckpt_path {shlex.quote(str(path))}"


def first_process() -> bool:
    """Whether this process is the one that speaks, of those that a launcher started for one run."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def near(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one, if any is near."""
    known = list(known)
    begun = [name for name in known if len(word) > 1 and name.startswith(word)]
    return nearest(word, begun) or (f". Did you mean {begun[0]!r}?" if begun else nearest(word, known)) or "."


def short(value: object, width: int = 60) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def listed(word: str, known: Iterable[str], title: str) -> str:
    """`near`, then all that is known, unless that is much and the nearest will do."""
    known = list(known)
    hint = near(word, known)
    return hint if hint != "." and len(known) > 12 else f"{hint} {title}: {', '.join(known) or 'none'}"


def _flat(text: str) -> str:
    return " ".join(text.split()) or "failed without a message"


def _raised_by_lightning(trace: TracebackType | None, part: str) -> bool:
    """Whether a part of Lightning itself, such as one of its callbacks, raised an error."""
    return Path(*_files(trace)[-1:]).parent.parts[-3:] == ("lightning", "pytorch", part)


def _files(trace: TracebackType | None) -> list[str]:
    files = []
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return files


def _raised_here(trace: TracebackType | None, through_stdlib: bool = False) -> bool:
    files = _files(trace)
    while through_stdlib and files and _is_stdlib(files[-1]):
        files.pop()
    return bool(files) and _PACKAGE in Path(files[-1]).resolve().parents


def _is_stdlib(file: str) -> bool:
    path = Path(file)
    return file.startswith("<frozen") or (
        path.parent.name != "site-packages"
        and "site-packages" not in path.parts
        and any(part == f"python{sys.version_info.major}.{sys.version_info.minor}" for part in path.parts)
    )
