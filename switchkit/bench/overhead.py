"""What Lightning, logging, the progress bar and checkpoints add to a training step."""

from __future__ import annotations

import io
import itertools
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch import Tensor

from switchkit import callbacks
from switchkit.bench.timing import Clock, clock_of
from switchkit.callbacks import SaveBest, SaveLast, TrainingBar
from switchkit.checkpoints import AtomicCheckpointIO
from switchkit.module import LanguageModule

__all__ = ["Bar", "Recipe", "Turns", "compare", "quiet"]

TURN = 10
"""Steps before the other side has its turn."""
BLOCK = 50
"""Steps of one figure: two checkpoints, five updates of the bar, one line of the log at the recipes' intervals."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """A recipe, built."""

    module: LanguageModule
    data: Any
    trainer: Trainer
    device: torch.device


class Bar(TrainingBar):
    """The bar of training on a terminal that shows nothing, so that it works as it would on a real one."""

    def __init__(self) -> None:
        super().__init__()
        self._console = Console(file=_Nowhere(), force_terminal=True, width=120)

    def pause(self) -> None:
        """Stop the thread that refreshes it."""
        if self._bar is not None:
            self._bar.stop()

    def resume(self) -> None:
        if self._bar is not None:
            self._bar.start()


class Turns:
    """Batches for Lightning, that in between, when asked for the next one, runs as many steps of the bare loop.

    A turn is timed from handing out its first batch to being asked for the one after its last, which is all that
    Lightning does about these steps. The first turn of each side is not counted.
    """

    def __init__(self, pool: list[Batch], bare: Callable[[Batch], None], turns: int, turn: int, clock: Clock) -> None:
        self.pool, self.bare, self.turns, self.turn, self.clock = pool, bare, turns, turn, clock
        self.bar: Bar | None = None
        self.seconds: dict[str, list[float]] = {"lightning": [], "bare": []}

    def __len__(self) -> int:
        return (self.turns + 1) * self.turn + 1

    def __iter__(self) -> Iterator[Batch]:
        theirs, own = itertools.cycle(self.pool), itertools.cycle(self.pool)
        for index in range(self.turns + 1):
            start = self._now()
            for _ in range(self.turn):
                yield next(theirs)
            middle = self._now()
            if self.bar is not None:
                self.bar.pause()
            restart = self._now()
            for _ in range(self.turn):
                self.bare(next(own))
            end = self._now()
            if self.bar is not None:
                self.bar.resume()
            if index:
                self.seconds["lightning"].append(middle - start)
                self.seconds["bare"].append(end - restart)
        # One more, without which the last turn would end with the epoch.
        yield next(theirs)

    def _now(self) -> float:
        self.clock.synchronize()
        return time.perf_counter()


def compare(
    recipe: Recipe, bare: Callable[[Batch], None], pool: list[Batch], steps: int, folder: str, *, saves: bool
) -> dict[str, Any]:
    """Percent that a Trainer adds to the bare step: callbacks, CSV log and bar of ``fit``, checkpoints if `saves`."""
    like, device = recipe.trainer, recipe.device
    turn = min(TURN, steps)
    turns = -(-steps // turn)
    batches = Turns(pool, bare, turns, turn, clock_of(device))
    batches.bar = Bar()
    unwanted = (TrainingBar, SaveBest) if saves else (TrainingBar, SaveBest, SaveLast)
    others = [callback for callback in callbacks.defaults() if not isinstance(callback, unwanted)]
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        max_steps=len(batches),
        precision=like.precision,
        gradient_clip_val=like.gradient_clip_val,
        log_every_n_steps=like.log_every_n_steps,  # type: ignore[attr-defined]
        callbacks=[*others, batches.bar],
        logger=CSVLogger(folder, name="", version=f"saves-{saves}"),
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_checkpointing=saves,
    )
    with quiet():
        trainer.fit(recipe.module, train_dataloaders=batches)
    # Let go of the trainer; and Lightning leaves the module on the CPU.
    recipe.module.trainer = None
    recipe.module.to(device)
    theirs, own = (_blocks(batches.seconds[side], max(1, BLOCK // turn)) for side in ("lightning", "bare"))
    added = [100 * (a / b - 1) for a, b in zip(theirs, own, strict=True)]
    done = turns * turn
    return {
        "name": "with a checkpoint every 25 steps" if saves else "without checkpoints",
        "percent": statistics.median(added),
        "blocks": added,
        "steps": done,
        "bare_ms": 1000 * sum(batches.seconds["bare"]) / done,
        "lightning_ms": 1000 * sum(batches.seconds["lightning"]) / done,
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's remarks about the machine and about a run that is as we want it."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _blocks(seconds: list[float], turns: int) -> list[float]:
    """Sums over so many turns at a time; what is left over at the end joins the last."""
    starts = list(range(0, max(1, len(seconds) - turns + 1), turns))
    return [sum(seconds[a:b]) for a, b in zip(starts, [*starts[1:], len(seconds)], strict=True)]


class _Nowhere(io.StringIO):
    def write(self, text: str) -> int:
        return len(text)
