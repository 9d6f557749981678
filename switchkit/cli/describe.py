"""``switchkit describe``: the model that a recipe builds, without training it, and its dense twin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from switchkit import report
from switchkit.cli.errors import UserError
from switchkit.cli.lightning import build
from switchkit.cli.options import SETTINGS, OptionParser

__all__ = ["run"]


def run(command: str, argv: Sequence[str]) -> int:
    """Print the table that opens a training run, or write the recipe of the dense twin."""
    options, rest = _parser(command).parse_beside(argv)
    if options.twin is None:
        if options.out is not None:
            raise UserError("--out is where --twin writes to: give --twin flops or --twin params too")
        report.describe(build(rest, weights=False))
        return 0
    from switchkit.cli.twin import write

    return write(rest, options.twin, None if options.out is None else Path(options.out))


def _parser(command: str) -> OptionParser:
    parser = OptionParser(
        command,
        "Show the model that a recipe builds: sizes, FLOPs per token, parts, its dense twin. Nothing is trained.",
    )
    parser.epilog = SETTINGS
    add = parser.add_argument
    add(
        "--twin",
        choices=("flops", "params"),
        help="write the recipe of the dense model of equal FLOPs per token, or of equal parameters; `switchkit fit` "
        "trains it",
    )
    add("--out", metavar="FILE", help="where to, instead of stdout; a file that exists is left alone")
    return parser
