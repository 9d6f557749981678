"""``switchkit selftest``: everything registered, held to what switchkit's own parts are held to."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from switchkit.cli.errors import UserError, near
from switchkit.cli.options import OptionParser, json_target, write_json
from switchkit.cli.plugins import bring_in
from switchkit.registry import KINDS, named

if TYPE_CHECKING:
    from switchkit.testing import Result

__all__ = ["run"]


def run(command: str, argv: Sequence[str]) -> int:
    """Print what holds of each part, and a sentence for what does not; 1 if anything failed."""
    parser = OptionParser(
        command,
        "Hold every registered part, plugins included, to the properties that switchkit's own parts are held to, and "
        "every dispatcher in whole layers of all parts. Takes a minute or two.",
    )
    parser.add_argument(
        "part", nargs="*", metavar="PART", help=f"a kind ({', '.join(KINDS)}), a name, or KIND/NAME; all by default"
    )
    parser.add_plugins()
    parser.add_argument("--skip", nargs="+", metavar="PROPERTY", default=[], help="properties not to ask")
    parser.add_json("all results")
    options = parser.parse(argv)
    target = json_target(options.json)
    bring_in(options.plugins)
    # Only now, so that --help and mistyped options answer without waiting for torch.
    from rich.console import Console

    from switchkit.process import threads
    from switchkit.report.tables import figures
    from switchkit.testing.kit import results_of

    parts = _asked(options.part)
    stream = sys.stderr if options.json == "-" else sys.stdout
    console = Console(file=stream, width=None if stream.isatty() else 160)
    table = figures("selftest", ("part", "held", "failed", "skipped", "seconds"), frame=None)
    found: dict[str, list[Result]] = {}
    # Sums of two threads differ in the last bits, and layers this small are faster on one.
    with threads(1):
        for name, (base, cls) in parts.items():
            found[name] = list(results_of(base, cls, {}, options.skip))
            table.add_row(name, *_row(found[name]))
    console.print(table)
    failed = [result for results in found.values() for result in results if result.status == "failed"]
    for result in failed:
        console.print(f"{result.property}: {result.detail}", markup=False, highlight=False, soft_wrap=True)
    total = sum(map(len, found.values()))
    parts_told = "1 part" if len(found) == 1 else f"{len(found)} parts"
    skipped = sum(result.status == "skipped" for results in found.values() for result in results)
    without = f"; {skipped} could not be asked, --json says why" if skipped else ""
    console.print(f"{parts_told}, {total} properties, {len(failed)} failed{without}", highlight=False)
    write_json(options.json, target, _content(found))
    return 1 if failed else 0


def _asked(words: Sequence[str]) -> dict[str, tuple[type, type]]:
    """KIND/NAME -> (base class, class) of what the words name; of everything without any.

    Raises:
        UserError: a word that is no kind, no name and no KIND/NAME.
    """
    import importlib

    known: dict[str, tuple[type, type]] = {}
    for kind, path in KINDS.items():
        module, _, base = path.rpartition(".")
        owner = getattr(importlib.import_module(module), base)
        known.update({f"{kind}/{name}": (owner, cls) for name, cls in named(owner).items()})
    if not words:
        return known
    chosen: dict[str, tuple[type, type]] = {}
    for word in words:
        mine = {full: part for full, part in known.items() if word in (full, *full.split("/"))}
        if not mine:
            accepted = [*KINDS, *known, *(full.partition("/")[2] for full in known)]
            raise UserError(
                f"switchkit selftest: unknown part {word!r}{near(word, accepted)} See `switchkit list`; a part of your "
                "own needs --plugins my_file"
            )
        chosen.update(mine)
    return chosen


def _row(results: Sequence[Result]) -> list[str]:
    counts = [sum(result.status == status for result in results) for status in ("held", "failed", "skipped")]
    return [*map(str, counts), f"{sum(result.seconds for result in results):.1f}"]


def _content(found: dict[str, list[Result]]) -> dict[str, Any]:
    import torch

    from switchkit import __version__

    versions = {"switchkit": __version__, "torch": torch.__version__, "python": platform.python_version()}
    parts: dict[str, Any] = {name: [asdict(result) for result in results] for name, results in found.items()}
    return {"versions": versions, "parts": parts}
