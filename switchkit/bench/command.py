"""``switchkit bench``: speed measurements."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from switchkit.bench.options import parse
from switchkit.cli.errors import UserError
from switchkit.cli.plugins import bring_in

__all__ = ["run"]


def run(command: str, argv: Sequence[str]) -> int:
    """Measure what the command line asks for and print it.

    Raises:
        UserError: an unknown option, a value that does not fit, or a memory that does not hold what is measured.
    """
    options = parse(argv)
    bring_in(options.plugins)
    try:
        # Only now, so that --help and mistyped options answer without waiting for torch.
        from switchkit.bench.run import run as measure

        return measure(options, shlex.join(["switchkit", command, *argv]))
    except RuntimeError as error:  # torch.OutOfMemoryError is one; of the CPU's memory there is no class
        told = str(error).partition("\n")[0]
        if "allocate" not in told:
            raise
        raise UserError(
            f"bench: the memory does not hold this: {told}. Measure less: smaller --shapes, another --recipe, or leave "
            "out what is too large (--no-layer, --no-recipe, --no-generation)"
        ) from error
