"""Why a part of the settings could not be built, told by its own complaint."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from switchkit.cli.errors import UserError
from switchkit.cli.parser import rewrite

__all__ = ["reason"]

_OF_A_LIST = re.compile(r"Problem with given class_path '([^']*)':\s*(.*?)\s*(?=\n *- |\n *Given value|$)", re.DOTALL)
"""Where jsonargparse keeps no cause, its text still has one among what it tried."""


def reason(error: BaseException, tree: Mapping[str, Any]) -> BaseException:
    """What a constructor raised, without jsonargparse's report of all members of the union that it tried.

    `tree`: the settings; a complaint that begins with a parameter's name gets its key before it.
    """
    outer = error
    while error.__cause__ is not None and _module_of(error).startswith("jsonargparse."):
        error = error.__cause__
    if isinstance(error, ImportError) or _module_of(error).startswith("jsonargparse."):
        # A package that a class needs, as TensorBoardLogger does. Of a list jsonargparse keeps no cause.
        missing = next((one for one in _behind(outer) if isinstance(one, ImportError)), None)
        if missing is not None:
            return UserError(str(missing))
        part = _OF_A_LIST.search(str(outer))
        if part is not None:
            return UserError(f"{part[1]}: {part[2]}")
        text = rewrite(str(error)).partition(" Subclass types expect")[0]
        return UserError(f"{text}: a class there cannot be built")
    if isinstance(error, MisconfigurationException):
        return UserError(str(error))
    key = _key(str(error), tree) if isinstance(error, ValueError) else None
    return error if key is None else UserError(f"{key}: {error}")


def _key(complaint: str, tree: Mapping[str, Any]) -> str | None:
    """The dotted key of the first parameter that a complaint names with its value ("jitter must be ...; got 3.0").

    None where several keys have both, or the complaint has a key already.
    """
    found: dict[int, list[str]] = {}
    for key, value in _settings(tree):
        name = re.search(rf"(?<![\w.]){re.escape(key.rpartition('.')[2])}\b", complaint)
        if name is not None and _said(value, complaint):
            found.setdefault(name.start(), []).append(key)
    keys = found[min(found)] if found else []
    return keys[0] if len(keys) == 1 and not re.search(r"\b(model|data|trainer)\.\w", complaint) else None


def _settings(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a tree with its key as a command line has it: without ``init_args``."""
    for name, value in tree.items():
        key = above if name in ("init_args", "dict_kwargs") else f"{above}.{name}" if above else name
        if isinstance(value, Mapping):
            yield from _settings(value, key)
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for number, item in enumerate(value):
                if isinstance(item, Mapping):
                    yield from _settings(item, f"{key}[{number}]")
        else:
            yield key, value


def _said(value: Any, complaint: str) -> bool:
    """Whether a complaint names a value, or what a number became."""
    words = [str(value), *([str(float(value))] if isinstance(value, (int, float)) else [])]
    return any(word and re.search(rf"(?<![\w.]){re.escape(word)}(?![\w.]*\w)", complaint) for word in words)


def _behind(error: BaseException) -> Iterator[BaseException]:
    """An error, and each that it came from or was raised in the handling of."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [other for other in (one.__context__, one.__cause__) if other is not None]


def _module_of(error: BaseException) -> str:
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__")) if frames else ""
