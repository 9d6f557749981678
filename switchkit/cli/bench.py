"""``switchkit bench``: speed measurements."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["run"]


def run(command: str, argv: Sequence[str]) -> int:
    """Hand over to `switchkit.bench`."""
    from switchkit.bench import main

    return int(main(list(argv)) or 0)
