"""Windows of a text, each turned by an objective into what an encoder-decoder reads and writes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import ClassVar

import torch
from torch import Tensor

from switchkit.data.anywhere import AnywhereWindows
from switchkit.data.objectives import Objective
from switchkit.data.resumable import generator_of
from switchkit.data.tokens import Tokens

__all__ = ["ObjectiveInOrder", "ObjectiveWindows"]


class ObjectiveWindows(AnywhereWindows):
    """Windows that start anywhere in the text, turned by an objective into batches of `batch_size` rows.

    What the objective draws is a function of `seed`, the epoch, the batch and the rank. So a resumed run sees the very
    batches that it would have seen.

    Args:
        tokens: the text.
        objective: turns rows of `raw` tokens into a batch.
        raw: tokens of a window.
        batch_size: windows of a batch.
        seed: of starts and draws.
        rank: which share of each step this process takes.
        world_size: how many shares there are.

    Raises:
        ValueError: a text shorter than a window.
    """

    named = "raw"
    words: ClassVar[dict[str, str]] = {
        "raw": "tokens of a window (inputs_length and the objectives decide it)",
        "windows": "windows of a step (batch_size times devices)",
        "seed": "seed",
        "num_tokens": "tokens of the training text",
    }

    def __init__(
        self,
        tokens: Tokens,
        objective: Objective,
        raw: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(tokens) < raw:
            raise ValueError(f"a window needs {raw} tokens, the text has {len(tokens)}; give a longer text")
        super().__init__(tokens, raw, batch_size, seed=seed, rank=rank, world_size=world_size)
        self.objective = objective

    def batch(self, plan: Tensor, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        return self.objective(self.rows(plan[index]), generator)


class ObjectiveInOrder:
    """The whole text in consecutive windows of `raw` tokens, each with draws of its own that never change.

    The draws are a function of `seed` and the window's number, not of the batch it is in. The last window has what is
    left and is a batch of its own; where that would be one token, it takes one more from the window before.

    Args:
        tokens: the text, two tokens at least.
        objective: turns rows into a batch.
        raw: tokens of a window, 2 at least.
        batch_size: windows of a batch.
        seed: of the draws.

    Raises:
        ValueError: a text of fewer than two tokens.
    """

    def __init__(self, tokens: Tokens, objective: Objective, raw: int, batch_size: int, *, seed: int = 0) -> None:
        if len(tokens) < 2:
            raise ValueError(f"a text of {len(tokens)} tokens leaves nothing to learn; give 2 or more")
        self.tokens = tokens
        self.objective = objective
        self.raw = raw
        self.batch_size = batch_size
        self.seed = seed

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for windows in self._batches():
            rows = [self._row(*window) for window in windows]
            yield {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _row(self, number: int, start: int, end: int) -> dict[str, Tensor]:
        return self.objective(self.tokens[start:end][None], generator_of(self.seed, "evaluation", number))

    def _batches(self) -> list[list[tuple[int, int, int]]]:
        """Number, start and end of each window; those of a batch are equally long."""
        total = len(self.tokens)
        bounds = [*range(0, total, self.raw), total]
        if total % self.raw == 1:
            # Of a window of two tokens none can be taken: it gets the last one as a third.
            bounds[-2:-1] = [bounds[-2] - 1] if self.raw > 2 else []
        windows = [(number, *pair) for number, pair in enumerate(pairwise(bounds))]
        batches = []
        for _, same in groupby(windows, key=lambda window: window[2] - window[1]):
            group = list(same)
            batches += [group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size)]
        return batches
