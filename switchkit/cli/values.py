"""Checking plain values (numbers, texts, choices and lists of them) against the type of a parameter."""

from __future__ import annotations

import types
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal, get_args, get_origin

import yaml

from switchkit.cli.errors import UserError, near, short
from switchkit.cli.recipes import load_yaml
from switchkit.cli.signatures import members

__all__ = ["convert"]

_NOTHING = object()
_WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}


def convert(value: Any, hint: Any, where: str, *, typed: bool) -> Any:
    """`value` as its parameter takes it; `typed`: it is text from a command line, to be read as YAML where that fits.

    Types that are not plain are left to jsonargparse.

    Raises:
        UserError: a plain type and a value that is not of it.
    """
    if not _plain(hint):
        return value
    found = _NOTHING
    if typed and value == "" and str in members(hint):
        return value  # YAML has null there, and a variable of the shell that was never set would be a default
    if typed and isinstance(value, str):
        with suppress(yaml.YAMLError):
            found = _accept(load_yaml(value), hint, text=False)
    if found is _NOTHING:
        found = _accept(value, hint, text=True)
    if found is _NOTHING:
        choices = [choice for member in members(hint) for choice in _choices(member)]
        nearest = near(value, [str(choice) for choice in choices]) if isinstance(value, str) and choices else "."
        raise UserError(f"{where}: expected {describe(hint)}, got {short(value)}{nearest if nearest != '.' else ''}")
    return found


def describe(hint: Any) -> str:
    """A plain type in words."""
    words = []
    for member in members(hint):
        if get_origin(member) is Literal:
            words += [repr(choice) for choice in get_args(member)]
        elif get_origin(member) is not None:
            words.append(f"a list of ({describe(get_args(member)[0])})")
        else:
            words.append(_WORDS[member])
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _plain(hint: Any) -> bool:
    for member in members(hint):
        if get_origin(member) in (list, Sequence):
            if not _plain(get_args(member)[0]):
                return False
        elif get_origin(member) is not Literal and member not in _WORDS:
            return False
    return True


def _accept(value: Any, hint: Any, text: bool) -> Any:
    """The value, if some member of the type takes it; texts only if `text`."""
    for member in members(hint):
        origin = get_origin(member)
        if origin is Literal:
            if any(value == choice and type(value) is type(choice) for choice in get_args(member)):
                return value
        elif origin is not None:
            if isinstance(value, list):
                items = [_accept(item, get_args(member)[0], text=True) for item in value]
                if not any(item is _NOTHING for item in items):
                    return items
        elif member is float and type(value) in (int, float):
            # An int stays one where the type allows both.
            return value if int in members(hint) else float(value)
        elif type(value) is member and (member is not str or text):
            return value
    return _NOTHING
