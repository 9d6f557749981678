"""What a constructor takes, and which of its parameters name a class, read from its signature."""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import enum
import inspect
import os
import sys
import textwrap
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin

__all__ = ["Parameter", "Place", "Signature", "members", "place_of", "signature_of", "word"]

_WORDS = {
    "Router": "router",
    "CapacityPolicy": "capacity policy",
    "Experts": "experts",
    "Loss": "loss",
    "Dispatcher": "dispatcher",
    "LightningModule": "model",
    "LightningDataModule": "data module",
    "Module": "class",
}


@dataclass(frozen=True)
class Place:
    """What the type of a parameter says about the classes that may stand there."""

    bases: tuple[type, ...]
    given: frozenset[str] = frozenset()
    """Parameters that whoever calls a factory passes, and a configuration does not."""
    own: frozenset[str] = frozenset()
    """Of these, those that it passes only where the configuration has none: they have a default in the protocol."""
    one: bool = True
    many: bool = False
    """A list of parts is accepted."""
    text: bool = False
    """Plain text is accepted too (``strategy: ddp``)."""
    positional: int = 0
    """The first parameters, by number, that a ``Callable[[...], ...]`` is called with."""
    factory: bool = False

    @property
    def word(self) -> str:
        return word(self.bases[0] if self.bases else object)


@dataclass(frozen=True)
class Parameter:
    hint: Any
    required: bool


@dataclass(frozen=True)
class Signature:
    parameters: dict[str, Parameter]
    open: bool
    """It takes further keywords that the signature does not name."""


def members(hint: Any) -> list[Any]:
    """The alternatives of a type: itself, or the members of a union."""
    if get_origin(hint) in (Union, types.UnionType):
        found = [member for argument in get_args(hint) for member in members(argument)]
        # A tensor cannot be written down: `lr: float | Tensor` is a number here.
        return [member for member in found if getattr(member, "__name__", "") != "Tensor"] or found
    if get_origin(hint) is typing.Annotated:
        return members(get_args(hint)[0])
    return [hint]


def word(base: type) -> str:
    """What an error calls the classes below `base`."""
    return _WORDS.get(base.__name__, base.__name__)


@cache
def place_of(hint: Any) -> Place | None:
    """The place that a type describes, or None if no class is named there."""
    found: list[Place] = []
    for member in members(hint):
        inner = [place_of(argument) for argument in get_args(member)] if _is_list(member) else []
        if inner and inner[0] is not None:
            found.append(dataclasses.replace(inner[0], one=False, many=True))
        elif (returned := _returned(member)) is not None:
            found.append(returned)
        elif _is_part(member):
            found.append(Place((member,)))
    if not found:
        return None
    return Place(
        bases=tuple(dict.fromkeys(base for place in found for base in place.bases)),
        given=frozenset().union(*(place.given for place in found)),
        own=frozenset().union(*(place.own for place in found)),
        one=any(place.one for place in found),
        many=any(place.many for place in found),
        text=any(member in (str, Any) or get_origin(member) is typing.Literal for member in members(hint)),
        positional=max(place.positional for place in found),
        factory=any(place.factory for place in found),
    )


@cache
def signature_of(target: Callable[..., Any]) -> Signature:
    """What a class's constructor (through its bases, as far as it passes ``**kwargs`` on) or a function takes."""
    found: dict[str, Parameter] = {}
    functions = (
        [vars(c)["__init__"] for c in target.__mro__ if "__init__" in vars(c)] if inspect.isclass(target) else [target]
    )
    passed: set[str] = set()
    for function in functions:
        if function is object.__init__:
            break
        try:
            parameters = list(inspect.signature(function).parameters.values())[1 if inspect.isclass(target) else 0 :]
        except (TypeError, ValueError):
            return Signature(found, open=True)
        hints = _hints(function)
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                required = parameter.default is parameter.empty and parameter.name not in passed
                found.setdefault(parameter.name, Parameter(hints.get(parameter.name, Any), required))
        passed |= _passed(function)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return Signature(found, open=False)
    return Signature(found, open=bool(functions) and functions[0] is not object.__init__)


def _passed(constructor: Callable[..., Any]) -> set[str]:
    """What a constructor gives its base by name, as TensorBoardLogger gives ``root_dir=save_dir``."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(constructor)))
    except (OSError, TypeError, SyntaxError):
        return set()
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    ours = (call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "__init__")
    return {keyword.arg for call in ours for keyword in call.keywords if keyword.arg is not None}


def _is_list(hint: Any) -> bool:
    origin = get_origin(hint)
    return (
        inspect.isclass(origin)
        and issubclass(origin, collections.abc.Iterable)
        and not issubclass(origin, (dict, tuple))
    )


def _is_part(hint: Any) -> bool:
    if not inspect.isclass(hint) or get_origin(hint) is not None or dataclasses.is_dataclass(hint):
        return False
    package = hint.__module__.partition(".")[0]
    if hint.__module__ in ("torch", "torch._tensor") or package in sys.stdlib_module_names or package == "jsonargparse":
        return False
    return not issubclass(hint, (int, float, str, bytes, dict, list, tuple, set, os.PathLike, enum.Enum))


def _returned(hint: Any) -> Place | None:
    """The place of a factory: a Protocol with `__call__`, or ``Callable[[...], Part]``."""
    if getattr(hint, "_is_protocol", False) and "__call__" in vars(hint):
        call = vars(hint)["__call__"]
        returned = _hints(call).get("return", Any)
        given = list(inspect.signature(call).parameters.values())[1:]
        own = frozenset(parameter.name for parameter in given if parameter.default is not parameter.empty)
        bases = tuple(member for member in members(returned) if inspect.isclass(member) and member is not type(None))
        return Place(bases, frozenset(parameter.name for parameter in given), own, factory=True)
    if get_origin(hint) is collections.abc.Callable:
        *passed, returned = get_args(hint) or ([], Any)
        bases = tuple(member for member in members(returned) if _is_part(member))
        count = len(passed[0]) if passed and isinstance(passed[0], list) else len(passed)
        return Place(bases, positional=count, factory=True) if bases else None
    return None


def _hints(function: Any) -> dict[str, Any]:
    function = inspect.unwrap(function)
    try:
        return typing.get_type_hints(function)
    except Exception:
        # One name that only a type checker knows must not hide the others.
        found = {}
        for name, annotation in getattr(function, "__annotations__", {}).items():
            if isinstance(annotation, str):
                try:
                    annotation = eval(annotation, getattr(function, "__globals__", {}))
                except Exception:
                    annotation = Any
            found[name] = annotation
        return found
