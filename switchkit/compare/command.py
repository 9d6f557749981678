"""``switchkit compare``: train several recipes alike, and say what is more than chance."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from switchkit import __version__
from switchkit.cli.arguments import Arguments, read_arguments
from switchkit.cli.errors import UserError, exit_code
from switchkit.cli.options import OptionParser, positive
from switchkit.cli.reading import stops_cleanly
from switchkit.cli.recipes import dump_yaml
from switchkit.compare.budget import Budget
from switchkit.compare.definition import Definition, define
from switchkit.compare.files import COLUMNS, cells, write_tables
from switchkit.compare.folder import Folder, Result
from switchkit.compare.live import Board
from switchkit.compare.pictures import write_pictures
from switchkit.compare.plan import Model, composed, model_of, reference, steps_of, takes_seed
from switchkit.compare.runner import seconds_per_step, train
from switchkit.compare.summary import pairs_of, rows_of, sentence
from switchkit.report import part_of
from switchkit.report.plots import can_plot
from switchkit.report.tables import console, figures

__all__ = ["run"]

_POINTS = 20
_LENGTH, _PLACE = "--budget says how long runs train", "--out FOLDER says where runs are"
_REFUSED = {
    "seed_everything": "--seeds N trains seeds 0 to N - 1",
    "ckpt_path": "a comparison goes on by itself",
    "trainer.default_root_dir": _PLACE,
    **dict.fromkeys(("trainer.max_epochs", "trainer.min_epochs", "trainer.min_steps", "trainer.max_time"), _LENGTH),
    **dict.fromkeys(
        ("trainer.val_check_interval", "trainer.check_val_every_n_epoch"), "--every N says when runs are evaluated"
    ),
}


def run(command: str, argv: Sequence[str]) -> int:
    """Train what a command line names, going on where an earlier call with the same one stopped."""
    asked, rest = _parser(command).parse_beside(argv)
    given = read_arguments(rest, words=True)
    _refuse(given)
    definition = define(given.words)
    budget = Budget.parse(asked.budget or definition.budget or "steps")
    seeds = asked.seeds or definition.seeds or 3
    if asked.out is not None and not asked.out.strip():
        raise UserError("--out needs the name of a folder")
    folder = Folder(Path(asked.out or f"runs/compare/{definition.name}").expanduser())
    before = folder.found()
    again = f"switchkit compare {shlex.join(argv)}"
    try:
        with stops_cleanly():
            failed = _compare(definition, budget, seeds, folder, before, asked, given.edits, given.plugins)
    except (KeyboardInterrupt, SystemExit) as stop:
        if type(stop).__name__ == "Stopped":
            told = vars(stop)
            print(f"switchkit: stopped by {told['signal']} after step {told['step']} of a run", file=sys.stderr)
        print(f"switchkit: what is finished is in {folder.path}; go on with: {again}", file=sys.stderr)
        # Lightning makes an exit with 1 of a Ctrl-C in an evaluation.
        if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
            return 130
        return stop.code if isinstance(stop.code, int) else exit_code(stop)
    if failed:
        named = ", ".join(f"{result.run} of seed {result.seed}" for result in failed)
        print(
            f"switchkit: {len(failed)} of the runs failed ({named}): {failed[0].reason}. To try one again, delete its "
            f"folder: {folder.run(failed[0].run, failed[0].seed)}",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _compare(
    definition: Definition,
    budget: Budget,
    seeds: int,
    folder: Folder,
    before: Mapping[str, Any] | None,
    asked: Any,
    edits: Sequence[tuple[str, str]],
    plugins: Sequence[str],
) -> list[Result]:
    """Train what is missing, show and write all; the runs that failed."""
    out = console()
    trees = {entry.name: composed(entry, edits, plugins) for entry in definition.entries}
    models = {name: model_of(name, tree) for name, tree in trees.items()}
    _check(edits, budget, any(_seeded(tree, models[name]) for name, tree in trees.items()))
    twin = reference(definition, asked.twin, models)
    wanted = {
        "recipes": trees,
        "budget": str(budget),
        "equal_flops": dict(definition.equal_flops),
        "every": asked.every,
        "data": {n: m.data for n, m in models.items()},
        "text": {n: m.sha256 for n, m in models.items()},
    }
    plots = can_plot()
    if not plots:
        told = "no pictures will be drawn: pip install 'switchkit[plot]' for them; everything else is written"
        out.print(told, markup=False, highlight=False)
    if before is not None:
        folder.same({key: before.get(key, value) for key, value in wanted.items()}, wanted)
        steps = before["steps"]
    else:
        seconds: dict[str, float] = {}
        if budget.kind == "minutes":
            seconds = {name: _measure(name, tree, models[name], out) for name, tree in trees.items()}
        steps = steps_of(budget, trees, models, seconds, definition.equal_flops)
    with folder.locked():
        if before is None:
            if folder.found() is not None:
                raise UserError(f"--out {folder.path}: another process began a comparison there meanwhile")
            folder.begin({**wanted, "steps": steps, "switchkit": __version__})
        notes = _notes(budget, seeds, steps, twin, models, definition.equal_flops)
        out.print(definition.title, style="bold", highlight=False)
        for note in notes:
            out.print(f"- {note}", highlight=False)
        results = [r for s in range(seeds) for name in trees if (r := folder.result(name, s)) is not None]
        with Board(out, [(name, seed, steps[name]) for seed in range(seeds) for name in trees], results) as board:
            for seed in range(seeds):
                for name, tree in trees.items():
                    if folder.result(name, seed) is not None:
                        continue
                    result = train(
                        folder,
                        name,
                        seed,
                        models[name],
                        steps=steps[name],
                        every=asked.every or max(1, math.ceil(steps[name] / _POINTS)),
                        seconds=60 * float(budget.value or 0) if budget.kind == "minutes" else None,
                        seeded=_seeded(tree, models[name]),
                        show=board.show(name, seed),
                    )
                    folder.keep(result)
                    board.ended(result)
                    results.append(result)
                    # Pictures take as long as many steps: with the last run of a seed, when all can be compared.
                    complete = name == list(trees)[-1]
                    _write(folder, trees, results, twin, definition.title, notes, plots and complete)
        results = _write(folder, trees, results, twin, definition.title, notes, plots)
    _tell(results, twin, folder.path)
    return [result for result in results if not result.finished]


def _refuse(given: Arguments) -> None:
    """Refuse settings that are a comparison's own to make.

    Raises:
        UserError: one of them.
    """
    for key, _ in given.edits:
        if key in _REFUSED:
            raise UserError(f"compare: --{key}: {_REFUSED[key]}")
    if given.configs:
        raise UserError("compare: --config: recipes are given without it: switchkit compare A B")
    if given.print_config is not None or given.part_help is not None:
        raise UserError("compare: --print_config and --KEY.help are of `switchkit fit` alone")


def _check(edits: Sequence[tuple[str, str]], budget: Budget, seeded: bool) -> None:
    """Refuse settings that would be written over.

    Raises:
        UserError: steps beside a budget that has a number of its own, or a seed of data that follow the runs' seeds.
    """
    given = dict(edits)
    if "trainer.max_steps" in given and budget.value is not None:
        raise UserError(
            f"compare: --trainer.max_steps {given['trainer.max_steps']}: the budget is {budget}: give "
            f"--budget steps={given['trainer.max_steps']}"
        )
    if "data.seed" in given and seeded:
        raise UserError(f"compare: --data.seed {given['data.seed']}: {_REFUSED['seed_everything']}, and their data")


def _measure(name: str, tree: Mapping[str, Any], model: Model, out: Any) -> float:
    """Seconds of a step."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        recipe = Path(place) / "recipe.yaml"
        recipe.write_text(dump_yaml(tree), "utf-8")
        seconds = seconds_per_step(recipe, _seeded(tree, model))
    out.print(f"{name}: {1000 * seconds:.1f} ms a step", highlight=False)
    return seconds


