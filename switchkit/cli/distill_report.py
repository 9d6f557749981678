"""``switchkit distill-report``: how much of a mixture's gain its students keep, in the rows of the paper's Table 6."""

from __future__ import annotations

import csv
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from switchkit.cli.devices import device_of
from switchkit.cli.errors import UserError
from switchkit.cli.options import OptionParser, json_target, write_json
from switchkit.cli.plugins import bring_in

if TYPE_CHECKING:
    from switchkit.distill.evaluation import Evaluated
    from switchkit.distill.table import TableRow

__all__ = ["run"]


def run(command: str, argv: Sequence[str]) -> int:
    """Evaluate every checkpoint on the same held-out text, and print the table."""
    options = _parser(command).parse(argv)
    students = _students(options.student)
    if options.json == "-" and options.csv:
        raise UserError("--json and --csv: give one of them, or --json a file")
    target = json_target(options.json)
    device = device_of(options.device)
    bring_in(options.plugins)

    from switchkit.cli.checkpoint import checkpoint_path
    from switchkit.distill.evaluation import evaluate
    from switchkit.distill.shared_text import check_alike, data_of, load_module, open_all
    from switchkit.distill.table import table_rows

    named = {"teacher": options.teacher, "dense": options.dense, **students}
    option = {"teacher": "teacher", "dense": "dense"}
    paths = {
        name: [checkpoint_path(path, "runs", option.get(name, "student")) for path in given]
        for name, given in named.items()
    }
    for name, several in paths.items():
        if twice := sorted({str(path) for path in several if several.count(path) > 1}):
            raise UserError(f"{name}: {twice[0]} is given twice; a seed is a run of its own")
    opened = open_all([path for several in paths.values() for path in several])
    check_alike(opened, same_text=options.text is None)
    data = data_of(opened[0], options.text)
    found: dict[str, list[Evaluated]] = {}
    for name, several in paths.items():
        for path in several:
            print(f"switchkit: {name}: {path}", file=sys.stderr)
            net = load_module(path, device).net
            found.setdefault(name, []).append(evaluate(net, data.evaluation_loader(None)))
    teacher, dense = found.pop("teacher"), found.pop("dense")
    rows = table_rows(dense, teacher, found)
    about = f"{data.source_info()['description']}, {dense[0].tokens:,} held-out tokens, on {device}"
    _print(rows, about, options)
    write_json(options.json, target, {"text": about, "rows": [row.to_dict() for row in rows]})
    return 0


def _print(rows: list[TableRow], about: str, options: Namespace) -> None:
    if options.json == "-":
        return
    if options.csv:
        flat = [{**row.to_dict(), "losses": " ".join(map(str, row.losses))} for row in rows]
        writer = csv.DictWriter(sys.stdout, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    else:
        from switchkit.report.distillation import distill_table
        from switchkit.report.tables import console

        out = console()
        out.print(distill_table(rows, about))
        for row in rows:
            if row.preserved is not None and row.preserved.reason is not None:
                out.print(f"{row.name}: {row.preserved.reason}", highlight=False, soft_wrap=True)


def _students(given: Sequence[str]) -> dict[str, list[str]]:
    """The checkpoints of each name, in the order of the command line."""
    found: dict[str, list[str]] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise UserError(
                f"--student {text}: expected NAME=CKPT, such as 'distilled only=runs/version_2/checkpoints/best.ckpt'"
            )
        if name in ("dense", "teacher"):
            raise UserError(f"--student {text}: {name} is given by --{name}; take another name")
        found.setdefault(name, []).append(path)
    return found


def _parser(command: str) -> OptionParser:
    parser = OptionParser(
        command,
        "Evaluate a dense model, a mixture and its distilled students on the same held-out text, and say how much of "
        "what the mixture gains each student keeps: (student - dense) / (teacher - dense). The rows of Table 6 of the "
        "Switch paper are: distilled only (init fresh, alpha 1), + non-expert init (alpha 1), + 0.75/0.25 mix (the "
        "recipe distill) and init only (alpha 0). Several seeds make the noise known; a gain within it is refused.",
    )
    add = parser.add_argument
    add(
        "--dense",
        nargs="+",
        required=True,
        metavar="CKPT",
        help="of the student's shape, trained alone; one for each seed",
    )
    add("--teacher", nargs="+", required=True, metavar="CKPT", help="the mixture, one for each seed")
    add(
        "--student",
        action="append",
        required=True,
        metavar="NAME=CKPT",
        help="a student and the name of its row; the same name again for another seed",
    )
    add("--text", metavar="PATH", help="evaluate on the last tenth of this text (default: that held out in training)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: the fastest there is)")
    parser.add_json("the rows, with all digits,")
    add("--csv", action="store_true", help="the rows as CSV")
    parser.add_plugins()
    return parser
