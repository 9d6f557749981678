"""Short names for parts.

One flat table maps a name to a class, whatever its kind. Names serve recipes (``router: top_k``), ``switchkit list``
and the contract tests; saved configurations and checkpoints hold the full import path. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable
from typing import TypeVar

__all__ = ["KINDS", "all_parts", "full_path", "lookup", "name_of", "named", "nearest", "register", "resolve"]

T = TypeVar("T")

# Kind, as `switchkit list` prints it -> the base class that decides it. Each base lives in `<package>.base`.
KINDS = {
    "routers": "switchkit.routing.base.Router",
    "capacity": "switchkit.capacity.base.CapacityPolicy",
    "experts": "switchkit.experts.base.Experts",
    "losses": "switchkit.losses.base.Loss",
    "dispatchers": "switchkit.dispatch.base.Dispatcher",
}

_table: dict[str, type] = {}
_searched: set[str] = set()


def register(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: give a part its short name.

    Raises:
        ValueError: no name; the name belongs to another class already (both import paths are named).
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"register needs a name in parentheses, such as @register('my_router'); got {name!r}")

    def decorate(cls: type[T]) -> type[T]:
        known = _table.get(name)
        if known is not None and full_path(known) != full_path(cls):
            raise ValueError(
                f"the name {name!r} is taken: {full_path(known)} has it, {full_path(cls)} asks for it; "
                "register yours under another name"
            )
        _table[name] = cls
        return cls

    return decorate


def full_path(cls: type) -> str:
    """Import path of a class, as configurations and checkpoints hold it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def named(base: type[T]) -> dict[str, type[T]]:
    """The registered subclasses of `base` by name, in order of name: ``named(Router)["top_k"]``."""
    _search(base.__module__.rpartition(".")[0])
    return {name: cls for name, cls in sorted(_table.items()) if issubclass(cls, base)}


def lookup(name: str, base: type[T] | None = None) -> type[T]:
    """The class registered under `name` (a subclass of `base`, if given).

    Raises:
        ValueError: unknown name; lists the known ones, the nearest first.
    """
    known = all_parts() if base is None else named(base)
    if name in known:
        return known[name]
    kind = "part" if base is None else base.__name__
    raise ValueError(
        f"unknown {kind} {name!r}{nearest(name, known) or '.'} Registered: {', '.join(known)}. "
        "A class of your own needs its full path (my_file.MyClass) or plugins: [my_file]"
    )


def resolve(path: str) -> type | None:
    """The class of an import path or registered name, without importing anything: None if it is not imported yet."""
    known = all_parts()
    if path in known:
        return known[path]
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None) if module else None
    return found if isinstance(found, type) else None


def name_of(cls: type) -> str:
    """The short name of a class, or the class's own name."""
    return next((name for name, known in _table.items() if known is cls), cls.__name__)


def nearest(word: str, known: object) -> str:
    """``". Did you mean 'top_k'?"`` or the empty string."""
    # Of a short word one letter is much.
    least = 0.5 if len(word) < 5 else 0.6
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=least)  # type: ignore[call-overload]
    return f". Did you mean {close[0]!r}?" if close else ""


def all_parts() -> dict[str, type]:
    """Every registered class by its name, after the package's own are imported."""
    for base in KINDS.values():
        _search(base.rpartition(".")[0].rpartition(".")[0])
    return dict(sorted(_table.items()))


def _search(package: str) -> None:
    """Import every file of a part's package once, so that adding a part touches its own file only."""
    if package in _searched or package not in {base.rsplit(".", 2)[0] for base in KINDS.values()}:
        return
    _searched.add(package)
    module = importlib.import_module(package)
    for info in pkgutil.iter_modules(module.__path__):
        importlib.import_module(f"{package}.{info.name}")
