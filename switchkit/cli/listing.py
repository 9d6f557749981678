"""``switchkit list``: what a name in a recipe can stand for.

Nothing but parts from outside this package is imported: switchkit's own are read from its source, without torch.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from switchkit.cli.errors import UserError, near
from switchkit.cli.options import OptionParser
from switchkit.cli.plugins import bring_in
from switchkit.cli.recipes import comparisons, recipes
from switchkit.registry import KINDS, full_path, named

__all__ = ["run"]

_FILES = {
    "recipes": "what it trains",
    "comparisons": "what switchkit compare NAME compares",
}


def run(command: str, argv: Sequence[str]) -> int:
    """Print a table per kind of part, and the recipes."""
    kinds = [*KINDS, *_FILES]
    parser = OptionParser(command, "Show the parts and recipes that a name in a configuration can stand for.")
    parser.add_argument("kind", nargs="*", metavar="KIND", help=f"one of {', '.join(kinds)}; all by default")
    parser.add_plugins()
    options = parser.parse(argv)
    asked = options.kind
    for kind in asked:
        if kind not in kinds:
            raise UserError(f"switchkit list: unknown kind {kind!r}{near(kind, kinds)} Kinds: {', '.join(kinds)}")
    foreign = bring_in(options.plugins)
    # A pipe has no width of its own; 80 columns would break the names.
    console = Console(width=None if sys.stdout.isatty() else 160)
    for kind in asked or kinds:
        console.print(_files(kind) if kind in _FILES else _parts(kind, foreign, console.width >= 120))
    return 0


def _parts(kind: str, foreign: bool, wide: bool) -> Table:
    # The class's name is the first to go where there is no room.
    columns = ("name", "class", "what it does", "source") if wide else ("name", "what it does", "source")
    table = _table(kind, *columns)
    for name, path, text in sorted(imported(kind) if foreign else written(kind)):
        table.add_row(name, *([path] if wide else []), *_told(text))
    return table


def imported(kind: str) -> Iterator[tuple[str, str, str]]:
    """Name, class and docstring of every registered part of a kind, those of plugins included."""
    module, _, base = KINDS[kind].rpartition(".")
    for name, cls in named(getattr(importlib.import_module(module), base)).items():
        path = cls.__name__ if cls.__module__.startswith("switchkit.") else full_path(cls)
        yield name, path, cls.__doc__ or ""


def written(kind: str) -> Iterator[tuple[str, str, str]]:
    """The same of switchkit's own parts, from the source, where the decorator ``@register("name")`` stands."""
    package, _, _ = KINDS[kind].partition(".base.")
    spec = find_spec(package)
    for folder in spec.submodule_search_locations or () if spec else ():
        for file in Path(folder).glob("*.py"):
            classes = (node for node in ast.parse(file.read_bytes()).body if isinstance(node, ast.ClassDef))
            for node in classes:
                for mark in node.decorator_list:
                    if isinstance(mark, ast.Call) and getattr(mark.func, "id", "") == "register":
                        yield ast.literal_eval(mark.args[0]), node.name, ast.get_docstring(node) or ""


def _files(kind: str) -> Table:
    table = _table(kind, "name", _FILES[kind])
    for name, path in (recipes() if kind == "recipes" else comparisons()).items():
        comments = (line[1:].strip() for line in path.read_text("utf-8").splitlines() if line.startswith("#"))
        table.add_row(name, next(comments, ""))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column in ("name", "class"), overflow="fold")
    return table


def _told(text: str) -> tuple[str, str]:
    """The first sentence of a class's docstring, and its source."""
    return inspect.cleandoc(text).partition("\n")[0].replace("``", "`"), source(text)


def source(text: str) -> str:
    """Where a docstring says its part comes from: an arXiv number, or as it is written."""
    found = re.search(r"^Source:\s*(.*)", inspect.cleandoc(text), re.MULTILINE)
    paper = re.search(r"arXiv[: ]*(\d{4}\.\d{4,5}|[a-z-]+/\d{7})", found[1] if found else "")
    return f"arXiv {paper[1]}" if paper else found[1] if found else ""
