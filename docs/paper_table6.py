"""Table 6 of the Switch paper on Tiny Shakespeare, at a size for a CPU.

``python docs/paper_table6.py --out runs/table6`` trains, for each seed, a dense model, a Switch teacher, the students
that learn from it, and a dense model that trains for as long as teacher and student together; then it prints what
``switchkit distill-report`` says of them, and the two differences that docs/paper.md speaks of: exit code 1 if one does
not hold. What is finished is not trained again: stopped, it goes on with the same command. A seed of 1,200 steps took
31 minutes on one core of a busy machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

SIZE = {"model.net.d_model": 64, "model.net.d_ff": 256, "model.net.context": 64,
        "data.context": 64, "data.batch_size": 32}  # fmt: skip
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


def trained(folder: Path, recipe: str, steps: int, seed: int, options: Mapping[str, object]) -> Path:
    """The last checkpoint of a run, which is trained unless it is there."""
    done = folder / "done"
    if not done.exists():
        given = {**options, "trainer.max_steps": steps, "trainer.val_check_interval": steps, "seed_everything": seed,
                 "data.seed": seed, "trainer.accelerator": "cpu", "trainer.enable_progress_bar": False,
                 "trainer.default_root_dir": folder}  # fmt: skip
        print(f"{folder}: {steps} steps", file=sys.stderr, flush=True)
        switchkit("fit", "--config", recipe, *(word for key, value in given.items() for word in (f"--{key}", value)))
        last = max(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
        done.write_text(str(last.relative_to(folder)))
    return folder / done.read_text()


def models(out: Path, steps: int, seed: int) -> dict[str, Path]:
    """The checkpoints of one seed."""
    here = out / f"seed{seed}"
    found = {
        "dense": trained(here / "dense", "tiny_shakespeare_dense", steps, seed, SIZE),
        "teacher": trained(here / "teacher", "tiny_shakespeare", steps, seed, SIZE),
    }
    for number, (name, options) in enumerate(STUDENTS.items()):
        given = {"model.teacher": found["teacher"], **options}
        found[name] = trained(here / f"student{number}", "distill", steps, seed, given)
    found[LONGER] = trained(here / "longer", "tiny_shakespeare_dense", 2 * steps, seed, SIZE)
    return found


def report(seeds: list[dict[str, Path]], *options: str) -> str:
    """What `distill-report` says of the models of these seeds."""
    students = [f"{name}={found[name]}" for found in seeds for name in found if name not in ("dense", "teacher")]
    return switchkit(
        "distill-report", "--dense", *(found["dense"] for found in seeds),
        "--teacher", *(found["teacher"] for found in seeds),
        *(word for student in students for word in ("--student", student)), "--device", "cpu", *options,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200, help="of every model; the last row has twice as many")
    given = parser.parse_args()
    seeds = [models(given.out, given.steps, seed) for seed in range(given.seeds)]
    print(report(seeds))
    losses = [{row["name"]: row["loss"] for row in json.loads(report([found], "--json"))["rows"]} for found in seeds]
    failed = 0
    for low, high, least in CHECKS:
        by = [own[high] - own[low] for own in losses]
        holds = statistics.mean(by) > least
        failed += not holds
        shown = ", ".join(f"{x:.4f}" for x in by)
        print(f"{low!r} is lower than {high!r} by {statistics.mean(by):.4f} ({shown}), which is "
              f"{'more' if holds else 'NOT more'} than {least}")  # fmt: skip
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
