"""``switchkit describe``: the model that a recipe builds, without training it, and its dense twin."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from switchkit import report
from switchkit.cli.arguments import take_options
from switchkit.cli.errors import UserError, near
from switchkit.cli.lightning import build

__all__ = ["run"]

_HELP = """usage: switchkit describe --config NAME [--config ...] [--twin flops|params [--out FILE]] [--KEY VALUE ...]

Show the model that a recipe builds: sizes, FLOPs per token, parts, its dense twin. Nothing is trained.

options:
  --config NAME     a YAML file or the name of a recipe; give several: later ones win
  --ckpt_path PATH  the settings of a checkpoint (`last`: the newest)
  --twin flops      write the recipe of the dense model of equal FLOPs per token, which `switchkit fit` trains
  --twin params     the same of equal parameters
  --out FILE        where to, instead of stdout; a file that exists is left alone
  --plugins MODULE  modules to import first, such as my_file
  --KEY VALUE       any setting of `switchkit fit`, such as --model.moe.router top_k"""

_TWINS = ("flops", "params")


def run(command: str, argv: Sequence[str]) -> int:
    """Print the table that opens a training run, or write the recipe of the dense twin."""
    rest, own = take_options(argv, {"--twin": "|".join(_TWINS), "--out": "FILE"})
    if any(argument in ("-h", "--help") for argument in rest):
        print(_HELP)
        return 0
    match, out = own.get("--twin"), own.get("--out")
    if match is None:
        if out is not None:
            raise UserError("--out is where --twin writes to: give --twin flops or --twin params too")
        with warnings.catch_warnings():
            # A part that needs memory to be built has it, which is news where several processes share the memory.
            warnings.filterwarnings("ignore", "the model is built whole in the memory of every process")
            cli = build(rest, weights=False)
        report.describe(cli)
        return 0
    if match not in _TWINS:
        raise UserError(f"--twin {match}: expected {' or '.join(_TWINS)}{near(match, _TWINS)}")
    from switchkit.cli.twin import write

    return write(rest, "flops" if match == "flops" else "params", None if out is None else Path(out))
