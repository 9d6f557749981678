"""``switchkit prune``, ``merge`` and ``to-dense``: checkpoints with fewer experts, or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from switchkit.cli.conversion import Conversion, conversion_parser, parsed, say
from switchkit.cli.errors import UserError
from switchkit.cli.options import OptionParser, number

if TYPE_CHECKING:
    from switchkit.convert.measuring import Measured
    from switchkit.module import LanguageModule

__all__ = ["run"]

ABOUT = {
    "prune": "Drop the least useful experts of each sparse layer, with their rows of the router.",
    "merge": "Merge the experts of each sparse layer that are routed alike into one each.",
    "to-dense": "Make one dense layer of the experts of each sparse layer: a start to train from, such as a student's.",
}


def run(command: str, argv: Sequence[str]) -> int:
    """Write the checkpoint, and print what became of the model."""
    own, overrides = _split(argv)
    options = parsed(_parser(command), own)
    by = getattr(options, "by", None)
    if options.no_data and by in ("usage", "gate"):
        raise UserError(f"--by {by} is measured on data: leave --no_data out, or take --by similarity")
    work = Conversion.begin(options)

    from switchkit.convert.dense import to_dense
    from switchkit.convert.measuring import assumed, measure
    from switchkit.convert.shrinking import merge_experts, prune, rescale

    module = work.module
    if not module.sparse_layers:
        raise UserError(f"{work.path}: the model is dense, it has no experts")
    batches = None if options.no_data else _held_out(work, overrides)

    def measured(one: LanguageModule) -> Measured:
        return assumed(one) if batches is None else measure(one, batches, limit=options.batches)

    before = measured(module)
    if command == "prune":
        made = prune(module, options.keep, measured=before, by=options.by, k=options.k)
    elif command == "merge":
        made = merge_experts(module, options.experts, measured=before, how=options.how, k=options.k)
    else:
        made = to_dense(module, measured=before, how=options.how)
    after = None if batches is None else measured(made)
    if after is not None and made.sparse_layers and rescale(made, before, after):
        after = measured(made)
    work.save(made)
    _print(module, made, before.loss, None if after is None else after.loss)
    say(f"wrote {work.out}; the optimizer starts afresh, train it with: {work.go_on}")
    return 0


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of the command, and those of the data."""
    own, data = [], []
    given = iter(argv)
    for argument in given:
        if not argument.startswith("--data."):
            own.append(argument)
        else:
            data.append(argument if "=" in argument else f"{argument}={next(given, '')}")
    return own, data


def _held_out(work: Conversion, overrides: Sequence[str]) -> Any:
    """Batches of the held-out data that the checkpoint belongs to."""
    if work.data is None:
        raise UserError(
            f"{work.path} belongs to no data to measure its experts on: give --no_data (all experts then count alike)"
        )
    from switchkit.cli.lightning import ModelOnly

    given = ["--ckpt_path", str(work.path), "--seed_everything=false", *overrides]
    data = ModelOnly("validate", given, execute=False).datamodule
    try:
        data.prepare_data()
        data.setup("validate")
        return data.val_dataloader()
    except (ValueError, OSError) as error:
        raise UserError(f"{error}. Give other data by --data.KEY VALUE, or --no_data") from error


def _print(before: LanguageModule, after: LanguageModule, old: float | None, new: float | None) -> None:
    """The table of both models."""
    from rich import box
    from rich.table import Table

    from switchkit.convert.rebuilding import moe_layers
    from switchkit.report.counts import count
    from switchkit.report.tables import console

    table = Table(box=box.ROUNDED)
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    both = (before, after)
    sizes = [count(module.net, int(getattr(module.net, "context", 128))) for module in both]
    experts = [next((layer.num_experts for layer in moe_layers(module).values()), None) for module in both]
    table.add_row("experts of a sparse layer", *("dense" if number is None else str(number) for number in experts))
    table.add_row("parameters", *(f"{size.parameters:,}" for size in sizes))
    table.add_row("parameters that a token meets", *(f"{size.active:,}" for size in sizes))
    losses = ("not measured" if loss is None else f"{loss:.4f}" for loss in (old, new))
    table.add_row("held-out loss, nats per token", *losses)
    console().print(table)


def _parser(command: str) -> OptionParser:
    from switchkit.convert.merging import How
    from switchkit.convert.shrinking import Criterion

    parser = conversion_parser(
        command,
        f"{ABOUT[command]} Their use is measured on the held-out data of the checkpoint (--data.KEY VALUE changes its "
        "settings), and the loss before and after is printed.",
    )
    add = parser.add_argument
    positive = number(int, "an integer of at least 1", lambda value: value >= 1)
    if command == "prune":
        add("--keep", type=positive, required=True, metavar="N", help="experts of a layer that stay")
        which = "which stay: the most used, those of the largest sum of weights, or the most unlike"
        add("--by", choices=get_args(Criterion), default="usage", help=f"{which} (default: %(default)s)")
    if command == "merge":
        add("--experts", type=positive, required=True, metavar="N", help="experts of a layer afterwards")
    if command != "prune":
        how = "mean; usage: weighted by it; most_used: that one; aligned: as usage, hidden units matched first"
        add("--how", choices=get_args(How), default="aligned", help=f"{how} (default: %(default)s)")
    if command != "to-dense":
        add("--k", type=positive, metavar="K", help="experts of a token afterwards (default: as many as before)")
    add("--batches", type=positive, metavar="N", help="held-out batches to read (default: all)")
    add("--no_data", action="store_true", help="measure nothing: all experts count alike, with a weight of 1")
    return parser
