"""What data modules have in common: training that goes on where it stopped, shares of ranks, what each stage reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import lightning as L
from torch import Tensor

from switchkit.data.resumable import Attach, TrainingLoader
from switchkit.data.tokenizers import Tokenizer

__all__ = ["Evaluation", "ResumableData", "require_positive"]

Evaluation = Iterable[dict[str, Tensor]]


class ResumableData(L.LightningDataModule, ABC):
    """A data module whose training goes on exactly where a checkpoint left it.

    A subclass gives its loaders (`train_loader`, `evaluation_loader`), its vocabulary (`tokenizer`) and where its data
    came from (`source_info`). The position in the training data is in the checkpoint under the subclass's name.
    Lightning keeps a loader's own position too, and loses it where `configure_optimizers` asks for
    `estimated_stepping_batches`; where it does not, both are the same.

    Args:
        batch_size: rows of a training batch, on each device.
        eval_batch_size: rows of a batch in evaluation.
        validation_prefix: how much of the held-out data validation reads while fitting, in the subclass's unit; 0 or
            None: all of it. `validate`, `test` and `predict` read all of it, on every device.
        seed: of the order of the training data.

    Raises:
        ValueError: a value out of range.
    """

    have_sources: bool | None = None
    """Whether batches have a `source`, which an encoder reads; None: nobody says, and the first batch shows."""

    def __init__(
        self, *, batch_size: int, eval_batch_size: int, validation_prefix: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        require_positive(batch_size=batch_size, eval_batch_size=eval_batch_size)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.validation_prefix = validation_prefix
        self.seed = seed
        self._train: TrainingLoader[Any] | None = None
        self._position: dict[str, Any] | None = None
        self.attach: Attach | None = None
        """Adds to each training batch what a module learns from beside it; the module sets it, and takes it back."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The vocabulary, from which the model's size comes."""

    @abstractmethod
    def source_info(self) -> dict[str, Any]:
        """Where the data came from, as plain data for a checkpoint."""

    @abstractmethod
    def train_loader(self, *, rank: int, world_size: int) -> TrainingLoader[Any]:
        """Share `rank` of `world_size` of the training data, at its beginning."""

    @abstractmethod
    def evaluation_loader(self, prefix: int | None) -> Evaluation:
        """The held-out data in a fixed order: the first `prefix`, or all of it for 0 and None."""

    def setup(self, stage: str | None = None) -> None:
        if stage == "fit":
            self._train, self._position = None, None  # a position to resume from is loaded after this

    def train_dataloader(self) -> TrainingLoader[Any]:
        position = self.state_dict()["train"]
        # Of a strategy that splits the model over devices, only the copies of the whole count.
        shares = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {"num_replicas": 1, "rank": 0}
        loader = self.train_loader(rank=shares["rank"], world_size=shares["num_replicas"])
        if self.trainer is not None:
            limit = self.trainer.limit_train_batches
            loader.ends_after = limit if isinstance(limit, int) else int(len(loader) * limit)
            loader.repeat = getattr(self.trainer, "overfit_batches", 0) > 0  # set, not declared
        if position is not None:
            loader.load_state_dict(position)
        loader.attach = self.attach
        self._train = loader
        return loader

    def val_dataloader(self) -> Evaluation:
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        return self.evaluation_loader(self.validation_prefix if fitting else None)

    def test_dataloader(self) -> Evaluation:
        return self.evaluation_loader(None)

    def predict_dataloader(self) -> Evaluation:
        return self.evaluation_loader(None)

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data; None: at the beginning."""
        return {"train": self._train.state_dict() if self._train is not None else self._position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next training loader goes on there."""
        self._train, self._position = None, state_dict.get("train")


def require_positive(**values: int) -> None:
    """Raises ValueError for the first of some options of ``data`` that is below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"data.{name} {value} is not possible; it must be 1 or more")
