"""Batches of tokens: random windows to train on, the whole text in order to evaluate on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["InOrder", "RandomWindows"]

_SETTINGS = {
    "context": "tokens of a window (context)",
    "windows": "windows of a step (batch_size times devices)",
    "seed": "seed",
    "num_tokens": "tokens of the training text",
}


class RandomWindows:
    """Windows that start anywhere in the text, as ``{"tokens": [B, S], "targets": [B, S]}``, both int64.

    An epoch is as many windows as the text has room for. Their starts are a function of `seed` and the epoch alone: no
    global random state is read or changed. All ranks draw the same starts and each takes its share, so a step sees the
    same windows on 2 devices with batch_size 8 as on 1 with batch_size 16.

    Each `iter` begins the next epoch, the first being 0. An iterator that yields nothing begins none: Lightning makes
    some and throws them away. The position counts batches yielded; after `load_state_dict` the next one goes on there.

    Args:
        tokens: the text.
        context: tokens of a window, S.
        batch_size: windows of a batch, B.
        seed: of the starts.
        rank: which share of each step this process takes.
        world_size: how many shares there are.
        ends_after: batches after which the reader stops an epoch, if sooner (``Trainer(limit_train_batches)``): a
            position there is the epoch's end. The length stays what the text gives.
        repeat: every epoch has the windows of the first (``Trainer(overfit_batches)``).

    Raises:
        ValueError: a number out of range, or a text shorter than context + 1.
    """

    def __init__(
        self,
        tokens: Int[Tensor, "N"],
        context: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        ends_after: int | None = None,
        repeat: bool = False,
    ) -> None:
        _check(tokens, context, batch_size)
        if len(tokens) < context + 1:
            raise ValueError(
                f"a window of context {context} with its targets needs {context + 1} tokens, "
                f"the text has {len(tokens)}; lower context or give a longer text"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of world_size {world_size}; rank must be 0 to world_size - 1")
        self.tokens = tokens
        self.context = context
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.ends_after = ends_after
        self.repeat = repeat
        self._epoch = 0
        self._batch = 0
        self._continues = True

    def __len__(self) -> int:
        return max(1, len(self.tokens) // (self.context * self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        # A generator: nothing below happens before the first batch is asked for.
        end = len(self) if self.ends_after is None else min(len(self), self.ends_after)
        if not self._continues or self._batch >= end:
            self._epoch, self._batch = self._epoch + 1, 0
        self._continues = False
        starts = self._starts(0 if self.repeat else self._epoch)
        for batch in range(self._batch, len(self)):
            self._batch = batch + 1
            yield self._windows(starts[batch])

    def state_dict(self) -> dict[str, Any]:
        """The position and what it depends on; plain integers."""
        return {"epoch": self._epoch, "batch": self._batch, **self._settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at a saved position with the next iterator.

        Raises:
            ValueError: the data of that run was cut otherwise, so that the position means nothing here.
        """
        here = self._settings()
        different = [
            f"{words}: {state_dict.get(name)} in the checkpoint, {here[name]} now"
            for name, words in _SETTINGS.items()
            if state_dict.get(name) != here[name]
        ]
        if different:
            raise ValueError(
                "the position in the training data cannot be restored, for the data is not the checkpoint's: "
                f"{'; '.join(different)}. Resume with the checkpoint's settings, or start a new run from its weights"
            )
        self._epoch, self._batch = int(state_dict["epoch"]), int(state_dict["batch"])
        self._continues = True

    def _settings(self) -> dict[str, int]:
        return {
            "context": self.context,
            "windows": self.batch_size * self.world_size,
            "seed": self.seed,
            "num_tokens": len(self.tokens),
        }

    def _starts(self, epoch: int) -> Int[Tensor, "batches B"]:
        """Where this rank's windows of an epoch begin."""
        digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        size = (len(self), self.world_size, self.batch_size)
        return torch.randint(len(self.tokens) - self.context, size, generator=generator)[:, self.rank]

    def _windows(self, starts: Int[Tensor, "B"]) -> dict[str, Tensor]:
        rows = self.tokens[starts[:, None] + torch.arange(self.context + 1)]
        return {"tokens": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}


class InOrder:
    """The whole text in consecutive windows: every token after the first is a target exactly once.

    Yields ``{"tokens": [B, S], "targets": [B, S], "valid": [B, S]}``. The last window is filled up with zeros, where
    `valid` is False; the last batch may have fewer windows.

    Args:
        tokens: the text, two tokens at least.
        context: tokens of a window, S.
        batch_size: windows of a batch, B.
    """

    def __init__(self, tokens: Int[Tensor, "N"], context: int, batch_size: int) -> None:
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


def _check(tokens: Tensor, context: int, batch_size: int) -> None:
    if tokens.ndim != 1 or tokens.dtype != torch.long:
        raise ValueError(f"tokens must be int64 of shape [N], got {tokens.dtype} of shape {list(tokens.shape)}")
    for name, value in (("context", context), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} {value} is not possible; it must be 1 or more")
