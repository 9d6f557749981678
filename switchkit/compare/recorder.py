"""What is written down of a run while it trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging

from switchkit.models.base import evaluating
from switchkit.module import LanguageModule

__all__ = ["Recorder", "Show", "recorded"]

Show = Callable[[int, float, float | None, float], None]


class Recorder(L.Callback):
    """Measures the held-out loss every so many steps, and what training cost until then.

    It goes before the callbacks that save, so that a checkpoint of a step holds the point of that step, and a resumed
    run has the very curve of one that was not interrupted, and after those that average weights, whose average of the
    step it measures (`recorded`). The clock runs while the model trains and its data is read, not while it is evaluated
    or saved; `Mark`, the last callback, starts it again.

    Args:
        every: optimizer steps between two points; the last step has one too.
        seconds: training stops after so many; None: after the trainer's ``max_steps`` alone.
        show: called every ten steps and after each point with the step, training loss, last held-out loss and tokens
            per second.
    """

    def __init__(self, every: int, *, seconds: float | None = None, show: Show | None = None) -> None:
        self.every, self.limit, self.show = every, seconds, show
        self.points: list[dict[str, float]] = []
        self.seconds, self.tokens, self.steps, self.done = 0.0, 0, 0, False
        self._mark = 0.0
        self._losses: tuple[torch.Tensor | float, torch.Tensor | int] = (0.0, 0)
        self._assigned: torch.Tensor | int = 0
        self._dropped: torch.Tensor | int = 0

    @property
    def state_key(self) -> str:
        return "switchkit.compare.Recorder"

    @property
    def dropped(self) -> float | None:
        """Share of the assignments of all training steps that were dropped; None: there were none."""
        assigned = int(self._assigned)
        return int(self._dropped) / assigned if assigned else None

    def state_dict(self) -> dict[str, Any]:
        total, count = self._losses
        return {
            "points": list(self.points),
            "seconds": self.seconds,
            "tokens": self.tokens,
            "steps": self.steps,
            "done": self.done,
            "losses": [float(total), int(count)],
            "assigned": int(self._assigned),
            "dropped": int(self._dropped),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points = list(state_dict["points"])
        self.seconds, self.tokens = state_dict["seconds"], state_dict["tokens"]
        self.steps, self.done = state_dict["steps"], state_dict["done"]
        total, count = state_dict["losses"]
        self._losses = (float(total), int(count))
        self._assigned, self._dropped = state_dict["assigned"], state_dict["dropped"]

    def mark(self) -> None:
        """Start the clock."""
        self._mark = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.steps = trainer.global_step
        self.mark()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stats = outputs.get("stats")
        if stats is not None and stats["load"].numel():
            self._assigned = self._assigned + stats["load"].sum()
            self._dropped = self._dropped + stats["dropped"].sum()
        total, count = self._losses
        loss, targets = _own(outputs, trainer.accumulate_grad_batches)
        # In float64, so that a sum that was saved and read goes on as it would have.
        self._losses = (total + loss.double() * targets, count + targets)
        self.tokens += batch["tokens"].numel()
        new_step = trainer.global_step != self.steps
        if new_step and (trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps):
            _wait(pl_module)
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now
        if not new_step:
            return  # within gradient accumulation
        self.steps = trainer.global_step
        over = self.limit is not None and self.seconds >= self.limit
        self.done = over or self.steps == trainer.max_steps
        if self.done or self.steps % self.every == 0:
            self._point(trainer, pl_module)
        if over:
            trainer.should_stop = True
        if self.show is not None and (self.done or self.steps % 10 == 0):
            held_out = self.points[-1]["held_out_loss"] if self.points else None
            self.show(self.steps, float(loss), held_out, self.tokens / max(self.seconds, 1e-9))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Of a run that a callback ended.
        if self.steps and (not self.points or self.points[-1]["step"] != self.steps):
            self._point(trainer, pl_module)

    def _point(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        total, count = self._losses
        self._losses = (0.0, 0)
        self.points.append(
            {
                "step": self.steps,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "train_loss": float(total) / max(int(count), 1),
                "held_out_loss": held_out_loss(trainer, module),
            }
        )


class Mark(L.Callback):
    """The last of the callbacks: starts a `Recorder`'s clock for the next step."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.recorder.mark()


def recorded(callbacks: Sequence[L.Callback], recorder: Recorder) -> list[L.Callback]:
    """The callbacks of a run with a recorder among them."""
    averages = [callback for callback in callbacks if isinstance(callback, WeightAveraging)]
    others = [callback for callback in callbacks if not isinstance(callback, WeightAveraging)]
    return [*averages, recorder, *others, Mark(recorder)]


def held_out_loss(trainer: L.Trainer, module: L.LightningModule) -> float:
    """Mean cross-entropy of the held-out tokens that validation reads while fitting, in nats.

    Lightning's own validation comes after a step's checkpoint was saved: a run killed between the two would lack the
    point. This one can come before.

    Raises:
        ValueError: the module is no `LanguageModule`.
    """
    if not isinstance(module, LanguageModule):
        raise ValueError(f"a comparison needs LanguageModules; got a {type(module).__name__}")
    loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
    limit = trainer.limit_val_batches
    most = limit if isinstance(limit, int) else None if limit == 1 else max(1, int(limit * len(loader)))
    averages = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
    for callback in averages:
        callback.on_validation_epoch_start(trainer, module)  # puts its average into the model, as for validation
    with evaluating(module), torch.no_grad(), trainer.precision_plugin.val_step_context():
        for index, batch in enumerate(islice(loader, most)):
            module.validation_step(trainer.strategy.batch_to_device(batch), index)
    found = float(module.evaluation.compute()["loss"])
    module.evaluation.reset()
    for callback in reversed(averages):
        callback.on_validation_epoch_end(trainer, module)
    return found


def _own(outputs: Mapping[str, Any], accumulate: int) -> tuple[torch.Tensor, torch.Tensor | int]:
    """The loss of a micro-batch alone and its targets, which it is a mean over.

    A `training_step` of one's own may tell its loss only, which Lightning has divided by `accumulate`; each counts 1.
    """
    if "own_loss" in outputs:
        return outputs["own_loss"], outputs["targets"]
    return outputs["loss"].detach() * accumulate, 1


def _wait(module: L.LightningModule) -> None:
    """Until the device did what it was told."""
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
