"""What came out of a comparison: a row for each run, and which differences are more than the seeds' spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from switchkit.compare.arithmetic import Difference, Spread, difference, reached, spread
from switchkit.compare.folder import Result

__all__ = ["Pair", "Row", "SpeedUp", "rows_of", "pairs_of", "sentence", "speed_ups"]

_MOST = 12
"""Differences that the sentence names; where there are more, those to the twin."""


@dataclass(frozen=True)
class SpeedUp:
    """Of one seed: what the twin needed for its last loss over what the run needed for it; None: not reached."""

    target: float
    steps: float | None
    seconds: float | None


@dataclass(frozen=True)
class Row:
    """A run over its seeds. Spreads are None where no seed has a value."""

    run: str
    loss: Spread | None
    speed: Spread | None
    """Tokens of training per second."""
    faster_steps: Spread | None
    faster_time: Spread | None
    compared: int
    """Seeds that have a twin to compare with."""
    dropped: Spread | None
    imbalance: Spread | None
    steps: Spread | None
    failed: int
    one: Result
    """Any of its results, for the sizes."""


@dataclass(frozen=True)
class Pair:
    """Two runs, the better first, and the difference of their losses."""

    first: str
    second: str
    difference: Difference


def speed_ups(results: Sequence[Result], twin: str) -> dict[tuple[str, int], SpeedUp]:
    """Of every finished run whose twin of the same seed finished, with a curve that ends in a number.

    The target is the last held-out loss of the twin's curve. What each of them needed is where its curve first came
    down to it: a twin that overfits was there before its end. The curves are of the same held-out tokens.
    """
    twins = {r.seed: r for r in results if r.run == twin and r.finished and r.points}
    found = {}
    for result in results:
        if not result.finished or result.seed not in twins:
            continue
        own = twins[result.seed]
        target = own.points[-1]["held_out_loss"]
        if not math.isfinite(target):
            continue
        factors = {}
        for key in ("step", "seconds"):
            needed, here = _first(own, key, target), _first(result, key, target)
            factors[key] = None if here is None or needed is None else needed / max(here, 1e-9)
        found[result.run, result.seed] = SpeedUp(target, factors["step"], factors["seconds"])
    return found


def _first(result: Result, key: str, target: float) -> float | None:
    """Where the curve of a run first comes down to a held-out loss; None: nowhere."""
    losses = [point["held_out_loss"] for point in result.points]
    return reached([point[key] for point in result.points], losses, target)


def rows_of(results: Sequence[Result], twin: str) -> list[Row]:
    """A row for each run, in the order of the results."""
    found = speed_ups(results, twin)
    rows = []
    for name in dict.fromkeys(result.run for result in results):
        own = [result for result in results if result.run == name]
        good = [result for result in own if result.finished]
        fast = [found[name, result.seed] for result in good if (name, result.seed) in found]
        rows.append(
            Row(
                run=name,
                loss=spread([r.held_out_loss for r in good if r.held_out_loss is not None]),
                speed=spread([r.tokens / r.seconds for r in good if r.seconds]),
                faster_steps=spread([f.steps for f in fast if f.steps is not None]),
                faster_time=spread([f.seconds for f in fast if f.seconds is not None]),
                compared=len(fast),
                dropped=spread([r.dropped for r in good if r.dropped is not None]),
                imbalance=spread([r.imbalance for r in good if r.imbalance is not None]),
                steps=spread([r.steps for r in good]),
                failed=len(own) - len(good),
                one=own[0],
            )
        )
    return rows


def pairs_of(results: Sequence[Result]) -> list[Pair]:
    """Every two runs that have finished seeds in common, the one of the lower mean loss first."""
    losses: dict[str, Mapping[int, float]] = {}
    for result in results:
        if result.finished and result.held_out_loss is not None:
            losses[result.run] = {**losses.get(result.run, {}), result.seed: result.held_out_loss}
    found = []
    for one, other in combinations(losses, 2):
        seeds = [seed for seed in losses[one] if seed in losses[other]]
        if not seeds:
            continue
        better, worse = one, other
        if sum(losses[one][s] - losses[other][s] for s in seeds) > 0:
            better, worse = other, one
        apart = difference([losses[better][s] for s in seeds], [losses[worse][s] for s in seeds])
        assert apart is not None
        found.append(Pair(better, worse, apart))
    return found


def sentence(pairs: Sequence[Pair], twin: str) -> str:
    """Which differences exceed the seeds' spread, in one sentence."""
    if not pairs:
        return "No two runs finished a seed in common, so nothing can be said about differences."
    if all(pair.difference.half_width is None for pair in pairs):
        return "With one seed nothing can be said about which differences are more than chance: give --seeds 3 or more."
    clear = [pair for pair in pairs if pair.difference.exceeds]
    counts = sorted({pair.difference.count for pair in pairs})
    seeds = f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    rule = f"over {seeds} (paired by seed, 95 % interval of Student's t without 0)"
    if not clear:
        return f"No difference of held-out loss exceeds the seeds' spread {rule}."
    shown = clear if len(clear) <= _MOST else [pair for pair in clear if twin in (pair.first, pair.second)]
    named = "; ".join(
        f"{p.first} is lower than {p.second} by {-p.difference.mean:.4f} ± {p.difference.half_width:.4f}" for p in shown
    )
    rest = len(clear) - len(shown)
    more = f"; and {rest} more pairs without {twin}, see differences.csv" if rest else ""
    named = named or "none to the twin"
    return f"{len(clear)} of {len(pairs)} differences of held-out loss exceed the seeds' spread {rule}: {named}{more}."
