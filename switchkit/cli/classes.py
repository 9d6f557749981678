"""Which class a configuration means by a name."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from typing import Any

from switchkit import registry
from switchkit.cli.errors import UserError, near
from switchkit.cli.signatures import Place, word

__all__ = ["check_strategy", "find_class", "named_strategy"]


def find_class(name: str, place: Place, where: str) -> Any:
    """The class or function that a configuration calls `name`.

    In order: a registered part, a public name of switchkit, a full import path (imported: the user trusts the recipe),
    the name of an imported subclass.

    Raises:
        UserError: nothing is called so, or what is does not belong at this place.
    """
    table = {short: cls for base in place.bases for short, cls in _registered(base).items()}
    found = table.get(name)
    if found is None and "." in name:
        found = _import(name, where)
    elif found is None:
        found = _public(name, place) or _imported(name, place, where)
    if found is None:
        other = registry.resolve(name)
        if other is not None:
            raise UserError(
                f"{where}: {name!r} is {_one(_kind(other))}, not {_one(place.word)}. Accepted: {_names(table, place)}"
            )
        raise UserError(
            f"{where}: unknown {place.word} {name!r}{near(name, [*table, *_short_names(place)])} "
            f"Accepted: {_names(table, place)}. A class of your own: its full path (my_file.MyClass), "
            "or plugins: [my_file]"
        )
    _check(found, name, place, table, where)
    return found


def named_strategy(name: Any, place: Place) -> tuple[type, dict[str, Any]] | None:
    """The class and the arguments that Lightning has registered for the name of a strategy, or None.

    Lightning takes such a name only by itself; with settings of its own it must be the class.
    """
    from lightning.pytorch.strategies import Strategy, StrategyRegistry

    if not isinstance(name, str) or name not in StrategyRegistry or Strategy not in place.bases:
        return None
    entry = StrategyRegistry[name]
    return entry["strategy"], dict(entry["init_params"])


def check_strategy(name: str, place: Place, where: str) -> None:
    """Let a text pass where a strategy may stand, if Lightning will know it.

    Raises:
        UserError: it is the name of no strategy.
    """
    from lightning.pytorch.strategies import Strategy, StrategyRegistry

    known = ["auto", *StrategyRegistry]
    if Strategy not in place.bases or name.lower() in known:
        return
    short = [name for name in known if "_" not in name or name.startswith("expert_parallel")]
    size = name.removeprefix("expert_parallel_")
    raise UserError(
        f"{where}: to share experts out over {size} devices: --trainer.strategy expert_parallel "
        f"--trainer.strategy.expert_parallel_size {size}"
        if size.isdecimal() and int(size) > 0
        else f"{where}: unknown strategy {name!r}{near(name, known)} Accepted: {', '.join(short)}, variants "
        "of these that Lightning has, or a class by its path"
    )


def _check(found: Any, name: str, place: Place, table: dict[str, type], where: str) -> None:
    if not inspect.isclass(found):
        if not callable(found):
            raise UserError(f"{where}: {name} is a {type(found).__name__}, not a class")
        if not place.factory:
            raise UserError(f"{where}: {name} is a function; a class is needed here")
        return
    fits = not place.bases or any(
        getattr(base, "_is_protocol", False) or issubclass(found, base) for base in place.bases
    )
    # An object that is itself the factory, such as a class of optimizer settings with a __call__.
    calls = place.factory and registry.full_path(found) not in map(registry.full_path, _parts().values())
    calls = calls and any("__call__" in vars(c) for c in found.__mro__ if c.__module__.partition(".")[0] != "torch")
    if not fits and not calls:
        raise UserError(
            f"{where}: {name} is not {_one(place.word)}: it must be a subclass of {place.bases[0].__name__}"
        )
    if inspect.isabstract(found) or any(_left_open(found, base) for base in place.bases):
        raise UserError(
            f"{where}: {name} is an abstract base; name one of its subclasses: {_names(table, place) or 'your own'}"
        )


def _left_open(cls: type, base: type) -> bool:
    """Whether `cls` leaves the method that makes a part to its kind's base."""
    if registry.full_path(base) not in registry.KINDS.values():
        return False
    return cls is base or any(
        method in vars(base) and getattr(cls, method) is vars(base)[method]
        for method in ("forward", "limit", "dispatch", "__call__")
    )


