"""``switchkit bench``: speed measurements."""

from __future__ import annotations

from collections.abc import Sequence

from switchkit.cli.errors import UserError

__all__ = ["run"]


def run(command: str, argv: Sequence[str]) -> int:
    """Hand over to `switchkit.bench`."""
    from switchkit.bench import main

    try:
        return int(main(list(argv)) or 0)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; of the CPU's memory there is no class
        told = str(error).partition("\n")[0]
        if "allocate" not in told:
            raise
        raise UserError(
            f"bench: the memory does not hold this: {told}. Measure less: smaller --shapes, another --recipe, or leave "
            "out what is too large (--no-layer, --no-recipe, --no-generation)"
        ) from error
