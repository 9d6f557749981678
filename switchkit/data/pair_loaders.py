"""Batches of sentence pairs: of like length and in random order to train on, in the file's order to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from switchkit.data.encoded_pairs import EncodedPairs
from switchkit.data.published import DataError
from switchkit.data.resumable import TrainingLoader

__all__ = ["BucketedPairs", "PairsInOrder"]


class BucketedPairs(TrainingLoader[list[Tensor]]):
    """Batches of pairs of like length, in random order: the batches of `EncodedPairs.batch`.

    The pairs, sorted by their longer side, are cut into buckets of equal numbers. In each epoch a bucket is shuffled
    and cut into batches; what is left over goes into the bucket of the next longer ones, and what is left over there,
    less than one step, is left out of the epoch. Then the batches are shuffled. All of it is a function of `seed` and
    the epoch alone. A step of several ranks is cut into shares of one size, all filled up to the longest pair of the
    step: the capacity of experts counts what fills up, and who is dropped must not depend on the ranks.

    Args:
        pairs: what to read.
        batch_size: pairs of a batch, B.
        batch_tokens: instead, as many pairs as have this number of tokens at most, padding counted, on the longer side;
            one pair at least. None: `batch_size`.
        buckets: how many; more waste less padding and mix less.
        seed: of the order.
        rank: which share of each step this process takes.
        world_size: how many shares there are.

    Raises:
        DataError: fewer pairs than one step has.
    """

    words: ClassVar[dict[str, str]] = {
        "buckets": "pairs of each length and of a step (batch_size or batch_tokens times devices)",
        "seed": "seed",
    }

    def __init__(
        self,
        pairs: EncodedPairs,
        batch_size: int,
        *,
        batch_tokens: int | None = None,
        buckets: int = 16,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(seed=seed, rank=rank, world_size=world_size)
        self.pairs = pairs
        longest = pairs.longest
        order = longest.argsort(stable=True)
        self._buckets = order.tensor_split(min(buckets, len(pairs)))
        self._longest = [int(longest[bucket[-1]]) for bucket in self._buckets]
        self._sizes = [batch_size if batch_tokens is None else max(1, batch_tokens // most) for most in self._longest]
        self._length, carried = 0, 0
        for bucket, size in zip(self._buckets, self._sizes, strict=True):
            steps, carried = divmod(len(bucket) + carried, size * world_size)
            self._length += steps
        if not self._length:
            raise DataError(
                f"there are {len(pairs):,} pairs to train on, fewer than the {self._sizes[-1] * world_size:,} of a "
                "step; lower data.batch_size or data.batch_tokens, or give more pairs"
            )

    def __len__(self) -> int:
        return self._length

    def settings(self) -> dict[str, int | str]:
        kinds = zip(self._buckets, self._longest, self._sizes, strict=True)
        described = (f"{len(bucket)} to {longest} by {n * self.world_size}" for bucket, longest, n in kinds)
        return {"buckets": ", ".join(described), "seed": self.seed}

    def plan(self, generator: torch.Generator) -> list[Tensor]:
        """The pairs of an epoch's steps, [ranks, B] each."""
        batches: list[Tensor] = []
        carried = torch.zeros(0, dtype=torch.long)
        for bucket, size in zip(self._buckets, self._sizes, strict=True):
            bucket = torch.cat([carried, bucket[torch.randperm(len(bucket), generator=generator)]])
            whole = len(bucket) // (size * self.world_size) * size * self.world_size
            batches += bucket[:whole].view(-1, self.world_size, size)
            carried = bucket[whole:]
        return [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]

    def mean_sizes(self) -> tuple[float, float]:
        """Tokens of a batch's `source` and `tokens`, padding counted: means over an epoch, the same for every seed."""
        plan = self.plan(torch.Generator().manual_seed(0))
        sides = self.pairs.source_length, self.pairs.target_length
        source, tokens = (sum(step.shape[1] * int(side[step].max()) for step in plan) / len(plan) for side in sides)
        return source, tokens

    def batch(self, plan: list[Tensor], index: int, generator: torch.Generator) -> dict[str, Tensor]:
        return self.pairs.batch(plan[index][self.rank], plan[index].flatten())


class PairsInOrder:
    """Every pair once, in the order of the lines, the languages of a line one after the other.

    Args:
        pairs: what to read.
        batch_size: pairs of a batch; the last one may have fewer.
        first: read so many pairs only; None or 0: all.
    """

    def __init__(self, pairs: EncodedPairs, batch_size: int, first: int | None = None) -> None:
        self.pairs = pairs
        self.batch_size = batch_size
        self.count = min(first or len(pairs), len(pairs))

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, self.count, self.batch_size):
            yield self.pairs.batch(torch.arange(start, min(start + self.batch_size, self.count)))
