"""Windows that start anywhere in a text: what the loaders of them share."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from switchkit.data.resumable import TrainingLoader
from switchkit.data.tokens import Tokens

__all__ = ["AnywhereWindows", "next_tokens"]


class AnywhereWindows(TrainingLoader[Tensor]):
    """Windows that start anywhere in a text; a subclass makes a batch of the rows that are read.

    An epoch is as many windows as the text has room for. Their starts are a function of `seed` and the epoch alone. All
    ranks draw the same starts and each takes its share, so a step sees the same windows on 2 devices with batch_size 8
    as on 1 with batch_size 16.

    Args:
        tokens: the text, with one window at least.
        length: tokens of a window, of which the text has room for so many.
        batch_size: windows of a batch, B.
        beyond: tokens that are read behind each window, such as the last one's target.
        seed: of the starts.
        rank: which share of each step this process takes.
        world_size: how many shares there are.
    """

    named: ClassVar[str]
    """What the length of a window is called in `settings`."""

    def __init__(
        self,
        tokens: Tokens,
        length: int,
        batch_size: int,
        *,
        beyond: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(seed=seed, rank=rank, world_size=world_size)
        self.tokens = tokens
        self.length = length
        self.batch_size = batch_size
        self.beyond = beyond

    def __len__(self) -> int:
        return max(1, len(self.tokens) // (self.length * self.batch_size * self.world_size))

    def settings(self) -> dict[str, int | str]:
        return {
            self.named: self.length,
            "windows": self.batch_size * self.world_size,
            "seed": self.seed,
            "num_tokens": len(self.tokens),
        }

    def plan(self, generator: torch.Generator) -> Int[Tensor, "batches B"]:
        """Where this rank's windows of an epoch begin."""
        size = (len(self), self.world_size, self.batch_size)
        starts = len(self.tokens) - self.length - self.beyond + 1
        return torch.randint(starts, size, generator=generator)[:, self.rank]

    def rows(self, starts: Int[Tensor, "B"]) -> Int[Tensor, "B N"]:
        """The N = length + beyond tokens from each start."""
        return self.tokens[starts[:, None] + torch.arange(self.length + self.beyond)]


def next_tokens(rows: Int[Tensor, "B N"]) -> dict[str, Int[Tensor, "B S"]]:
    """What a decoder reads of S + 1 tokens, and what it is to say: ``{"tokens", "targets"}``."""
    return {"tokens": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}
