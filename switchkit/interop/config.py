"""The settings of config.json, each read with its type, and refused by name where they cannot be had exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

__all__ = ["MOST", "REQUIRED", "Config"]

T = TypeVar("T")
REQUIRED: Any = object()
MOST = 2**31 - 1


class Config:
    """What a config.json says. A key that a model's own code never reads does nothing there, and is left alone here.

    Methods take a key, or several that mean the same (Hugging Face renames some between versions), and a default for
    when it is absent or null: the one that transformers has. Without one the key must be there. `tensors` is how many
    the files hold: no model has more layers, or more experts.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json", tensors: int = MOST) -> None:
        self.values, self.where, self.tensors = values, where, tensors

    def refuse(self, name: str, why: str) -> NoReturn:
        """Raise what is wrong with a key.

        Raises:
            ValueError: always; names the file, the key and its value.
        """
        raise ValueError(f"{self.where}: {name}={_short(self.values.get(name))}: {why}")

    def get(self, *names: str) -> tuple[str, Any]:
        """The name under which a value stands (the first, if none), and the value; null: none."""
        given = [name for name in names if self.values.get(name) is not None]
        for name in given[1:]:
            if self.values[name] != self.values[given[0]]:
                self.refuse(name, f"{given[0]}={_short(self.values[given[0]])} means the same and says otherwise")
        return (given[0], self.values[given[0]]) if given else (names[0], None)

    def integer(self, *names: str, default: int | None = REQUIRED, least: int = 1) -> Any:
        name, value = self.get(*names)
        if value is None:
            return self._default(name, default)
        if type(value) is not int or not least <= value <= MOST:
            self.refuse(name, f"must be an integer from {least} to {MOST}")
        return value

    def count(self, *names: str, default: int | None = REQUIRED) -> Any:
        """A number of layers or experts, each of which has tensors."""
        found = self.integer(*names, default=default)
        if found is not None and found > self.tensors:
            self.refuse(self.get(*names)[0], f"the files hold {self.tensors} tensors, too few for that")
        return found

    def number(self, *names: str, default: float = REQUIRED, least: float = 0.0, above: bool = False) -> float:
        name, value = self.get(*names)
        if value is None:
            return self._default(name, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value < least or (above and value == least):
            self.refuse(name, f"must be a number {'above' if above else 'of at least'} {least}")
        return float(value)

    def flag(self, *names: str, default: bool) -> bool:
        name, value = self.get(*names)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, "must be true or false")
        return value

    def word(self, *names: str, accepted: Mapping[str, T], default: str = REQUIRED) -> T:
        """What a word stands for."""
        name, value = self.get(*names)
        if value is None:
            value = self._default(name, default)
        if not isinstance(value, str) or value not in accepted:
            self.refuse(name, f"known here are {', '.join(accepted)}")
        return accepted[value]

    def integers(self, name: str, *, below: int) -> list[int]:
        """A list of layers; absent: none."""
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(type(item) is int and 0 <= item < below for item in value):
            self.refuse(name, f"must be a list of layers, 0 to {below - 1}")
        return list(value)

    def only(self, name: str, accepted: Sequence[Any], why: str) -> None:
        """Refuse any other value; absent and null are fine."""
        value = self.values.get(name)
        if value is not None and value not in accepted:
            self.refuse(name, why)

    def within(self, name: str) -> Config:
        """The object that a key holds; empty if it is absent."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            self.refuse(name, "must be an object")
        return Config(value or {}, f"{self.where}: {name}")

    def _default(self, name: str, default: Any) -> Any:
        if default is REQUIRED:
            raise ValueError(f"{self.where} lacks {name}, without which the model cannot be built")
        return default


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
