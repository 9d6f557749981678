"""One arrangement of devices: what it takes of a device's memory, and how long a step lasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from switchkit.parallel.mesh import Layout
from switchkit.plan.activations import Activations
from switchkit.plan.hardware import GIB, Gpu, Precision
from switchkit.plan.traffic import Collective
from switchkit.plan.units import Unit

__all__ = ["Arrangement", "Estimate", "Memory", "Step", "memory", "reason"]


@dataclass(frozen=True)
class Arrangement:
    """A strategy with its sizes."""

    strategy: Literal["ddp", "expert_parallel"]
    layout: Layout
    activation_checkpointing: bool = False

    def __str__(self) -> str:
        """As `ExpertParallelStrategy` takes it."""
        if self.strategy == "ddp":
            return "ddp"
        sizes = f"expert_parallel_size={self.layout.expert}, data_parallel_replicate={self.layout.replicate}"
        return f"{sizes}, activation_checkpointing" if self.activation_checkpointing else sizes


@dataclass(frozen=True)
class Memory:
    """Bytes of the first device, which has the largest parts."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    """What lives while a block computes: its parameters and the next one's, whole, and their gradients; with DDP the
    buckets of gradients."""
    casts: int
    """Copies of matrices in half precision, which autocast makes and the backward pass holds."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.gathered + self.casts


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step."""

    compute: float
    exchange: float
    """Rows to experts and back: computing waits for it."""
    collectives: float
    """Parameters and gradients: they travel while the device computes."""

    @property
    def total(self) -> float:
        """The longer of computing and collectives, and the exchange, which nothing hides."""
        return self.exchange + max(self.compute, self.collectives)


@dataclass(frozen=True)
class Estimate:
    """An arrangement, counted."""

    arrangement: Arrangement
    memory: Memory
    collectives: tuple[Collective, ...]
    step: Step
    tokens: int
    """Of a step, on all devices."""
    why_not: str | None
    """Why it does not fit; null: it does."""

    @property
    def per_token(self) -> float:
        """Seconds of the whole machine for one token."""
        return self.step.total / self.tokens

    def sent(self, *kinds: str) -> int:
        """Bytes that leave a device in a step, by collectives of these kinds."""
        return sum(part.sent for part in self.collectives if part.kind in kinds)


def memory(
    units: Sequence[Unit],
    activations: Activations,
    arrangement: Arrangement,
    precision: Precision,
    *,
    optimizer: int,
    accumulate: int = 1,
) -> Memory:
    """What a device holds; `optimizer` is the bytes of its state, as `state_bytes` counts them of its parts.

    With accumulation FSDP2 keeps whole gradients from the first micro-batch to the last, which are scattered then.
    """
    width = precision.weight
    checkpointing = arrangement.activation_checkpointing
    kept = activations.most(checkpointing)
    if arrangement.strategy == "ddp":
        whole = width * sum(unit.numel for unit in units)
        return Memory(whole, whole, optimizer, kept, whole, _casts(units, None, precision, checkpointing))
    layout = arrangement.layout
    held = width * sum(unit.held(layout) for unit in units)
    by_block: dict[int, int] = {}
    for unit in units:
        by_block[unit.block] = by_block.get(unit.block, 0) + width * unit.gathered(layout)
    gradients = held + (sum(by_block.values()) if accumulate > 1 else 0)
    root = by_block.pop(-1, 0)
    block = max(by_block.values(), default=0)
    # The root with its gradient; of blocks the one that computes and the next one, one gradient as it is made and the
    # one before it as it is sent.
    around = 2 * root + 4 * block if accumulate == 1 else root + 3 * block
    return Memory(held, gradients, optimizer, kept, around, _casts(units, layout, precision, checkpointing))


def _casts(units: Sequence[Unit], layout: Layout | None, precision: Precision, checkpointing: bool) -> int:
    if not precision.casts:
        return 0
    by_block: dict[int, int] = {}
    for unit in units:
        share = layout.expert if layout is not None and unit.kind == "experts" else 1
        by_block[unit.block] = by_block.get(unit.block, 0) + precision.product * unit.cast // share
    root = by_block.pop(-1, 0)
    blocks = list(by_block.values())
    return root + (max(blocks, default=0) if checkpointing else sum(blocks))


def reason(memory: Memory, gpu: Gpu, headroom: float) -> str | None:
    """Why this is too much for a device, with the largest part of it; null: it is not."""
    room = gpu.memory * (1 - headroom)
    if memory.total <= room:
        return None
    words = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer state": memory.optimizer,
        "activations": memory.activations,
        "what is gathered": memory.gathered,
        "half-precision copies": memory.casts,
    }
    most = max(words, key=lambda name: words[name])
    return f"{_size(memory.total)} of {_size(room)}: most is {most}, {_size(words[most])}"


def _size(amount: float) -> str:
    return f"{amount / GIB:,.0f} GiB" if amount >= GIB else f"{amount / 2**20:,.3g} MiB"
