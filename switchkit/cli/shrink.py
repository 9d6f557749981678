"""``switchkit prune``, ``merge`` and ``to-dense``: a checkpoint with fewer experts, down to none."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, get_args

from switchkit.cli.conversion import Conversion, conversion_parser, say
from switchkit.cli.errors import UserError
from switchkit.cli.options import OptionParser, positive

if TYPE_CHECKING:
    from switchkit.convert.measuring import Measured
    from switchkit.module import LanguageModule

__all__ = ["run"]

BATCHES = 50
_MEASURED = {"by": (("usage", "weight"), "similarity"), "how": (("usage", "most_used"), "mean or aligned")}
"""Option -> its values that need data, and those that count all experts alike."""
ABOUT = {
    "prune": "Drop the experts of each sparse layer that weigh least in its output, and their rows of the router.",
    "merge": "Merge the experts of each sparse layer that the router scores alike (arXiv 2310.01334).",
    "to-dense": "Make a dense checkpoint: one feed-forward layer as wide as an expert stands where each mixture stood, "
    "made of its experts.",
}


def run(command: str, argv: Sequence[str]) -> int:
    """Write the checkpoint, and show parameters and held-out loss before and after."""
    options = _parser(command).parse(argv)
    _check(options)
    work = Conversion.begin(options)

    from switchkit.convert import shrinking
    from switchkit.convert.densifying import to_dense
    from switchkit.convert.measuring import assumed, measure

    shrinking.check_shrinks(work.module, getattr(options, "keep", getattr(options, "experts", None)))
    batches = None if options.no_data else _batches(work, options.plugins)
    if batches is None:
        for given, instead in _measured(options):
            raise UserError(f"{work.path} belongs to no data to measure {given} on: take {instead}")
        say("nothing was measured: all experts count alike")
        if command == "to-dense":
            _tell_of_loud(work)
    found = assumed(work.module) if batches is None else measure(work.module, batches, limit=options.batches)
    if command == "prune":
        made = shrinking.prune(work.module, options.keep, found, by=options.by)
    elif command == "merge":
        made = shrinking.merge(work.module, options.experts, found, how=options.how)
    else:
        made = to_dense(work.module, found, how=options.how)
    after = None
    if batches is not None:
        after = measure(made, batches, limit=options.batches)
        if made.sparse_layers and shrinking.rescale(made, found, after):
            after = measure(made, batches, limit=options.batches)
    work.save(made)
    _show(command, work, made, found, after)
    say(f"the optimizer starts afresh. Go on with: {work.go_on}")
    return 0


def _tell_of_loud(work: Conversion) -> None:
    """Say where nobody knows without data what the experts' outputs are multiplied by."""
    from switchkit.convert.measuring import weight_of_every_token
    from switchkit.layers import moe_layers

    unknown = [name for name, layer in moe_layers(work.module.net).items() if weight_of_every_token(layer) is None]
    if unknown:
        instead = "leave --no_data out" if work.data is not None else "a checkpoint of `fit` has data to measure it on"
        say(
            f"only data tell what the router's weights come to in {', '.join(unknown)}, often less than 1: the outputs "
            f"are multiplied by 1 there, which may be too loud; {instead}"
        )


def _measured(options: Namespace) -> Iterator[tuple[str, str]]:
    """The options whose values need data, and what to take without."""
    for name, (values, instead) in _MEASURED.items():
        if getattr(options, name, None) in values:
            yield f"--{name} {getattr(options, name)}", f"--{name} {instead}"


def _check(options: Namespace) -> None:
    """Fill in the number of batches, and refuse what ``--no_data`` leaves without a meaning, or needs a package."""
    if getattr(options, "how", None) == "aligned" and find_spec("scipy") is None:
        raise UserError(
            "--how aligned solves an assignment with SciPy: pip install 'switchkit[base]', or take "
            f"--how {'mean' if options.no_data else 'usage'}"
        )
    if options.no_data:
        for given, instead in _measured(options):
            raise UserError(f"{given} is measured on data: leave --no_data out, or take {instead}")
        if options.batches is not None:
            raise UserError(f"--batches {options.batches} and --no_data contradict each other; give one of them")
    if options.batches is None:
        options.batches = BATCHES


def _parser(command: str) -> OptionParser:
    from switchkit.convert.merging import How
    from switchkit.convert.shrinking import By

    parser = conversion_parser(
        command,
        f"{ABOUT[command]} What the experts are used for is measured on the held-out data of the checkpoint. The "
        "optimizer's state is left behind.",
    )
    add = parser.add_argument
    if command == "prune":
        add("--keep", type=positive, required=True, metavar="N", help="experts of each layer that stay")
        add(
            "--by",
            choices=get_args(By),
            default="weight",
            help="which stay: those of the largest sum of weights, the most used, or the least alike "
            "(default: %(default)s)",
        )
    else:
        if command == "merge":
            add("--experts", type=positive, required=True, metavar="N", help="experts that each layer is left with")
        add(
            "--how",
            choices=get_args(How),
            default="aligned",
            help="a mean, one weighted by usage, the most used one, or the weighted mean once hidden units are aligned "
            "(needs scipy) (default: %(default)s)",
        )
    add("--batches", type=positive, metavar="N", help=f"of held-out data to measure (default: {BATCHES})")
    add("--no_data", action="store_true", help="measure nothing, and count all experts alike")
    return parser


def _batches(work: Conversion, plugins: Sequence[str]) -> Any:
    """The held-out data of the checkpoint; null: it has none."""
    if work.data is None:
        return None

    from switchkit.cli.model_only import ModelOnly

    more = ["--plugins", *plugins] if plugins else []
    try:
        # As in an evaluation: a student needs its teacher to learn only.
        data = ModelOnly(["--ckpt_path", str(work.path), *more], "validate").datamodule
        data.prepare_data()
        data.setup("validate")
        return data.val_dataloader()
    except (ValueError, OSError) as error:
        raise UserError(f"the data of {work.path}: {error}. --no_data goes on without them") from error


def _show(command: str, work: Conversion, made: LanguageModule, found: Measured, after: Measured | None) -> None:
    from switchkit.report.tables import console, pairs

    before, now = (sum(p.numel() for p in module.parameters()) for module in (work.module, made))
    rows = [("parameters", f"{before:,} -> {now:,} ({now / before:.1%})")]
    if after is not None:
        rows.append(("held-out loss", f"{found.loss:.4f} -> {after.loss:.4f} nats per token"))
        # Without data these are no measurements.
        rows += [
            (f"used {use.layer}", " ".join(f"{share:.0%}" for share in use.share.tolist())) for use in found.layers
        ]
    console().print(pairs(f"{command}: {work.path} -> {work.out}", [*rows, ("checkpoint", str(work.out))]))
