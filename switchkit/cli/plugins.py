"""Importing what registers parts of its own: installed packages by entry point, a user's file by name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from switchkit.cli.errors import UserError

__all__ = ["import_plugins", "importable", "load_entry_points", "split_plugins"]

_GROUP = "switchkit.plugins"


def load_entry_points() -> int:
    """Import every installed package that announces itself by the entry point ``switchkit.plugins``; their number."""
    points = entry_points(group=_GROUP)
    for point in points:
        try:
            point.load()
        except Exception as error:
            package = point.dist.name if point.dist else point.value
            raise UserError(
                f"the installed plugin {point.name!r} (package {package}) cannot be imported: "
                f"{type(error).__name__}: {error}. Repair or uninstall the package"
            ) from error
    return len(points)


def import_plugins(names: Iterable[str], where: str = "plugins") -> None:
    """Import modules by name; one of a file's name (``my_file.py``) is taken for the module.

    Raises:
        UserError: one does not exist or fails when imported.
    """
    for name in names:
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: expected the name of a module, got {name!r}")
        module = name
        if name.endswith(".py"):
            path = Path(name)
            importable(path.resolve().parent)
            module = path.stem
        try:
            importlib.import_module(module)
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name in (module, module.partition(".")[0])
            if missing and not name.endswith(".py") and Path(name).is_file():
                raise UserError(
                    f"{where}: {name!r} is no module: give the name of one, such as my_file for my_file.py"
                ) from error
            reason = (
                f"there is no such module in the working directory {os.getcwd()}, beside a given recipe or installed"
                if missing
                else f"{type(error).__name__}: {error}{_place(error)}"
            )
            raise UserError(f"{where}: cannot import {name!r}: {reason}") from error


def importable(folder: Path) -> None:
    """Append a folder to the module search path, where it can hide nothing that is installed."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def split_plugins(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """`argv` without ``--plugins a b`` and ``--plugins=a``, and the names given there."""
    rest: list[str] = []
    names: list[str] = []
    taking = False
    for argument in argv:
        if argument == "--plugins":
            taking = True
        elif argument.startswith("--plugins="):
            names += argument.partition("=")[2].replace(",", " ").split()
            taking = False
        elif taking and not argument.startswith("-"):
            names.append(argument)
        else:
            taking = False
            rest.append(argument)
    if any(argument.partition("=")[0] == "--plugins" for argument in argv) and not names:
        raise UserError("--plugins needs the name of at least one module")
    return rest, names


def _place(error: Exception) -> str:
    """Where in the user's file it failed."""
    if isinstance(error, SyntaxError):
        return ""
    trace = error.__traceback__
    found = ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith("<frozen") and os.sep + "importlib" + os.sep not in file:
            found = f" ({Path(file).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return found
