"""Stopping a run from outside without losing a step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import lightning as L
import torch

from switchkit.callbacks.save import SaveLast
from switchkit.parallel.failure import AGAIN

__all__ = ["CleanStop", "Stopped"]


class Stopped(SystemExit):
    """Training was told to stop, and did so between two steps; the exit code is 128 + the signal, as in shells."""

    agreed = True
    """All processes raise it together, so that none has to be ended by another."""

    def __init__(self, number: int, step: int, path: Any, ranks: Sequence[int] = ()) -> None:
        super().__init__(128 + number)
        self.signal, self.step, self.path = signal.Signals(number).name, step, path
        self.ranks = tuple(ranks)  # of several processes, those that the signal reached


class CleanStop(L.Callback):
    """Ctrl-C and SIGTERM end training after the step in progress, with a checkpoint.

    The handler only sets a flag; all ranks look at it together between two steps, and stop at the same one whichever of
    them was told. A second signal ends the run at once (of several processes, if it comes 3 seconds later).
    The handlers that were there before come back when training ends.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._number: int | None = None
        self._before: dict[int, Any] = {}
        self._step = 0
        self._told_at = 0.0
        self._again = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Before Lightning registers its own, which hold the trainer and end no process once it is done.
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in self.SIGNALS}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # After Lightning registered its own.
        self._number, self._step = None, trainer.global_step
        self._again = AGAIN if trainer.world_size > 1 else 0.0
        for number in self._before:
            signal.signal(number, self._told)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _told(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._number is None:
            self._number, self._told_at = number, now
        elif now - self._told_at >= self._again:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # In the middle of gradient accumulation: half a step could not be resumed.
        self._step = trainer.global_step
        self._stop_if_told(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Told in the validation after the last step: what comes after training is not begun.
        self._stop_if_told(trainer, pl_module)

    def _stop_if_told(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        told = self._number is not None or trainer.received_sigterm
        if not trainer.strategy.reduce_boolean_decision(told, all=False):
            return
        number, ranks = self._agreed(trainer, pl_module)
        path = None
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveLast):
                callback.save(trainer)
                path = callback.path
        raise Stopped(number, trainer.global_step, path, ranks)

    def _agreed(self, trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[int, list[int]]:
        """The signal that all processes end with, and which of several it reached."""
        own = self._number or (signal.SIGTERM if trainer.received_sigterm else 0)
        if trainer.world_size == 1:
            return own, []
        numbers = trainer.strategy.all_gather(torch.tensor(int(own), device=pl_module.device)).tolist()
        return max(numbers), [rank for rank, number in enumerate(numbers) if number]
