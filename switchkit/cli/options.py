"""Small command lines: argparse, with errors of one line that name the nearest option."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from switchkit.cli.errors import UserError, near
from switchkit.cli.plugins import split_plugins

__all__ = [
    "OF_FIT",
    "SETTINGS",
    "OptionParser",
    "json_file",
    "json_target",
    "new_file",
    "number",
    "positive",
    "seed",
    "write_json",
]

OF_FIT = (
    *("model", "data", "trainer", "plugins", "seed_everything", "keep_memory"),
    *("init_from", "ckpt_path", "weights_only", "config", "print_config"),
)
"""The options of `fit` whose names have no dot."""
SETTINGS = (
    "Any other --KEY VALUE is a setting of `switchkit fit`, such as --model.moe.router top_k: --config NAME (a YAML "
    "file or a recipe; of several, later ones win), --ckpt_path PATH (a checkpoint, or `last`: the newest), --plugins "
    "MODULE (to import first)."
)
"""The end of the help of a command that takes them."""


class OptionParser(argparse.ArgumentParser):
    """An ArgumentParser that raises `UserError`, and takes no abbreviations."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"switchkit {command}", description=description, allow_abbrev=False)
        self._given: list[str] = []
        self._plugins = False

    def add_plugins(self) -> None:
        """``--plugins``, as every command takes it: of several words, wherever it stands."""
        self._plugins = True
        self.add_argument("--plugins", nargs="+", metavar="MODULE", help="modules to import first, such as my_file")

    def add_json(self, what: str) -> None:
        """``--json``, whose value goes to `json_target` and `write_json`."""
        told = f"write {what} as JSON to a file too; without one: to the output, in place of tables"
        self.add_argument("--json", nargs="?", const="-", metavar="PATH", help=told)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The options of `argv`.

        Raises:
            UserError: an unknown option, a missing or unfit value.
        """
        self._given, plugins = split_plugins(argv) if self._plugins else (list(argv), [])
        found, unknown = super().parse_known_args(self._given)
        if unknown and not unknown[0].startswith("-"):
            # Words of one list may have an option between them; what is missing is told better above.
            found, unknown = super().parse_known_intermixed_args(self._given)
        if unknown and not unknown[0].startswith("-"):
            raise UserError(f"{self.prog}: {unknown[0]!r} belongs to no option, and is one word too many")
        if unknown:
            name, known = unknown[0].partition("=")[0], self._known()
            raise UserError(f"{self.prog}: unknown option {name!r}{near(name, known)} Options: {', '.join(known)}")
        if self._plugins:
            found.plugins = plugins
        return found

    def parse_beside(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The options of `argv` that are the command's own, and all else in its order, which `fit` reads.

        Raises:
            UserError: as `parse`; what is near one of its options and none of `fit`.
        """
        own: list[str] = []
        rest: list[str] = []
        mine = {option: action for action in self._actions for option in action.option_strings}
        left = deque(argv)
        while left:
            argument = left.popleft()
            name, equals, _ = argument.partition("=")
            if name not in mine:
                self._check_spelling(name)
                rest.append(argument)
                continue
            own.append(argument)
            # What begins with two dashes is no value; whoever reads the option tells that it has none.
            if not equals and mine[name].nargs != 0 and left and left[0] != "-c" and not left[0].startswith("--"):
                own.append(left.popleft())
        return self.parse(own), rest

    def _check_spelling(self, name: str) -> None:
        if name.startswith("--") and "." not in name and name[2:] not in OF_FIT:
            own = [option[2:] for option in self._known()]
            # Without dashes, which would make all names alike.
            meant = near(name[2:], [*own, *OF_FIT]).partition("'")[2].partition("'")[0]
            if meant in own:
                raise UserError(f"{self.prog}: unknown option {name!r}. Did you mean '--{meant}'?")

    def _known(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `UserError`."""
        told = re.sub(r"^argument ", "", message)
        option = told.removesuffix(": expected one argument")
        after = [value for name, value in pairwise(self._given) if name == option and value[:1] == "-"]
        if option != told and after:
            told += f"; a value that begins with - is written {option}={shlex.quote(after[0])}"
        if choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", told):
            told += near(choice[1], re.findall(r"[\w-]+", choice[2])).removesuffix(".")
        raise UserError(f"{self.prog}: {told}")


def number(kind: type[int] | type[float], accepted: str, fits: Any) -> Any:
    """A type for `add_argument`: a number that `fits`, described by `accepted` in the error."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"expected {accepted}, got {text!r}")
        return value

    return read


positive = number(int, "an integer of at least 1", lambda value: value >= 1)
seed = number(int, "an integer from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)


def new_file(given: str, *, makes_folder: bool = False, replaces: bool = False) -> Path:
    """The path of ``--out``, which is not there yet, unless whoever writes it `replaces` it; its folder is there,
    unless that `makes_folder`.

    Raises:
        UserError: it is there already, or its folder is not, or cannot be written in.
    """
    if not given.strip():
        raise UserError("--out needs the name of a file")
    out = Path(given).expanduser()
    if out.is_dir():
        raise UserError(f"--out {given} is a folder: name a file in it")
    if out.exists() and not replaces:
        raise UserError(f"--out {given} is there already: name another file, or remove it first")
    folder = next(path for path in out.parents if path.exists()) if makes_folder else out.parent
    if folder.is_file():
        raise UserError(f"--out {given}: {str(folder)!r} is a file, and no folder: name another")
    _check_folder(folder / out.name, f"--out {given}")
    return out


def json_file(given: str) -> Path:
    """The path of ``--json``, which can be written; a file of that kind that is there makes room.

    Raises:
        UserError: it is a folder or a file of another kind, or its folder is not there or not to be written in.
    """
    path = Path(given).expanduser()
    if not given.strip():
        raise UserError("--json needs a file")
    if path.is_dir():
        raise UserError(f"--json {given!r} is a folder: name a file in it")
    if path.is_file() and path.suffix.lower() != ".json" and not given.startswith("/dev/"):
        raise UserError(f"--json {given} is there already, and is no .json file: name another")
    _check_folder(path, f"--json {given}")
    return path


def json_target(given: str | None) -> Path | None:
    """Where a report as JSON goes: None for none at all, and for ``-``, which is the output.

    Raises:
        UserError: as `json_file`.
    """
    return None if given in (None, "-") else json_file(str(given))


def write_json(given: str | None, target: Path | None, content: object) -> None:
    """The report, where ``--json`` asked for it."""
    if given is None:
        return
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    if target is None:
        sys.stdout.write(text)
    else:
        target.write_text(text, encoding="utf-8")


def _check_folder(path: Path, named: str) -> None:
    if not path.absolute().parent.is_dir():
        raise UserError(f"{named}: there is no folder {str(path.parent)!r}: create it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"{named}: the folder {str(path.parent)!r} cannot be written in: name another")