def _seeded(tree: Mapping[str, Any], model: Model) -> bool:
    """Whether the data's order follows the seed: not where it would make up another text."""
    return takes_seed(tree) and not model.generated


def _write(
    folder: Folder,
    trees: Mapping[str, Any],
    results: Sequence[Result],
    twin: str,
    title: str,
    notes: Sequence[str],
    plots: bool,
) -> list[Result]:
    """The files of the results so far, run by run; returns them in that order."""
    order = list(trees)
    found = sorted(results, key=lambda result: (order.index(result.run), result.seed))
    if plots:
        write_pictures(folder.path, found, twin, title)
    write_tables(folder.path, found, twin, title, notes)
    return found


def _notes(
    budget: Budget,
    seeds: int,
    steps: Mapping[str, int],
    twin: str,
    models: Mapping[str, Model],
    equal_flops: Mapping[str, str],
) -> list[str]:
    every = set(steps.values())
    told = (
        f"{every.pop():,} steps"
        if len(every) == 1
        else ", ".join(f"{name} {n:,}" for name, n in steps.items()) + " steps"
    )
    parts = " or ".join(dict.fromkeys(part_of(model.evaluated) for model in models.values()))
    texts = list(dict.fromkeys(model.data for model in models.values()))
    own = models.values()
    texts_alike = len({(model.data, model.sha256) for model in own}) == 1
    # Of one text, in batches of one size.
    alike = texts_alike and len({model.cost.tokens for model in own}) == 1 and all(model.ordered for model in own)
    notes = [
        f"{seeds} seed{'s' * (seeds > 1)}, budget {budget}: {told} for a run"
        + "; runs of one seed read the same data in the same order" * alike,
        f"data: {'; '.join(texts)}",
        f"held-out loss: nats per token over {parts}, last weights; ±: standard deviation over seeds",
        f"faster in steps or time: to the last loss of the curve of {twin}",
        "dropped: share of all assignments in training; imbalance: largest over mean load of the worst layer, held out",
        f"switchkit {__version__}, torch {torch.__version__}",
    ]
    equal = [f"{name} spends the operations of {other}" for name, other in equal_flops.items()]
    if equal:
        notes.insert(1, f"{'; '.join(equal)}, in {', '.join(f'{steps[name]:,}' for name in equal_flops)} steps")
    if not texts_alike:
        notes.insert(
            2, "the runs read different data: their losses compare only where the held-out tokens are the same"
        )
    first = next(iter(own))
    if any(model.vocabulary != first.vocabulary for model in own):
        notes.insert(2, "the runs have different vocabularies: losses per token, and what was faster, do not compare")
    if len({model.held_out[0] for model in own}) > 1:
        notes.insert(2, "the losses, and what was faster, do not compare: they are of different held-out tokens")
    elif len({model.held_out for model in own}) > 1:
        notes.insert(2, "what was faster does not compare: the curves are of different held-out tokens")
    return notes


