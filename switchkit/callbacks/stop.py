"""Stopping a run from outside without losing a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import lightning as L

from switchkit.callbacks.save import SaveLast

__all__ = ["CleanStop", "Stopped"]


class Stopped(SystemExit):
    """Training was told to stop, and did so between two steps; the exit code is 128 + the signal, as in shells."""

    def __init__(self, number: int, step: int, path: Any) -> None:
        super().__init__(128 + number)
        self.signal, self.step, self.path = signal.Signals(number).name, step, path


class CleanStop(L.Callback):
    """Ctrl-C and SIGTERM end training after the step in progress, with a checkpoint.

    The handler only sets a flag; all ranks look at it together between two steps. A second signal ends the run at once.
    The handlers that were there before come back when training ends.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._number: int | None = None
        self._before: dict[int, Any] = {}
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # After Lightning registered its own handlers, which it puts back when it ends.
        self._number, self._step = None, trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._told) for number in self.SIGNALS}

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _told(self, number: int, frame: FrameType | None) -> None:
        if self._number is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._number = number

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # In the middle of gradient accumulation: half a step could not be resumed.
        self._step = trainer.global_step
        told = self._number is not None or trainer.received_sigterm
        if not trainer.strategy.reduce_boolean_decision(told, all=False):
            return
        path = None
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveLast):
                callback.save(trainer)
                path = callback.path
        raise Stopped(self._number or signal.SIGTERM, trainer.global_step, path)
