"""Where training begins, which only the Trainer knows, once it has read the checkpoint that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L

__all__ = ["Began", "ended"]


class Began(L.Callback):
    """Knows the step at which training began, and counts the tokens that it reads."""

    def __init__(self) -> None:
        self.step: int | None = None
        """None: it did not."""
        self.tokens, self.padded = 0, False
        """Of all devices, padding counted, and whether there may be any."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Counted here, as steps do not tell: an epoch may end with fewer batches than a step has.
        if isinstance(batch, Mapping) and "tokens" in batch:
            self.tokens += batch["tokens"].numel() * trainer.world_size
            self.padded |= "valid" in batch


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