def _tell(results: Sequence[Result], twin: str, path: Path) -> None:
    # A table that is cut says nothing.
    out = console(170)
    table = figures("Result", COLUMNS, frame=None)
    table.columns[0].no_wrap = True
    for row in rows_of(results, twin):
        table.add_row(*cells(row))
    out.print(table)
    out.print(sentence(pairs_of(results), twin), highlight=False)
    out.print(f"written to {path}: README.md, runs.csv, curves.csv, differences.csv", highlight=False, soft_wrap=True)


def _parser(command: str) -> OptionParser:
    parser = OptionParser(command, "Train several recipes alike, seed by seed, and say which differences are chance.")
    parser.usage = "%(prog)s RECIPE [RECIPE ...] [options]"
    parser.epilog = (
        "RECIPE: recipes, or one comparison; files or names. Any other --KEY VALUE is a setting for all runs, as in "
        "`switchkit fit`: --data.path my.txt, --plugins my_file."
    )
    parser.add_argument("--seeds", type=positive, help="seeds 0 to N - 1 (default: the comparison's, else 3)")
    parser.add_argument("--budget", help="steps[=N], flops[=X] or minutes=M (default: the comparison's, else steps)")
    parser.add_argument("--out", help="the folder (default: runs/compare/NAME); the same command goes on in it")
    parser.add_argument("--twin", help="the run that speed-ups are against (default: the first without sparse layers)")
    parser.add_argument("--every", type=positive, help="steps between two points of a curve (default: 20 points)")
    return parser
