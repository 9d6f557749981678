"""Who is served in which slot, and in which row: by counting, where plain operations sort."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["Arranged", "arrange", "queue"]

BLOCK = 1024


class Arranged(NamedTuple):
    """Rows of expert 0, then of expert 1, ...; within an expert group by group, slot by slot."""

    row: Int[Tensor, "G N"]
    """Where each assignment goes; those that are not kept to the end, in any order."""
    source: Int[Tensor, "R"]
    """Which flat assignment each row comes from."""
    load: Int[Tensor, "E"]
    """Rows of each expert."""


def queue(
    expert: Int[Tensor, "G N"], chosen: Bool[Tensor, "G N"], experts: int
) -> tuple[Int[Tensor, "G N"], Int[Tensor, "G E"]]:
    """Of each assignment the number of chosen ones for its expert that come before it in its group; and the loads."""
    groups, n = expert.shape
    slot = torch.empty_like(expert, memory_format=torch.contiguous_format)
    load = torch.empty(groups, experts, dtype=expert.dtype, device=expert.device)
    if groups and experts:
        _queue[(groups, experts)](expert.contiguous(), chosen.contiguous(), slot, load, n, BLOCK=BLOCK)
    return slot, load


def arrange(
    expert: Int[Tensor, "G N"], slot: Int[Tensor, "G N"], kept: Bool[Tensor, "G N"], load: Int[Tensor, "G E"]
) -> Arranged:
    """The rows of assignments that sit in the slots 0 ... load - 1 of their group and expert."""
    groups, experts = load.shape
    n = expert.shape[1]
    device = expert.device
    row = torch.empty_like(expert, memory_format=torch.contiguous_format)
    # Zeros: with slots that a capacity policy gave twice, a row that nothing fills reads a token, not stray memory.
    source = torch.zeros(groups * n, dtype=expert.dtype, device=device)
    start = torch.empty(groups * experts + 1, dtype=expert.dtype, device=device)
    rows = torch.empty(experts, dtype=expert.dtype, device=device)
    if groups and experts:
        _starts[(1,)](load.contiguous(), start, rows, groups, experts, BLOCK=BLOCK)
    else:
        rows.zero_()
    if groups * n:
        _arrange[(triton.cdiv(groups * n, BLOCK),)](
            expert.contiguous(),
            slot.contiguous(),
            kept.contiguous(),
            start,
            row,
            source,
            groups * n,
            n,
            groups,
            experts,
            BLOCK=BLOCK,
        )
    return Arranged(row, source, rows)


@triton.jit
def _queue(expert, chosen, slot, load, n, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    mine = tl.program_id(1)
    count = tl.zeros([], dtype=tl.int64)
    begin = 0
    while begin < n:
        place = begin + tl.arange(0, BLOCK)
        inside = place < n
        at = group * n + place
        ours = inside & (tl.load(expert + at, mask=inside, other=-1) == mine)
        served = (ours & (tl.load(chosen + at, mask=inside, other=0) != 0)).to(tl.int64)
        before = tl.cumsum(served, axis=0) - served
        tl.store(slot + at, count + before, mask=ours)
        count += tl.sum(served, axis=0)
        begin += BLOCK
    tl.store(load + group * tl.num_programs(1) + mine, count)


@triton.jit
def _starts(load, start, rows, groups, experts, BLOCK: tl.constexpr):
    """One program: the first row of each expert and group [E, G], then the number of rows that are kept."""
    size = groups * experts
    count = tl.zeros([], dtype=tl.int64)
    begin = 0
    while begin < size:
        place = begin + tl.arange(0, BLOCK)
        inside = place < size
        expert = place // groups
        group = place % groups
        here = tl.load(load + group * experts + expert, mask=inside, other=0)
        after = count + tl.cumsum(here, axis=0)
        tl.store(start + place, after - here, mask=inside)
        count += tl.sum(here, axis=0)
        begin += BLOCK
    tl.store(start + size, count)
    tl.debug_barrier()
    begin = 0
    while begin < experts:
        expert = begin + tl.arange(0, BLOCK)
        inside = expert < experts
        first = tl.load(start + expert * groups, mask=inside, other=0)
        after = tl.load(start + (expert + 1) * groups, mask=inside, other=0)
        tl.store(rows + expert, after - first, mask=inside)
        begin += BLOCK


@triton.jit
def _arrange(expert, slot, kept, start, row, source, size, n, groups, experts, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    group = at // n
    served = inside & (tl.load(kept + at, mask=inside, other=0) != 0)
    first = tl.load(start + tl.load(expert + at, mask=inside, other=0) * groups + group, mask=inside, other=0)
    here = first + tl.load(slot + at, mask=inside, other=0)
    # Whoever comes: the counter of kept rows goes on to count the others.
    spare = tl.atomic_add(start + groups * experts + at * 0, (at * 0 + 1), mask=inside & (served == 0))
    # A slot beyond its load is a fault of a capacity policy; it must not write, or be read, outside the rows.
    to = tl.maximum(tl.minimum(tl.where(served, here, spare), size - 1), 0)
    tl.store(row + at, to, mask=inside)
    tl.store(source + to, at, mask=inside)
