"""What a process of a test may come to. Imports nothing, so that its processes begin at once."""

from __future__ import annotations

import time
from typing import Any


def fails(rank: int, job: Any) -> None:
    """The second process raises while the others wait."""
    if rank == 1:
        raise ValueError("out of luck")
    time.sleep(120)


def hangs(rank: int, job: Any) -> None:
    """None comes to an end."""
    time.sleep(120)
