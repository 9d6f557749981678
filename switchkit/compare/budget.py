"""How long each run of a comparison trains: so many steps, FLOPs, or minutes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from switchkit.cli.errors import UserError
from switchkit.compare.arithmetic import steps_within

__all__ = ["MARGIN", "Budget", "Cost"]

MARGIN = 0.95
"""Part of the minutes that the schedule is planned for, so that a machine a little slower than measured ends it too."""


@dataclass(frozen=True)
class Cost:
    """What a step of a model costs."""

    tokens: int
    """Real and padded targets of an optimizer step."""
    flops: int
    """Forward and backward: three times the forward count."""


@dataclass(frozen=True)
class Budget:
    """What every run of a comparison may spend.

    `value` None means what the first run's ``trainer.max_steps`` cost.
    """

    kind: Literal["steps", "flops", "minutes"]
    value: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``steps``, ``steps=1200``, ``flops``, ``flops=1e13`` or ``minutes=5``.

        Raises:
            UserError: anything else.
        """
        kind, given, number = str(text).partition("=")
        accepted = "steps, steps=N, flops, flops=X or minutes=M"
        if kind not in ("steps", "flops", "minutes"):
            raise UserError(f"--budget {text}: expected {accepted}")
        if not given:
            if kind == "minutes":
                raise UserError("--budget minutes: say how many, for instance --budget minutes=5")
            return cls(kind)  # type: ignore[arg-type]
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0) or (kind == "steps" and value != int(value)):
            what = "a whole number of steps" if kind == "steps" else "a number"
            raise UserError(f"--budget {text}: expected {what} above 0 after the =, got {number!r}")
        return cls(kind, value)  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.value is None:
            return self.kind
        return f"{self.kind}={int(self.value) if self.kind == 'steps' else self.value:.12g}"

    def steps(
        self,
        costs: Mapping[str, Cost],
        first_steps: int | None,
        seconds_per_step: Mapping[str, float],
        equal_flops: Mapping[str, str] | None = None,
    ) -> dict[str, int]:
        """Steps of each run.

        Args:
            costs: of the runs, in order.
            first_steps: the first run's ``trainer.max_steps``; None: it has none.
            seconds_per_step: as measured, for `minutes`.
            equal_flops: runs that spend the operations of another run instead, and that run.

        Raises:
            UserError: no number of steps to go by, a run that the budget allows no step, or `equal_flops` with minutes.
        """
        first = next(iter(costs))
        if self.value is None and not first_steps:
            raise UserError(
                f"--budget {self}: {first} sets no trainer.max_steps to go by; give --budget {self.kind}=NUMBER"
            )
        if self.kind == "steps":
            found = dict.fromkeys(costs, int(self.value or first_steps or 0))
        elif self.kind == "flops":
            budget = int(self.value) if self.value is not None else costs[first].flops * int(first_steps or 0)
            found = {name: steps_within(budget, cost.flops) for name, cost in costs.items()}
        else:
            limit = 60 * float(self.value or 0) * MARGIN
            found = {name: int(limit / seconds_per_step[name]) for name in costs}
        for name, other in (equal_flops or {}).items():
            if self.kind == "minutes":
                raise UserError(
                    f"--budget {self}: equal_flops gives {name} the operations of {other}, not minutes; "
                    "give --budget steps or flops, or take it out of equal_flops"
                )
            found[name] = steps_within(found[other] * costs[other].flops, costs[name].flops)
        short = [name for name, steps in found.items() if steps < 1]
        if short:
            minutes = max(seconds_per_step.get(name, 0) for name in short) / 60 / MARGIN
            flops = max(costs[name].flops for name in short)
            need = f"{minutes:.3g} minutes" if self.kind == "minutes" else f"{flops:.3g} FLOPs"
            raise UserError(
                f"--budget {self}: too little for a single step of {', '.join(short)}; one step takes {need}: give more"
            )
        return found
