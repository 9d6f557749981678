"""Windows of a text whose draws are known beforehand, each with a number, so that something can be kept for each."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from switchkit.data.objective_windows import ObjectiveWindows
from switchkit.data.objectives import Objective
from switchkit.data.resumable import TrainingLoader, generator_of
from switchkit.data.tokens import Tokens

__all__ = ["DrawnInTurn", "DrawnWindows"]


class DrawnWindows:
    """The windows of a text at multiples of a stride, each turned by an objective in `draws` ways, by number.

    Of W windows, example ``d * W + w`` is window w in its way d. What the objective draws for it is a function of
    `seed` and that number, whatever batch it is in. A batch is the objective's, and ``"example"``, the numbers [B].

    Args:
        tokens: the text.
        objective: turns rows of `raw` tokens into a batch.
        raw: tokens of a window.
        stride: tokens from the beginning of one window to that of the next.
        draws: ways of each window.
        seed: of the draws.

    Raises:
        ValueError: a text shorter than a window.
    """

    def __init__(
        self, tokens: Tokens, objective: Objective, raw: int, stride: int, draws: int, *, seed: int = 0
    ) -> None:
        if len(tokens) < raw:
            raise ValueError(f"a window needs {raw} tokens, the text has {len(tokens)}; give a longer text")
        self.tokens, self.objective, self.raw = tokens, objective, raw
        self.stride, self.draws, self.seed = stride, draws, seed
        self.windows = (len(tokens) - raw) // stride + 1

    def __len__(self) -> int:
        return self.windows * self.draws

    def batch(self, index: Int[Tensor, "B"]) -> dict[str, Tensor]:
        starts = index % self.windows * self.stride
        whole = self.tokens[starts[:, None] + torch.arange(self.raw)]
        rows = [
            self.objective(row[None], generator_of(self.seed, "example", number))
            for row, number in zip(whole, index.tolist(), strict=True)
        ]
        return {**{name: torch.cat([row[name] for row in rows]) for name in rows[0]}, "example": index}


class DrawnInTurn(TrainingLoader[Tensor]):
    """`DrawnWindows` in random order: all windows in their first way, then all in their second, and so on.

    An epoch is all of it, as many passes over the text as there are ways. Less than a step of windows is left out at
    the end of a pass. The order is a function of `seed` and the epoch alone, and each rank takes its share of a step.

    Args:
        examples: what to read.
        batch_size: windows of a batch.
        seed: of the order.
        rank: which share of each step this process takes.
        world_size: how many shares there are.

    Raises:
        ValueError: fewer windows than a step has.
    """

    words: ClassVar[dict[str, str]] = {
        **ObjectiveWindows.words,
        "stride": "tokens from window to window (stride)",
        "draws": "ways of each window (draws)",
    }

    def __init__(
        self, examples: DrawnWindows, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(seed=seed, rank=rank, world_size=world_size)
        self.examples = examples
        self.batch_size = batch_size
        self._steps = examples.windows // (batch_size * world_size)
        if not self._steps:
            raise ValueError(
                f"the text has {examples.windows} windows of {examples.raw} tokens at stride {examples.stride}, fewer "
                f"than the {batch_size * world_size} of a step; lower batch_size or stride"
            )

    def __len__(self) -> int:
        return self._steps * self.examples.draws

    def settings(self) -> dict[str, int | str]:
        return {
            "raw": self.examples.raw,
            "windows": self.batch_size * self.world_size,
            "seed": self.seed,
            "num_tokens": len(self.examples.tokens),
            "stride": self.examples.stride,
            "draws": self.examples.draws,
        }

    def plan(self, generator: torch.Generator) -> Int[Tensor, "batches B"]:
        """The numbers of this rank's examples of an epoch."""
        count, whole = self.examples.windows, self._steps * self.world_size * self.batch_size
        passes = [torch.randperm(count, generator=generator)[:whole] + d * count for d in range(self.examples.draws)]
        return torch.cat(passes).view(len(self), self.world_size, self.batch_size)[:, self.rank]

    def batch(self, plan: Tensor, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        return self.examples.batch(plan[index])
