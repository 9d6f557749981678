"""Training loaders that a run can be resumed in the middle of: the position, written once for all of them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["Attach", "TrainingLoader", "generator_of"]

Plan = TypeVar("Plan")
Attach = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def generator_of(*parts: int | str) -> torch.Generator:
    """A generator whose stream is a function of `parts` alone, whatever their size, on every platform."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


class TrainingLoader(ABC, Generic[Plan]):
    """Batches of an epoch after another, with a position in them that goes into a checkpoint.

    A subclass says how many batches an epoch has (`__len__`), what an epoch reads (`plan`), how one batch is made of
    that (`batch`), and what a position depends on (`settings`, with `words` for people). An epoch is a function of
    `seed` and its number, a batch's own draws of these, its index and the rank: no global random state is read or
    changed, and a resumed run draws what it would have drawn.

    Each `iter` begins the next epoch, the first being 0. An iterator that yields nothing begins none: Lightning makes
    some and throws them away. The position counts batches yielded; after `load_state_dict` the next one goes on there.

    Args:
        seed: of the epochs.
        rank: which share of each step this process takes.
        world_size: how many shares there are.

    Raises:
        ValueError: a rank outside 0 .. world_size - 1.
    """

    words: ClassVar[dict[str, str]]
    """What each entry of `settings` is called in an error."""

    ends_after: int | None = None
    """Batches after which the reader stops an epoch, if sooner (``Trainer(limit_train_batches)``): a position there is
    the epoch's end. The length stays what the data give."""

    repeat: bool = False
    """Whether every epoch is the first (``Trainer(overfit_batches)``)."""

    attach: Attach | None = None
    """What adds to each batch, such as a teacher's words."""

    def __init__(self, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of world_size {world_size}; rank must be 0 to world_size - 1")
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._epoch = 0
        self._batch = 0
        self._continues = True

    @abstractmethod
    def __len__(self) -> int:
        """Batches of an epoch."""

    @abstractmethod
    def settings(self) -> dict[str, int | str]:
        """What a position depends on: the same on every rank, and for every number of ranks that reads the same."""

    @abstractmethod
    def plan(self, generator: torch.Generator) -> Plan:
        """What an epoch reads, drawn from the epoch's generator, which is the same on all ranks."""

    @abstractmethod
    def batch(self, plan: Plan, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        """This rank's batch `index` of an epoch; `generator` is this batch's own, of this rank."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        # A generator: nothing below happens before the first batch is asked for.
        end = len(self) if self.ends_after is None else min(len(self), self.ends_after)
        if not self._continues or self._batch >= end:
            self._epoch, self._batch = self._epoch + 1, 0
        self._continues = False
        epoch = 0 if self.repeat else self._epoch
        plan = self.plan(generator_of(self.seed, epoch))
        for index in range(self._batch, len(self)):
            self._batch = index + 1
            batch = self.batch(plan, index, generator_of(self.seed, epoch, index, self.rank))
            yield batch if self.attach is None else self.attach(batch)

    def state_dict(self) -> dict[str, Any]:
        """The position and what it depends on; plain numbers and text."""
        return {"epoch": self._epoch, "batch": self._batch, **self.settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at a saved position with the next iterator.

        Raises:
            ValueError: the data of that run was cut otherwise, so that the position means nothing here.
        """
        different = [
            f"{self.words[name]}: {state_dict.get(name)} in the checkpoint, {here} now"
            for name, here in self.settings().items()
            if state_dict.get(name) != here
        ]
        if different:
            raise ValueError(
                "the position in the training data cannot be restored, for the data is not the checkpoint's: "
                f"{'; '.join(different)}. Resume with the checkpoint's settings, or start a new run from its weights"
            )
        self._epoch, self._batch = int(state_dict["epoch"]), int(state_dict["batch"])
        self._continues = True
