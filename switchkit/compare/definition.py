"""What is compared: recipes named on the command line, or a file that names runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from switchkit.cli.errors import UserError, near, short
from switchkit.cli.recipes import find_config, is_comparison, read_config
from switchkit.cli.sources import Source

__all__ = ["Definition", "Entry", "define"]

_KEYS = ("base", "runs", "seeds", "budget", "twin", "equal_flops")


@dataclass(frozen=True)
class Entry:
    """One run of a comparison: its name, and the configurations that it is merged from."""

    name: str
    configs: tuple[str | Source, ...]


@dataclass(frozen=True)
class Definition:
    """A comparison as it is written."""

    name: str
    title: str
    """What it compares: the first comment of its file."""
    entries: tuple[Entry, ...]
    seeds: int | None = None
    budget: str | None = None
    twin: str | None = None
    equal_flops: Mapping[str, str] = field(default_factory=dict)
    """Runs that get as many steps as cost what another run's steps cost, whatever the budget: name, and the other's."""


def define(names: Sequence[str]) -> Definition:
    """The comparison that a command line names: one file with `runs`, or several recipes.

    Raises:
        UserError: no such file, one recipe alone, two recipes of one name, a comparison among recipes, or a comparison
            that is not written as it should be.
    """
    found = []
    for name in names:
        path = find_config(name, "")
        found.append((name, path, read_config(path)))
    several = [name for name, _, values in found if is_comparison(values)]
    if several and len(found) > 1:
        raise UserError(f"compare: {several[0]} is a comparison already; give it alone, or recipes only")
    if several:
        _, path, values = found[0]
        return _from_file(path, values)
    if len(found) < 2:
        raise UserError(
            "compare needs two recipes or more, or one comparison (`switchkit list comparisons`): "
            "switchkit compare tiny_shakespeare tiny_shakespeare_dense"
        )
    entries = tuple(Entry(_run_name(path.stem, "recipe"), (name,)) for name, path, _ in found)
    known = [entry.name for entry in entries]
    twice = next((name for name in known if known.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"compare: two recipes are called {twice!r}; name runs in a comparison file, see docs/compare.md"
        )
    title = f"{', '.join(known[:-1])} and {known[-1]}"
    return Definition("_vs_".join(known)[:80], title, entries)


def _from_file(path: Path, values: Mapping[str, Any]) -> Definition:
    for key in values:
        if key not in _KEYS:
            raise UserError(f"{path}: a comparison has no key {key!r}{near(key, _KEYS)} Keys: {', '.join(_KEYS)}")
    runs = values["runs"]
    if not isinstance(runs, Mapping) or len(runs) < 2:
        raise UserError(
            f"{path}: runs: expected a mapping of two runs or more, name: configurations; got {short(runs)}"
        )
    base = _configs(values.get("base"), path, "base")
    runs = {_run_name(name, f"{path}: run"): own for name, own in runs.items()}
    entries = [Entry(name, (*base, *_configs(own, path, f"runs.{name}"))) for name, own in runs.items()]
    seeds, twin, budget = values.get("seeds"), values.get("twin"), values.get("budget")
    if seeds is not None and (not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1):
        raise UserError(f"{path}: seeds: expected a number of seeds from 1 up, got {short(seeds)}")
    twin = None if twin is None else str(twin)
    if twin is not None and twin not in runs:
        raise UserError(f"{path}: twin: no run is called {twin!r}{near(twin, runs)} Runs: {', '.join(runs)}")
    equal = _equal_flops(values.get("equal_flops"), path, runs)
    comments = (line[1:].strip() for line in path.read_text("utf-8").splitlines() if line.startswith("#"))
    return Definition(path.stem, next(comments, path.stem), tuple(entries), seeds, budget, twin, equal)


def _equal_flops(given: Any, path: Path, runs: Mapping[str, Any]) -> dict[str, str]:
    """Run names to run names, as text, none of which is on both sides."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise UserError(f"{path}: equal_flops: expected a mapping of a run to a run, got {short(given)}")
    given = {str(name): str(other) for name, other in given.items()}
    for name in (*given, *given.values()):
        if name not in runs:
            raise UserError(f"{path}: equal_flops: no run is called {name!r}{near(name, runs)} Runs: {', '.join(runs)}")
    both = next((name for name in given if name in given.values()), None)
    if both is not None:
        raise UserError(f"{path}: equal_flops: {both} takes its steps from another run, so that none can take {both}'s")
    return given


def _configs(given: Any, path: Path, key: str) -> tuple[str | Source, ...]:
    """A configuration or a list of them: names of files and recipes, or mappings that are merged over."""
    parts = [] if given is None else given if isinstance(given, list) else [given]
    found: list[str | Source] = []
    for part in parts:
        if isinstance(part, str):
            beside = path.parent / part
            found.append(str(beside) if beside.is_file() else part)
        elif isinstance(part, Mapping):
            found.append(Source(part, f"{path}: {key}", path.parent))
        else:
            raise UserError(
                f"{path}: {key}: expected the name of a recipe, a mapping, or a list of these; got {short(part)}"
            )
    return tuple(found)


def _run_name(name: Any, what: str) -> str:
    """The name, if it can be one of a folder and of a curve in a picture, which leaves out those that begin with _."""
    text = str(name)
    if isinstance(name, bool) or name is None:
        raise UserError(f"{what} {text}: YAML reads this as no text: write the name in quotes")
    if not text or not all(c.isalnum() or c in "-_.+" for c in text) or text[0] in "._":
        raise UserError(
            f"{what} {short(name)}: letters, digits and - _ . + only, and none of _ and . first, for it names a folder"
        )
    return text
