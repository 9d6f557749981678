"""All ways to arrange a model on devices, those that fit first, the fastest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from switchkit.checks import at_least
from switchkit.counts import Counts, buffered, count
from switchkit.dispatch.einsum import Einsum
from switchkit.dispatch.padded import Padded
from switchkit.layers import moe_layers
from switchkit.optim import OptimizerFactory
from switchkit.parallel.mesh import Layout
from switchkit.plan.activations import activations, rows_of
from switchkit.plan.estimate import Arrangement, Estimate, Step, memory, reason
from switchkit.plan.hardware import Gpu, Precision
from switchkit.plan.optimizer import needs_whole, state_bytes
from switchkit.plan.traffic import Collective, Exchange, ddp_collectives, fsdp_collectives, seconds
from switchkit.plan.units import Shape, Unit, units

__all__ = ["Plan", "Refused", "Work", "plan"]


@dataclass(frozen=True)
class Work:
    """What each device does in a step."""

    batch: int
    """Sequences of a micro-batch."""
    context: int
    """Tokens of a sequence; of an encoder-decoder's, on each side."""
    precision: Precision
    accumulate: int = 1
    """Micro-batches."""
    imbalance: float = 1.0
    """How many times the mean number of rows the busiest device's experts get: 1 is an even load."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch on one device."""
        return self.batch * self.context


@dataclass(frozen=True)
class Refused:
    """Sizes that the strategy does not take, or the strategy, where it does not take the optimizer."""

    what: str
    why: str


@dataclass(frozen=True)
class Plan:
    """Every arrangement of a model on so many devices."""

    counts: Counts
    fits: tuple[Estimate, ...]
    """The fastest first."""
    rest: tuple[Estimate, ...]
    """What does not fit, what needs least memory first."""
    refused: tuple[Refused, ...]


def plan(
    model: nn.Module,
    optimizer: OptimizerFactory,
    work: Work,
    gpu: Gpu,
    *,
    nodes: int,
    gpus: int,
    headroom: float = 0.1,
    checkpointing: bool | None = None,
) -> Plan:
    """Count every arrangement of `nodes` machines of `gpus` devices; nothing is built, the model may be on "meta".

    Args:
        model: a `Decoder` or an `EncoderDecoder`.
        optimizer: what its parameters are given to.
        work: of each device.
        gpu: the device.
        nodes: machines.
        gpus: devices of each.
        headroom: share of a device's memory that is left free: for CUDA, buffers of the network and holes.
        checkpointing: whether blocks are computed again in the backward pass; null: only where it has to be.

    Raises:
        ValueError: fewer than one machine or device, a model whose activations are not known, an optimizer without a
            known state.
    """
    at_least(1, nodes=nodes, gpus=gpus, batch=work.batch, context=work.context)
    counter = _Counter(model, optimizer, work, gpu, gpus, headroom)
    world = nodes * gpus
    found, refused = [], []
    if (why := needs_whole(optimizer)) is not None:
        refused.append(Refused("expert_parallel", why))
    for arrangements in _arrangements(world, bool(moe_layers(model))):
        if why is not None and arrangements[0].strategy == "expert_parallel":
            continue
        try:
            made = [counter.units(arrangements[0])]
        except ValueError as error:
            refused.append(Refused(f"expert_parallel_size={arrangements[0].layout.expert}", str(error)))
            continue
        for arrangement in arrangements:
            modes = (False, True) if checkpointing is None else (checkpointing,)
            if arrangement.strategy == "ddp":
                modes = (False,)
            each = [counter.estimate(Arrangement(arrangement.strategy, arrangement.layout, m), made[0]) for m in modes]
            found.append(next((one for one in each if one.why_not is None), each[-1]))
    fits = sorted((one for one in found if one.why_not is None), key=lambda one: one.per_token)
    rest = sorted((one for one in found if one.why_not is not None), key=lambda one: one.memory.total)
    return Plan(counter.counts, tuple(fits), tuple(rest), tuple(refused))


def _arrangements(world: int, sparse: bool) -> Iterator[list[Arrangement]]:
    """DDP, then those of `ExpertParallelStrategy`, by the number of devices that share out the experts."""
    yield [Arrangement("ddp", Layout(world, 1, 1))]
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    for expert in sizes if sparse else [1]:
        copies = [n for n in sizes if world // n % expert == 0]
        yield [Arrangement("expert_parallel", Layout(n, world // n, expert)) for n in copies]


class _Counter:
    """What all arrangements of one model share."""

    def __init__(
        self, model: nn.Module, optimizer: OptimizerFactory, work: Work, gpu: Gpu, gpus: int, headroom: float
    ) -> None:
        self.model, self.optimizer, self.work, self.gpu = model, optimizer, work, gpu
        self.gpus, self.headroom = gpus, headroom
        self.counts = count(model, work.context)
        self.kept = activations(model, work.batch, work.context, work.precision, work.imbalance)
        layers = moe_layers(model).values()
        self.exchanges = [
            Exchange(round(rows_of(part, work.batch, work.context) * work.imbalance), part.d_model, part.num_experts)
            for part in layers
        ]
        full = any(isinstance(part.dispatcher, (Padded, Einsum)) for part in layers)
        experts = buffered(model, work.context) if full else self.counts.experts
        self.flops = self.counts.matched - self.counts.experts + round(experts * work.imbalance) + self.counts.routers
        self._states: dict[Shape, int] = {}

    def units(self, arrangement: Arrangement) -> tuple[Unit, ...]:
        return units(self.model, arrangement.layout.expert)

    def estimate(self, arrangement: Arrangement, own: tuple[Unit, ...]) -> Estimate:
        work, layout = self.work, arrangement.layout
        parts = self._collectives(arrangement, own)
        shapes = [shape for unit in own for shape in unit.parts(layout)]
        used = memory(
            own,
            self.kept,
            arrangement,
            work.precision,
            optimizer=sum(map(self._state, shapes)),
            accumulate=work.accumulate,
        )
        passes = 4 if arrangement.activation_checkpointing else 3
        peak = self.gpu.bf16_flops if work.precision.product == 2 else self.gpu.fp32_flops
        step = Step(
            # The backward pass costs twice the forward pass.
            compute=work.accumulate * work.tokens * self.flops * passes / (peak * self.gpu.efficiency),
            exchange=seconds(parts, self.gpu, {"tokens"}),
            collectives=seconds(parts, self.gpu, {"blocks", "experts", "root", "gradients", "counts"}),
        )
        tokens = layout.world * work.tokens * work.accumulate
        return Estimate(arrangement, used, tuple(parts), step, tokens, reason(used, self.gpu, self.headroom))

    def _collectives(self, arrangement: Arrangement, own: tuple[Unit, ...]) -> list[Collective]:
        work, layout = self.work, arrangement.layout
        if arrangement.strategy == "ddp":
            return ddp_collectives(own, self.exchanges, layout.world, self.gpus, work.precision, work.accumulate)
        return fsdp_collectives(
            own,
            self.exchanges,
            layout,
            self.gpus,
            work.precision,
            accumulate=work.accumulate,
            checkpointing=arrangement.activation_checkpointing,
        )

    def _state(self, shape: Shape) -> int:
        if shape not in self._states:
            dtype = torch.float32 if self.work.precision.weight == 4 else torch.bfloat16
            self._states[shape] = state_bytes(self.optimizer, [shape], dtype)
        return self._states[shape]
