"""Routing by what a token is, not by what surrounds it."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchkit.checks import one_of
from switchkit.records import Routing
from switchkit.registry import register
from switchkit.routing.base import Router, check_k
from switchkit.routing.unlearned import scramble, uniform

__all__ = ["Hash"]


@register("hash")
class Hash(Router):
    """The experts of a token follow from its id alone: k different ones, each with weight 1/k, nothing learned.

    `table`: "hash" mixes the id and `seed` into a number per expert and takes the k largest, for ids of any size, or
    "balanced" looks it up, where no expert has more than one id of the vocabulary more than another, dealt in an order
    that `seed` shuffles. "balanced" needs `vocab_size`, or `counts`, how often each id occurs in the corpus: the most
    frequent id then goes to the expert with the fewest tokens so far, and so on, ids that never occur last, to those
    with the fewest ids. Layers with the same seed decide alike.

    The table is a buffer that checkpoints keep. Ids of padding are not read. `logits` are zero and `probs` uniform, so
    that a balance loss is 1 and has no gradient: the load is as even as the corpus lets it be.

    Elsewhere: DeepSeek-V4 takes the experts of its first layers from such a table, but weights them by a learned score.

    Raises:
        ValueError: k outside 1 ... num_experts, a balanced table without vocab_size or counts, either of them for
            "hash", counts that are negative or not of vocab_size, a seed outside 0 ... 2**32 - 1. In `forward`: no ids,
            or on a CPU an id outside the table; on another device that is the device's own error, as looking for it
            would wait for the device.

    Source: arXiv 2106.04426 (Hash Layers), section 3.
    """

    needs_ids: ClassVar[bool] = True
    table: Tensor | None

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        k: int = 1,
        table: Literal["hash", "balanced"] = "hash",
        vocab_size: int | None = None,
        counts: list[int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(d_model, num_experts)
        self.k = check_k(k, num_experts)
        one_of("table", table, ("hash", "balanced"))
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2**32 - 1; got {seed}")
        if table == "hash" and (vocab_size is not None or counts is not None):
            raise ValueError("vocab_size and counts do nothing with table='hash': leave them out or use 'balanced'")
        self.seed = seed
        # On the CPU even where the module is built on no device at all.
        self.salt = int(scramble(torch.tensor(seed, device="cpu")))
        self.register_buffer("table", _table(num_experts, k, vocab_size, counts, seed) if table == "balanced" else None)

    def forward(
        self,
        tokens: Float[Tensor, "G S D"],
        limit: int | None,
        valid: Bool[Tensor, "G S"],
        ids: Int[Tensor, "G S"] | None = None,
    ) -> Routing:
        if ids is None:
            raise ValueError("the hash router routes by token ids: call router(tokens, limit, valid, ids)")
        ids = ids.long().masked_fill(~valid, 0)
        if self.table is None:
            mixed = scramble(scramble(ids) ^ self.salt)
            column = torch.arange(self.num_experts, device=ids.device) * 0x85EBCA77
            expert = scramble(mixed.unsqueeze(-1) + column).topk(self.k, dim=-1).indices
        else:
            try:
                # Indexing would take negative ids for places from the end.
                expert = F.embedding(ids, self.table)
            except IndexError as outside:
                size = len(self.table)
                raise ValueError(
                    f"token ids must be from 0 to {size - 1}, as the table has vocab_size={size}; some are outside"
                ) from outside
        return uniform(self, tokens, expert, valid)


def _table(experts: int, k: int, size: int | None, counts: Sequence[int] | None, seed: int) -> Int[Tensor, "V K"]:
    """The k experts of every id."""
    if counts is not None:
        if size is not None and len(counts) != size:
            raise ValueError(f"counts must have one entry per id, vocab_size={size}; got {len(counts)}")
        if not counts or not all(math.isfinite(count) and count >= 0 for count in counts):
            raise ValueError("counts must be numbers >= 0, one per id, and at least one; some are not")
        size = len(counts)
    if size is None or size < 1:
        raise ValueError(f"table='balanced' needs vocab_size >= 1, or counts; got vocab_size={size}")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed), device="cpu")
    if counts is not None:
        return _greedy(counts, order.tolist(), experts, k)
    dealt = torch.arange(size * k, device="cpu").view(size, k) % experts
    return torch.empty_like(dealt).index_copy_(0, order, dealt)


def _greedy(counts: Sequence[int], order: list[int], experts: int, k: int) -> Int[Tensor, "V K"]:
    """The most frequent id first, to the k experts with the fewest tokens; among equals in the given order."""
    chosen: list[list[int]] = [[]] * len(counts)
    # Tokens so far, ids so far, expert.
    heap = [(0, 0, e) for e in range(experts)]
    often = sorted((i for i in order if counts[i]), key=lambda i: -counts[i])
    for i in often:
        chosen[i] = _serve(heap, counts[i], k)
    heap = [(ids, ids, e) for _, ids, e in heap]
    heapq.heapify(heap)
    for i in order:
        if not counts[i]:
            chosen[i] = _serve(heap, 1, k)
    return torch.tensor(chosen, device="cpu")


def _serve(heap: list[tuple[int, int, int]], count: int, k: int) -> list[int]:
    """The k first experts of the queue, which go back into it with so many tokens and one id more."""
    taken = [heapq.heappop(heap) for _ in range(k)]
    for tokens, ids, e in taken:
        heapq.heappush(heap, (tokens + count, ids + 1, e))
    return [e for _, _, e in taken]
