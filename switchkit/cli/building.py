"""Why a part of the settings could not be built, told by its own complaint."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator

from lightning.fabric.utilities.exceptions import MisconfigurationException

from switchkit.cli.errors import UserError
from switchkit.cli.parser import rewrite

__all__ = ["reason"]

_OF_A_LIST = re.compile(r"Problem with given class_path '([^']*)':\s*(.*?)\s*(?=\n *- |\n *Given value|$)", re.DOTALL)
"""Where jsonargparse keeps no cause, its text still has one among what it tried."""


def reason(error: BaseException) -> BaseException:
    """What a constructor raised, without jsonargparse's report of all members of the union that it tried."""
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
    return UserError(str(error)) if isinstance(error, MisconfigurationException) else error


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
