"""Table 6 of the Switch paper on Tiny Shakespeare or on Multi30k, at a size for a CPU.

``python docs/paper_table6.py --out runs/table6`` trains, for each seed, a dense model, a Switch teacher, the students
that learn from it, and a dense model that trains for as long as teacher and student together; then it prints what
``switchkit distill-report`` says of them, and the differences that docs/paper.md speaks of: exit code 1 if one of
`CHECKS` does not hold. What is finished is not trained again: stopped, it goes on with the same command. A seed took
31 minutes on one core of a busy machine; ``--recipe t5_translate``, the same with the encoder-decoder, about 95.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from switchkit.compare.arithmetic import difference


@dataclass(frozen=True)
class Recipe:
    """A mixture; its dense twin is the recipe of that name with ``_dense`` behind it."""

    steps: int
    """Of every model; the last row has twice as many."""
    options: Mapping[str, object]
    seeds: Sequence[str]
    """The options that take the seed."""


RECIPES = {
    "tiny_shakespeare": Recipe(
        1200,
        {"model.net.d_model": 64, "model.net.d_ff": 256, "model.net.context": 64,
         "data.context": 64, "data.batch_size": 32},
        ("seed_everything", "data.seed"),
    ),
    "t5_translate": Recipe(1000, {"trainer.callbacks": "[]"}, ("seed_everything",)),
}  # fmt: skip
STUDENTS: dict[str, dict[str, object]] = {
    "distilled only": {"model.init": "fresh", "model.alpha": 1},
    "distilled only, 0.75/0.25 mix": {"model.init": "fresh"},
    "+ non-expert init": {"model.alpha": 1},
    "+ 0.75/0.25 mix": {},
    "init only": {"model.alpha": 0},
}
LONGER = "dense, compute of teacher and student"
CHECKS = (("distilled only, 0.75/0.25 mix", "dense", 0.01), ("+ 0.75/0.25 mix", "init only", 0.0))
"""The first is lower than the second, by more than so many nats in the mean over seeds."""


def switchkit(*words: object) -> str:
    """What a command writes to stdout; its messages go to stderr."""
    command = [sys.executable, "-m", "switchkit", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def trained(folder: Path, config: str, steps: int, given: Mapping[str, object]) -> Path:
    """The last checkpoint of a run, which is trained unless it is there."""
    done = folder / "done"
    if not done.exists():
        options = {**given, "trainer.max_steps": steps, "trainer.val_check_interval": steps,
                   "trainer.accelerator": "cpu", "trainer.enable_progress_bar": False,
                   "trainer.default_root_dir": folder}  # fmt: skip
        print(f"{folder}: {steps} steps", file=sys.stderr, flush=True)
        switchkit("fit", "--config", config, *(word for key, value in options.items() for word in (f"--{key}", value)))
        last = max(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
        done.write_text(str(last.relative_to(folder)))
    return folder / done.read_text()


def models(out: Path, name: str, steps: int, seed: int) -> dict[str, Path]:
    """The checkpoints of one seed."""
    here, dense = out / f"{name}-{steps}" / f"seed{seed}", f"{name}_dense"
    seeds = dict.fromkeys(RECIPES[name].seeds, seed)
    own = {**RECIPES[name].options, **seeds}
    found = {
        "dense": trained(here / "dense", dense, steps, own),
        "teacher": trained(here / "teacher", name, steps, own),
    }
    for number, (student, options) in enumerate(STUDENTS.items()):
        given = {"model.teacher": found["teacher"], **options, **seeds}
        found[student] = trained(here / f"student{number}", "distill", steps, given)
    found[LONGER] = trained(here / "longer", dense, 2 * steps, own)
    return found


def report(seeds: list[dict[str, Path]]) -> list[dict[str, Any]]:
    """The rows of `distill-report` on the models of these seeds."""
    students = [f"{name}={found[name]}" for found in seeds for name in found if name not in ("dense", "teacher")]
    text = switchkit(
        "distill-report", "--dense", *(found["dense"] for found in seeds),
        "--teacher", *(found["teacher"] for found in seeds),
        *(word for student in students for word in ("--student", student)), "--device", "cpu", "--json",
    )  # fmt: skip
    rows: list[dict[str, Any]] = json.loads(text)["rows"]
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the page."""
    lines = ["| model | ours | gain kept | parameters |", "|---|---|---|---|"]
    for row in rows:
        loss, spread, kept, error = (row[key] for key in
                                     ("loss", "loss_spread", "preserved_percent", "preserved_spread"))  # fmt: skip
        ours = f"{loss:.4f}" + ("" if spread is None else f" ± {spread:.4f}")
        gain = row["note"] or "" if kept is None else f"{kept:.0f} %" + ("" if error is None else f" ± {error:.0f}")
        lines.append(f"| {row['name']} | {ours} | {gain} | {row['parameters']:,} |")
    return "\n".join(lines)


def said(losses: Mapping[str, Sequence[float]], low: str, high: str) -> str:
    """By how much one is lower than the other: in the mean, half the width of its interval, and seed by seed."""
    by = difference(losses[high], losses[low])
    assert by is not None
    half = "" if by.half_width is None else f" ± {by.half_width:.4f}"
    each = ", ".join(f"{b - a:.4f}" for a, b in zip(losses[low], losses[high], strict=True))
    return f"{low!r} is lower than {high!r} by {by.mean:.4f}{half} ({each})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--recipe", choices=list(RECIPES), default="tiny_shakespeare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of every model; the last row has twice as many")
    given = parser.parse_args()
    steps = RECIPES[given.recipe].steps if given.steps is None else given.steps
    seeds = [models(given.out, given.recipe, steps, seed) for seed in given.seeds]
    rows = report(seeds)
    print(markdown(rows))
    losses = {row["name"]: row["losses"] for row in rows}
    print(said(losses, "teacher", "dense"))
    failed = 0
    for low, high, least in CHECKS:
        holds = fmean(losses[high]) - fmean(losses[low]) > least
        failed += not holds
        print(f"{said(losses, low, high)}, which is {'more' if holds else 'NOT more'} than {least}")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
