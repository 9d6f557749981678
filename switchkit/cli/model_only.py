"""What a recipe describes, without the devices that it trains on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from switchkit.cli.lightning import SwitchkitCLI

__all__ = ["ModelOnly"]


class ModelOnly(SwitchkitCLI):
    """Model and data of `command`, whatever devices and strategy the recipe trains with."""

    def __init__(self, argv: Sequence[str], command: str = "fit") -> None:
        super().__init__(command, argv, execute=False)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        return pl.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
