"""Callbacks that act on what an optimizer step counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning as L
from jaxtyping import Int
from torch import Tensor

if TYPE_CHECKING:
    from switchkit.module import LanguageModule

__all__ = ["StepCallback"]


class StepCallback(L.Callback):
    """A callback that acts on the counts of each optimizer step, once, before a checkpoint can be written.

    The counts add up over the micro-batches of the step and over ranks. A hook like `on_train_batch_end` would be too
    late: a checkpoint saved by an earlier callback would lack the change, and a resumed run would not make up for it.
    """

    needs_sparse_layers = True
    """Read from any callback: a dense twin of the run goes without it."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses to train a module that does not count, or has nothing to count.

        Raises:
            ValueError: the module is no `LanguageModule`, or has no sparse layer.
        """
        if stage != "fit":
            return
        from switchkit.module import LanguageModule

        name = type(self).__name__
        if not isinstance(pl_module, LanguageModule):
            raise ValueError(f"{name} needs a LanguageModule, which counts; got a {type(pl_module).__name__}")
        if not pl_module.sparse_layers:
            raise ValueError(f"{name} needs a model with sparse layers, and this one has none: leave the callback out")

    def after_optimizer_step(
        self, trainer: L.Trainer, pl_module: LanguageModule, load: Int[Tensor, "L E"], tokens: Int[Tensor, "L"]
    ) -> None:
        """`load`: chosen assignments, zeros past a layer's experts; `tokens`: real tokens. `trainer.global_step` still
        counts the steps before this one."""
        raise NotImplementedError
