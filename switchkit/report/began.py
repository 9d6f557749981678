"""Where training begins, which only the Trainer knows, once it has read the checkpoint that it goes on from."""

from __future__ import annotations

import lightning as L

__all__ = ["Began", "ended"]


class Began(L.Callback):
    """Knows the step at which training began; None: it did not."""

    def __init__(self) -> None:
        self.step: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step = trainer.global_step


def ended(trainer: L.Trainer) -> str | None:
    """Of a run that went on from a checkpoint at its very end: that, and how to go on; None of any other."""
    limits = (("step", trainer.global_step, trainer.max_steps), ("epoch", trainer.current_epoch, trainer.max_epochs))
    for unit, reached, most in limits:
        if most is not None and 0 < most <= reached:
            return (
                f"Nothing was trained: the checkpoint is at {unit} {reached:,} already, and trainer.max_{unit}s is "
                f"{most:,}. To go on, raise --trainer.max_{unit}s"
            )
    return None
