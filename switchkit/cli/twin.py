"""``switchkit describe --twin``: the recipe of the dense model that a sparse one is compared with."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from switchkit import __version__
from switchkit.cli.errors import UserError
from switchkit.cli.model_only import ModelOnly
from switchkit.cli.normalise import is_spec, target_of
from switchkit.cli.options import new_file
from switchkit.cli.recipes import dump_yaml
from switchkit.files import write_text
from switchkit.models import Decoder, EncoderDecoder
from switchkit.module import LanguageModule
from switchkit.registry import name_of
from switchkit.report import context_of
from switchkit.report.tables import console
from switchkit.report.twins import both, both_table
from switchkit.twins import Match, dense_spec, net_of

__all__ = ["twin_recipe", "write"]

_FIRST = ("seed_everything", "plugins", "model", "data", "trainer")
# What a run begins from, and how it is read: the twin has other weights.
_NOT_ITS_OWN = ("ckpt_path", "init_from", "weights_only")

_MATCHED = {
    "flops": "of the same FLOPs of a token, routers and padded buffers left out",
    "params": "of as many parameters, routers included",
}


def write(argv: Sequence[str], match: Match, out: Path | None) -> int:
    """Write the recipe to `out`, or to stdout, and show both models on stderr.

    Raises:
        UserError, ValueError: a file that exists, settings that are wrong, a model without a twin.
    """
    if out is not None:
        out = new_file(str(out))
    cli = ModelOnly(argv)
    if cli.arguments.print_config is not None:
        return 0
    recipe, left_out = twin_recipe(cli, match)
    net, context = cli.model.net, context_of(cli)
    rows = both(net, net_of(recipe["model"], net.vocab_size), context)
    text = "\n".join([*_header(argv, match, rows, context, left_out), dump_yaml(recipe)])
    console(stderr=True).print(both_table(rows))
    if out is None:
        sys.stdout.write(text)
        return 0
    write_text(out, text)
    print(f"{out}: train it with `switchkit fit --config {shlex.quote(str(out))}`")
    return 0


def twin_recipe(cli: ModelOnly, match: Match) -> tuple[dict[str, Any], list[str]]:
    """The whole recipe of the dense twin, as plain data, and the names of what it goes without.

    Raises:
        UserError, ValueError: a model without a twin.
    """
    module = cli.model
    if not isinstance(module, LanguageModule):
        raise UserError(f"model: the twin of a LanguageModule is known, not of a {type(module).__name__}")
    if not isinstance(module.net, (Decoder, EncoderDecoder)):
        found = type(module.net).__name__
        raise UserError(f"model.net: the twin of a Decoder or EncoderDecoder is known, not of a {found}")
    tree = cli.tree
    given = tree["model"].get("init_args") or {}
    # The student of a teacher follows from it where none is named.
    net = given.get("net") or module.spec["init_args"]["net"]
    spec = {**tree["model"], "init_args": {**given, "net": net}}
    dense = dense_spec(spec, match=match, vocab_size=module.net.vocab_size, context=context_of(cli))
    del dense["init_args"]["moe"]
    left_out = [f"the loss {name_of(type(term))}" for term in module.losses]
    trainer = dict(tree.get("trainer") or {})
    callbacks = trainer.pop("callbacks", None)
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    kept = [each for each in callbacks if not _needs_sparse_layers(each)]
    left_out += [f"the callback {target_of(each).__name__}" for each in callbacks if _needs_sparse_layers(each)]
    if kept:
        trainer["callbacks"] = kept
    if tree.get("init_from") is not None:
        left_out.append(f"the weights of {tree['init_from']}, which the sparse model begins from")
    tree |= {"model": dense, "trainer": trainer}
    names = sorted(tree, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    return {n: tree[n] for n in names if n not in _NOT_ITS_OWN and tree[n] not in (None, {})}, left_out


def _needs_sparse_layers(callback: Any) -> bool:
    return is_spec(callback) and bool(getattr(target_of(callback), "needs_sparse_layers", False))


def _header(
    argv: Sequence[str], match: Match, rows: list[tuple[str, str, str, str]], context: int, left_out: list[str]
) -> list[str]:
    """The lines of comment that the file begins with."""
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = [
        f"#   {name:<{widths[0]}}  {one:>{widths[1]}}  {other:>{widths[2]}}  {told:>{widths[3]}}".rstrip()
        for name, one, other, told in [("", "sparse", "dense", ""), *rows]
    ]
    (told,) = (row[3] for row in rows if row[0].strip() == ("without routers" if match == "flops" else "parameters"))
    near = "" if told == "equal" else f" (no whole width is exact: {told} are left)"
    lines = [
        f"# The dense twin of: {' '.join(shlex.join(argv).split())}",
        f"# By `switchkit describe --twin {match}` of switchkit {__version__}: a dense layer in place of each mixture,",
        f"# {_MATCHED[match]}{near}.",
        f"# With attention over {context} tokens:",
        *table,
    ]
    return [*lines, f"# Left out: {', '.join(left_out)}."] if left_out else lines
