"""What parts say of themselves when a model is printed."""

from __future__ import annotations

import inspect

from torch import nn

__all__ = ["options"]


def options(part: nn.Module, *always: str) -> str:
    """The sizes of a part, its options that are not the default, and those named `always`: as its attributes have them.

    Numbers, words and truth values alone: other parts are printed by themselves.
    """
    found: dict[str, str] = {}
    # A class of one's own may take its base's options as **options.
    for cls in reversed(type(part).__mro__):
        for name, given in inspect.signature(cls.__init__).parameters.items():  # type: ignore[misc]
            value = vars(part).get(name)
            if isinstance(value, int | float | str) and (value != given.default or name in always):
                found[name] = f"{name}={value!r}"
    return ", ".join(found.values())
