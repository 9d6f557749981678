"""Checking of the shapes that signatures promise, in tests only: jaxtyping's import hook with beartype.

A function that takes a ``Float[Tensor, "G S E"]`` is checked at every call; constructors have plain annotations and are
left to their own ValueErrors.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import beartype
import jaxtyping

PACKAGE = Path(__file__).parent.parent / "switchkit"
FOLDERS = ("routing", "capacity", "experts", "losses", "dispatch", "attention", "models", "convert")
FILES = ("records", "stats", "layers", "blocks")


def modules() -> list[str]:
    """Every file that computes on tensors, but those that hand a function to torch's schema reader."""
    found = [PACKAGE / f"{name}.py" for name in FILES]
    found += [path for name in FOLDERS for path in sorted((PACKAGE / name).glob("*.py")) if path.stem != "__init__"]
    # torch.library.custom_op evaluates annotations in the globals of what it is given, which is not a wrapper's.
    found = [path for path in found if "custom_op(" not in path.read_text(encoding="utf-8")]
    return [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in found]


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, where a signature names a shape."""
    hints = getattr(function, "__annotations__", {}).values()
    return beartype.beartype(function) if any("[Tensor" in str(hint) for hint in hints) else function


def install() -> None:
    early = [name for name in modules() if name in sys.modules]
    if early:
        raise RuntimeError(f"imported before its shapes could be checked: {', '.join(early)}")
    jaxtyping.install_import_hook(modules(), "shapes.check")


@contextmanager
def unchecked() -> Iterator[None]:
    """Without the checks, which torch.compile cannot trace."""
    wrapped = {}
    for name in modules():
        for cls in vars(importlib.import_module(name)).values():
            if dataclasses.is_dataclass(cls) and hasattr(cls.__init__, "__wrapped__"):
                wrapped[cls] = cls.__init__
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        for cls, init in wrapped.items():
            cls.__init__ = init.__wrapped__
        yield
    finally:
        for cls, init in wrapped.items():
            cls.__init__ = init
        jaxtyping.config.update("jaxtyping_disable", before)
