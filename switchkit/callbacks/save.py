"""When checkpoints are saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from switchkit.checkpoints import callback_state, settling_later
from switchkit.checks import at_least
from switchkit.optim import last_step
from switchkit.step import NonFiniteError

__all__ = ["SaveBest", "SaveLast", "checkpoint_folder"]


def checkpoint_folder(trainer: L.Trainer) -> Path:
    """``checkpoints/`` in the folder of the first logger, else of the trainer."""
    return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"


class SaveLast(Checkpoint):
    """Saves ``last.ckpt`` every so many optimizer steps and at the end of training, always between two steps.

    `CleanStop` uses it when a run is told to stop. Weights that are not finite are never saved over good ones. It holds
    the weights to go on from; those that `StochasticWeightAveraging` ends with are saved as ``averaged.ckpt``.

    Args:
        every_n_steps: 25 steps are a few seconds of a small run, and little to lose.

    Raises:
        ValueError: every_n_steps below 1.
        NonFiniteError: at a save, weights with NaN or infinity; the file that was there stays.
    """

    best_model_path = ""  # Lightning asks the first of its kind for ``ckpt_path="best"``

    def __init__(self, every_n_steps: int = 25) -> None:
        at_least(1, every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self.path: Path | None = None
        self._saved_at = -1
        self._stepped_at = 0
        self._stops = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.global_step == 0:
            self.path, self._saved_at = None, -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stepped_at, self._stops = trainer.global_step, False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Within a step gradients are gathered that no checkpoint holds.
        stops = self._told_to_stop(trainer)
        if trainer.global_step == self._stepped_at:
            return
        self._stepped_at = trainer.global_step
        # The last step is saved here too: after it, Lightning counts a half-read epoch as done.
        if stops or trainer.global_step % self.every_n_steps == 0 or trainer.global_step == trainer.max_steps:
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # `EarlyStopping` ends a run here.
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._told_to_stop(trainer):
            self.save(trainer)

    def _told_to_stop(self, trainer: L.Trainer) -> bool:
        """Whether a callback ends training here; in the middle of a step it ends with that step."""
        loop = trainer.fit_loop
        if loop._should_accumulate():
            self._stops = self._stops or trainer.should_stop
            trainer.should_stop = False
            return False
        trainer.should_stop = trainer.should_stop or self._stops
        self._stops = False
        return trainer.should_stop and loop._can_stop_early

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Of the last epoch: at the very end callbacks that average weights have put their averages into the model.
        done = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        if trainer.should_stop or done >= (trainer.max_epochs or -1) > 0:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)
        if _holds_average(trainer) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(trainer.strategy.broadcast(checkpoint_folder(trainer) / "averaged.ckpt"))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _wait_for_the_first(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Save now, unless this very step was saved or there was no step yet. Call it between two steps only."""
        if trainer.global_step in (0, self._saved_at) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        broken = [name for name, p in trainer.lightning_module.named_parameters() if not _finite(p.detach())]
        if trainer.strategy.reduce_boolean_decision(bool(broken), all=False):
            raise NonFiniteError(
                f"weights {broken[0] if broken else 'of another device'} are not finite after step "
                f"{trainer.global_step}; "
                f"{'the last good checkpoint is ' + str(self.path) if self.path else 'nothing was saved'}"
            )
        path = trainer.strategy.broadcast(checkpoint_folder(trainer) / "last.ckpt")
        self._saved_at = trainer.global_step
        with settling_later(trainer):
            trainer.save_checkpoint(path, weights_only=False)
        self.path = path


def _holds_average(trainer: L.Trainer) -> bool:
    """Whether `StochasticWeightAveraging` has come to its end, and put its average into the model, and nowhere else."""
    found = (c for c in trainer.callbacks if isinstance(c, StochasticWeightAveraging))  # type: ignore[attr-defined]
    return any(trainer.current_epoch > c.swa_end or math.isinf(c.swa_end) for c in found)


def _finite(weights: Tensor) -> bool:
    """Of what this device holds. The sum first: it is one pass, and rarely overflows."""
    own = weights.to_local() if isinstance(weights, DTensor) else weights
    return bool(torch.isfinite(own.sum())) or bool(torch.isfinite(own).all())


def _wait_for_the_first(trainer: L.Trainer) -> None:
    """The first process has seen to it that its file is in its place: the others must not read the one before."""
    trainer.strategy.barrier("saved")


class SaveBest(Checkpoint):
    """Keeps ``best.ckpt``, the checkpoint of the lowest value of a logged metric, over the resumed parts of a run too.

    Args:
        monitor: the metric, compared after each validation of `fit`; on several devices the first one's value counts.
    """

    def __init__(self, monitor: str = "val/loss") -> None:
        self.monitor = monitor
        self.path: Path | None = None
        self.value = math.inf

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.global_step == 0:
            self.path, self.value = None, math.inf

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warns of validations that fall into the middle of an optimizer step."""
        every, accumulate = trainer.val_check_batch, trainer.accumulate_grad_batches
        epoch = trainer.num_training_batches  # infinite where the data have no length
        if not isinstance(every, int) or not trainer.enable_validation:
            return
        # Steps begin anew with each epoch, and the last of one may be short. Where batches are counted on over epochs,
        # validations come to each place in an epoch that is a multiple of the greatest common divisor.
        counts_on = trainer.check_val_every_n_epoch is None and math.isfinite(epoch)
        several = counts_on and last_step(trainer) > math.ceil(epoch / accumulate)
        places = math.gcd(every, int(epoch)) if several else every
        if places % accumulate and places != epoch:
            why, anew = "", ""
            if every % accumulate == 0:
                why = f", as epochs of {epoch} batches end with a short one"
                anew = "check_val_every_n_epoch 1 and "
            rank_zero_warn(
                f"validation every {every} batches falls into the middle of optimizer steps of {accumulate}{why}, "
                "whose gradients best.ckpt does not hold: a run that goes on from it lacks a part of one step. "
                "last.ckpt is always saved between steps; "
                f"{anew}a val_check_interval that is a multiple of {accumulate} avoids it"
            )

    def state_dict(self) -> dict[str, Any]:
        path = None if self.path is None else str(self.path)
        return {"monitor": self.monitor, "path": path, "value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        path = state_dict["path"]
        # Without its file a past best is no use, nor is that of another metric: the next validation sets a new one.
        if path is None or not Path(path).exists() or state_dict.get("monitor", self.monitor) != self.monitor:
            return
        # last.ckpt of a step is saved before the validation at that step, and best.ckpt after it.
        own = callback_state(path, self.state_key) or state_dict
        self.path, self.value = Path(path), own["value"]

    @property
    def best_model_path(self) -> str:
        """What Lightning's ``ckpt_path="best"`` means; empty: nothing was saved."""
        return "" if self.path is None else str(self.path)

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:
        # By a launcher, of the processes that it had train.
        self.path = Path(path) if path else None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        found = trainer.callback_metrics.get(self.monitor)
        value = None if found is None else float(found)
        # The first process's, whose value is logged: not every module logs the same on all, and they save together.
        value, better = trainer.strategy.broadcast((value, value is not None and value < self.value))
        if value is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            rank_zero_warn(f"best.ckpt is not saved: nobody logs {self.monitor}; there are {known}")
        elif better:
            self.value = value
            self.path = trainer.strategy.broadcast(checkpoint_folder(trainer) / "best.ckpt")
            with settling_later(trainer):
                trainer.save_checkpoint(self.path, weights_only=False)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _wait_for_the_first(trainer)