def _registered(base: type) -> dict[str, type]:
    if any(issubclass(kind, base) or issubclass(base, kind) for kind in _kinds()) and base is not object:
        return {name: cls for name, cls in _parts().items() if issubclass(cls, base)}
    return {}


def _kinds() -> list[type]:
    found: list[type] = []
    for path in registry.KINDS.values():
        module, _, name = path.rpartition(".")
        found.append(getattr(importlib.import_module(module), name))
    return found


def _parts() -> dict[str, type]:
    found: dict[str, type] = {}
    for kind in _kinds():
        found.update(registry.named(kind))
    return found


def _kind(cls: type) -> str:
    return next((word(kind) for kind in _kinds() if issubclass(cls, kind)), "part")


def _one(word: str) -> str:
    return word if word == "experts" else f"a {word}"


def _public(name: str, place: Place) -> Any:
    """A public name of switchkit, if it is fit for the place."""
    import switchkit

    if name not in switchkit.__all__ or not name[:1].isupper():
        return None
    found = getattr(switchkit, name)
    if inspect.isclass(found) and (place.factory or any(issubclass(found, base) for base in place.bases)):
        return found
    return None


def _imported(name: str, place: Place, where: str) -> Any:
    found = {registry.full_path(cls): cls for base in place.bases for cls in _subclasses(base) if cls.__name__ == name}
    found = {path: cls for path, cls in found.items() if cls.__module__ != "__main__"} or found
    if len(found) > 1:
        raise UserError(
            f"{where}: several classes are called {name!r}; write the full path: {', '.join(sorted(found))}"
        )
    return next(iter(found.values()), None)


def _subclasses(base: type) -> Iterator[type]:
    # Of a base as wide as nn.Module, only the user's and switchkit's own may be named without their path.
    wide = base.__module__.startswith("torch.nn")
    seen: set[type] = set()
    stack = [base]
    while stack:
        cls = stack.pop()
        if cls in seen:
            continue
        seen.add(cls)
        stack += type.__subclasses__(cls)
        package = cls.__module__.partition(".")[0]
        if not cls.__name__.startswith("_") and not (wide and package in ("torch", "lightning", "torchmetrics")):
            yield cls


def _short_names(place: Place) -> list[str]:
    names = {cls.__name__ for base in place.bases for cls in _subclasses(base) if not inspect.isabstract(cls)}
    return sorted(names - {base.__name__ for base in place.bases})


def _names(table: dict[str, type], place: Place) -> str:
    if table:
        return ", ".join(table)
    ours = [cls for base in place.bases for cls in _subclasses(base) if cls.__module__.startswith("switchkit")]
    names = sorted({cls.__name__ for cls in ours if not inspect.isabstract(cls)}) or _short_names(place)
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def _import(path: str, where: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        home = importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and (module + ".").startswith(error.name + "."):
            outer, _, inner = module.rpartition(".")
            holder = getattr(sys.modules.get(outer), inner, None)
            if inspect.isclass(holder) and hasattr(holder, name):
                return getattr(holder, name)
            raise UserError(
                f"{where}: cannot import {path!r}: no module named {error.name!r} in the working directory "
                f"{os.getcwd()}, beside a given recipe or installed"
            ) from error
        raise UserError(f"{where}: cannot import {path!r}: {type(error).__name__}: {error}") from error
    if not hasattr(home, name):
        known = [attribute for attribute in dir(home) if not attribute.startswith("_")]
        raise UserError(f"{where}: module {module!r} has no {name!r}{near(name, known)}")
    return getattr(home, name)
