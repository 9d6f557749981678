"""``switchkit bench``: speed of the layer and of a training step, as ratios to dense models of equal FLOPs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Measure what the command line asks for and print it; the exit code.

    Raises:
        UserError: an unknown option, or a value that does not fit.
    """
    from switchkit.bench.options import parse
    from switchkit.cli.plugins import bring_in, split_plugins

    rest, plugins = split_plugins(argv)
    options = parse(rest)
    bring_in(plugins)
    # Only now, so that --help and mistyped options answer without waiting for torch.
    from switchkit.bench.run import run

    return run(options, shlex.join(["switchkit", "bench", *argv]))
