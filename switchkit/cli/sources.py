"""Where settings come from: files, variables of the environment, options of a command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from switchkit.cli.errors import UserError
from switchkit.cli.recipes import read_config

__all__ = ["Edit", "Source", "edit", "subconfig"]


class Edit(dict[str, Any]):
    """A change that a command line makes: it touches what it names and nothing beside it."""


@dataclass(frozen=True)
class Source:
    """One configuration: where it comes from, and what it says."""

    values: Mapping[str, Any]
    label: str = ""
    """How an error names it: a file, or empty for the command line."""
    folder: Path | None = None
    """Where its sub-configurations lie."""

    @property
    def typed(self) -> bool:
        """Whether its values are text still to be read, as those of a command line are."""
        return isinstance(self.values, Edit)

    @property
    def variable(self) -> bool:
        """Whether it is a variable of the environment: text that was not typed."""
        return self.typed and bool(self.label)

    def where(self, key: str) -> str:
        return f"{self.label}: {key}" if self.label else f"--{key}"

    def without(self, key: str) -> Source:
        """The same, but for what it says of a key at the top."""
        return self._with({name: value for name, value in self.values.items() if name != key})

    def by_key(self) -> Iterator[Source]:
        """The same in pieces, each what it says of one key at the top."""
        return (self._with({key: value}) for key, value in self.values.items())

    def _with(self, values: dict[str, Any]) -> Source:
        return replace(self, values=Edit(values) if self.typed else values)


def edit(key: str, value: str, label: str = "") -> Source:
    """The source that sets one dotted key, as ``--model.moe.router.k 3`` does."""
    values: Any = value
    for name in reversed(key.split(".")):
        values = Edit({name: values})
    return Source(values, label)


def subconfig(name: str, source: Source) -> Source | None:
    """What a part's value stands for that is the name of a file; None: it is none."""
    if not name.endswith((".yaml", ".yml", ".json")):
        return None
    path = (source.folder or Path()) / name
    if not path.is_file():
        raise UserError(f"{source.label or 'command line'}: there is no file {str(path)!r}")
    return Source(read_config(path), str(path), path.parent)
