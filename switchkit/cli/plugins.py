"""Importing what registers parts of its own: installed packages by entry point, a user's file by name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from switchkit.cli.errors import UserError

__all__ = ["anywhere", "bring_in", "distinct", "import_plugins", "importable", "load_entry_points", "split_plugins"]

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


def bring_in(plugins: Sequence[str]) -> bool:
    """Import what is installed and what ``--plugins`` names; whether that is anything.

    Raises:
        UserError: one cannot be imported.
    """
    installed = load_entry_points()
    import_plugins(plugins, "--plugins")
    return bool(installed + len(plugins))


def import_plugins(names: Iterable[str], where: str = "plugins", folder: Path | None = None) -> None:
    """Import modules by name; a file (``my_file.py``) is imported as the module of its name.

    Args:
        names: of modules or files.
        where: what an error says named them.
        folder: where files are sought that are not in the working directory.

    Raises:
        UserError: one does not exist or fails when imported; another module has a file's name.
    """
    for name in names:
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: expected the name of a module, got {name!r}")
        module = name
        path = _file(name, folder)
        if path is not None:
            if not path.is_file():
                raise UserError(f"{where}: {name!r}: there is no such file in the working directory {os.getcwd()}")
            importable(path.resolve().parent)
            module = path.stem
        try:
            found = importlib.import_module(module)
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
        if path is not None and not _is_of(found, path):
            other = getattr(found, "__file__", None) or "a part of Python itself"
            raise UserError(
                f"{where}: {name!r} would be imported as {module!r}, which is {other}: give your file another name"
            )


def anywhere(name: str, folder: Path | None) -> str:
    """A plugin as every other recipe and command line in the working directory finds it: one that lies beside the
    recipe that named it, in `folder`, by its file."""
    path = _file(name, folder) or (None if folder is None else folder / f"{name}.py")
    if path is None or path.resolve().parent == Path.cwd() or not _is_of(sys.modules.get(path.stem), path):
        return name
    full = path.resolve()
    return str(full.relative_to(Path.cwd()) if full.is_relative_to(Path.cwd()) else full)


def distinct(names: Iterable[str]) -> list[str]:
    """The plugins in order, each module once: the file and the module that was imported from it are one."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(Path(name).stem if name.endswith(".py") else name, name)
    return list(found.values())


def _file(name: str, folder: Path | None) -> Path | None:
    """The file that a plugin's name is of; None: it is that of a module."""
    if not name.endswith(".py"):
        return None
    path = Path(name)
    return folder / path if folder is not None and not path.is_file() else path


def _is_of(module: ModuleType | None, path: Path) -> bool:
    """Whether a module was imported from a file."""
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == path.resolve()


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
