"""Batches of tokens: random windows to train on, the whole text in order to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from switchkit.data.anywhere import AnywhereWindows, next_tokens
from switchkit.data.resumable import TrainingLoader
from switchkit.data.tokens import Tokens

__all__ = ["AlignedWindows", "InOrder", "RandomWindows", "Windows"]


class RandomWindows(AnywhereWindows):
    """Windows that start anywhere in the text, as ``{"tokens": [B, S], "targets": [B, S]}``, both int64.

    Args:
        tokens: the text.
        context: tokens of a window, S.
        batch_size: windows of a batch, B.
        seed: of the starts.
        rank: which share of each step this process takes.
        world_size: how many shares there are.

    Raises:
        ValueError: a number out of range, or a text shorter than context + 1.
    """

    named = "context"
    words: ClassVar[dict[str, str]] = {
        "context": "tokens of a window (context)",
        "windows": "windows of a step (batch_size times devices)",
        "seed": "seed",
        "num_tokens": "tokens of the training text",
    }

    def __init__(
        self, tokens: Tokens, context: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        _check(tokens, context, batch_size)
        _check_room(tokens, context)
        super().__init__(tokens, context, batch_size, beyond=1, seed=seed, rank=rank, world_size=world_size)

    def batch(self, plan: Tensor, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        return next_tokens(self.rows(plan[index]))


class Windows:
    """The windows of a text that begin at multiples of a stride, by number: ``{"tokens", "targets", "example"}``.

    Fixed windows are examples that can be known beforehand: what a model says of a token depends on where its window
    begins.

    Args:
        tokens: the text.
        context: tokens of a window, S.
        stride: tokens from the beginning of one window to that of the next.

    Raises:
        ValueError: a number below 1, or a text shorter than context + 1.
    """

    def __init__(self, tokens: Tokens, context: int, stride: int) -> None:
        _check(tokens, context, stride, "stride")
        _check_room(tokens, context)
        self.tokens = tokens
        self.context = context
        self.stride = stride

    def __len__(self) -> int:
        return (len(self.tokens) - self.context - 1) // self.stride + 1

    def batch(self, index: Int[Tensor, "B"]) -> dict[str, Tensor]:
        rows = self.tokens[index[:, None] * self.stride + torch.arange(self.context + 1)]
        return {**next_tokens(rows), "example": index}


class AlignedWindows(TrainingLoader[Tensor]):
    """`Windows` in random order, each once in an epoch; less than a step of them is left out at its end.

    The order is a function of `seed` and the epoch alone, and each rank takes its share of a step.

    Args:
        tokens: the text.
        context: tokens of a window, S.
        batch_size: windows of a batch, B.
        stride: see `Windows`.
        seed: of the order.
        rank: which share of each step this process takes.
        world_size: how many shares there are.

    Raises:
        ValueError: a number out of range, or fewer windows than a step has.
    """

    words: ClassVar[dict[str, str]] = {**RandomWindows.words, "stride": "tokens from window to window (stride)"}

    def __init__(
        self,
        tokens: Tokens,
        context: int,
        batch_size: int,
        *,
        stride: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check(tokens, context, batch_size)
        super().__init__(seed=seed, rank=rank, world_size=world_size)
        self.windows = Windows(tokens, context, stride)
        self.batch_size = batch_size
        if not len(self):
            raise ValueError(
                f"the text has {len(self.windows)} windows of context {context} at stride {stride}, fewer than the "
                f"{batch_size * world_size} of a step; lower batch_size or stride"
            )

    def __len__(self) -> int:
        return len(self.windows) // (self.batch_size * self.world_size)

    def settings(self) -> dict[str, int | str]:
        return {
            "context": self.windows.context,
            "windows": self.batch_size * self.world_size,
            "seed": self.seed,
            "num_tokens": len(self.windows.tokens),
            "stride": self.windows.stride,
        }

    def plan(self, generator: torch.Generator) -> Int[Tensor, "batches B"]:
        """The numbers of this rank's windows of an epoch."""
        whole = len(self) * self.world_size * self.batch_size
        order = torch.randperm(len(self.windows), generator=generator)[:whole]
        return order.view(len(self), self.world_size, self.batch_size)[:, self.rank]

    def batch(self, plan: Tensor, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        return self.windows.batch(plan[index])


class InOrder:
    """The whole text in consecutive windows: every token after the first is a target exactly once.

    Yields ``{"tokens": [B, S], "targets": [B, S], "valid": [B, S]}``. The last window is filled up with zeros, where
    `valid` is False; the last batch may have fewer windows.

    Args:
        tokens: the text, two tokens at least.
        context: tokens of a window, S.
        batch_size: windows of a batch, B.
    """

    def __init__(self, tokens: Tokens, context: int, batch_size: int) -> None:
        _check(tokens, context, batch_size)
        if len(tokens) < 2:
            raise ValueError(f"a text of {len(tokens)} tokens has nothing to predict; give 2 or more")
        self.tokens = tokens
        self.context = context
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // (self.context * self.batch_size))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        step = self.context * self.batch_size
        predicted = len(self.tokens) - 1
        for start in range(0, predicted, step):
            end = min(start + step, predicted)
            valid = torch.ones(end - start, dtype=torch.bool)
            parts = {"tokens": self.tokens[start:end], "targets": self.tokens[start + 1 : end + 1], "valid": valid}
            yield {name: self._rows(part) for name, part in parts.items()}

    def _rows(self, part: Tensor) -> Tensor:
        """[n] -> [ceil(n / S), S], filled up with zeros (False)."""
        return torch.nn.functional.pad(part, (0, -len(part) % self.context)).view(-1, self.context)


def _check_room(tokens: Tokens, context: int) -> None:
    if len(tokens) < context + 1:
        raise ValueError(
            f"a window of context {context} with its targets needs {context + 1} tokens, "
            f"the text has {len(tokens)}; lower context or give a longer text"
        )


def _check(tokens: Tokens, context: int, batch_size: int, second: str = "batch_size") -> None:
    if isinstance(tokens, Tensor) and (tokens.ndim != 1 or tokens.dtype != torch.long):
        raise ValueError(f"tokens must be int64 of shape [N], got {tokens.dtype} of shape {list(tokens.shape)}")
    for name, value in (("context", context), (second, batch_size)):
        if value < 1:
            raise ValueError(f"{name} {value} is not possible; it must be 1 or more")
