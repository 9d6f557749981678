"""A plan as tables, and as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table

from switchkit.plan import Estimate, Gpu, Plan, Work
from switchkit.plan.hardware import GIB
from switchkit.report.numbers import three_digits, with_unit
from switchkit.report.tables import console, figures, pairs

__all__ = ["plan_tables", "plan_values"]

SHOWN = 10
LEGEND = "16x8 ep4 ac: data_parallel_replicate 16, each copy over 8, expert_parallel_size 4, activation_checkpointing"


def plan_tables(
    plan: Plan, work: Work, gpu: Gpu, nodes: int, gpus: int, headroom: float, every: bool, more: str
) -> None:
    """Print what was counted: the model and the machine, what fits, why the rest does not.

    `more`: options of `fit`, each after a space, that were asked for beside the recipe's.
    """
    out = console()
    counts = plan.counts
    step = nodes * gpus * work.tokens * work.accumulate
    rows = [
        ("parameters", f"{counts.parameters:,} in all, {counts.active:,} active for a token"),
        ("FLOPs per token", f"{with_unit(counts.flops)} forward"),
        ("machine", f"{nodes} x {gpus} {gpu.name}: {gpu.memory / GIB:.0f} GiB each, {headroom:.0%} left free"),
        (
            "links",
            f"{gpu.node_bandwidth / 1e9:.0f} GB/s of a device in its machine, "
            f"{gpu.network_bandwidth / 1e9:.0f} to others",
        ),
        ("micro-batch", f"{work.batch:,} x {work.context:,} tokens on each device, {work.precision.name}"),
        ("step", f"{work.accumulate} micro-batch{'es' * (work.accumulate > 1)}, {step:,} tokens on all devices"),
    ]
    out.print(pairs("Plan", rows))
    if plan.fits:
        shown = plan.fits if every else plan.fits[:SHOWN]
        fit = "1 arrangement fits" if len(plan.fits) == 1 else f"{len(plan.fits)} arrangements fit, the fastest first"
        for table in _tables(fit, shown):
            out.print(table)
        out.print(LEGEND, highlight=False, soft_wrap=True)
    else:
        out.print("nothing fits.")
    lines = [f"{one.arrangement}: {one.why_not}" for one in plan.rest]
    if lines:
        out.print(f"{len(lines)} do{'es' * (len(lines) == 1)} not fit:")
    for line in lines if every else lines[:SHOWN]:
        out.print(f"  {line}", highlight=False, soft_wrap=True)
    if not every and len(lines) > SHOWN:
        out.print(f"  ... and {len(lines) - SHOWN} more: --all")
    for refused in plan.refused if every else plan.refused[:SHOWN]:
        out.print(f"  {refused.what}: {refused.why}", highlight=False, soft_wrap=True)
    if not every and len(plan.refused) > SHOWN:
        out.print(f"  ... and {len(plan.refused) - SHOWN} more sizes that do not divide: --all")
    if plan.fits:
        out.print(f"the fastest: {trainer_options(plan.fits[0], nodes, gpus)}{more}", highlight=False, soft_wrap=True)


def _tables(title: str, shown: tuple[Estimate, ...]) -> Iterator[Table]:
    """Memory, then traffic and time."""
    memory = _table(
        f"{title}: GiB of a device",
        ("total", "params", "grads", "optimizer", "activations", "gathered", "copies"),
    )
    time = _table(
        "GB that leave a device in a step (params, tokens), and milliseconds",
        ("params", "tokens", "step", "compute", "exchange", "collectives", "tokens/s"),
    )
    for one in shown:
        used, step = one.memory, one.step
        parts = (
            used.total,
            used.parameters,
            used.gradients,
            used.optimizer,
            used.activations,
            used.gathered,
            used.casts,
        )
        memory.add_row(_layout(one), *(_number(part / GIB) for part in parts))
        sent = (one.sent("all_gather", "reduce_scatter", "all_reduce"), one.sent("all_to_all"))
        spent = (step.total, step.compute, step.exchange, step.collectives)
        time.add_row(
            _layout(one),
            *(_number(part / 1e9) for part in sent),
            *(_number(part * 1e3) for part in spent),
            with_unit(1 / one.per_token),
        )
    yield from (memory, time)


def _table(title: str, names: tuple[str, ...]) -> Table:
    # Seven numbers find room in 80 columns so.
    table = figures(title, ("layout", *names))
    table.collapse_padding = True
    return table


def _layout(one: Estimate) -> str:
    layout = one.arrangement.layout
    if one.arrangement.strategy == "ddp":
        return "ddp"
    return f"{layout.replicate}x{layout.shard} ep{layout.expert}" + " ac" * one.arrangement.activation_checkpointing


def _number(value: float) -> str:
    return three_digits(value) if value >= 0.01 or not value else "<0.01"


def trainer_options(one: Estimate, nodes: int, gpus: int) -> str:
    """The options of `fit` that arrange devices so."""
    start = f"--trainer.num_nodes {nodes} --trainer.devices {gpus}"
    if one.arrangement.strategy == "ddp":
        return f"{start} --trainer.strategy ddp"
    layout = one.arrangement.layout
    sizes = {"expert_parallel_size": layout.expert, "data_parallel_replicate": layout.replicate}
    if one.arrangement.activation_checkpointing:
        sizes["activation_checkpointing"] = True
    options = " ".join(f"--trainer.strategy.{name} {str(value).lower()}" for name, value in sizes.items())
    return f"{start} --trainer.strategy.class_path switchkit.parallel.ExpertParallelStrategy {options}"


def plan_values(plan: Plan) -> dict[str, Any]:
    """Everything that was counted, as JSON can have it: bytes and seconds."""
    return {
        "counts": {**asdict(plan.counts), "flops": plan.counts.flops},
        "fits": [_values(one) for one in plan.fits],
        "rest": [_values(one) for one in plan.rest],
        "refused": [asdict(one) for one in plan.refused],
    }


def _values(one: Estimate) -> dict[str, Any]:
    layout = one.arrangement.layout
    return {
        "strategy": one.arrangement.strategy,
        "data_parallel_replicate": layout.replicate,
        "shard": layout.shard,
        "expert_parallel_size": layout.expert,
        "activation_checkpointing": one.arrangement.activation_checkpointing,
        "memory": {**asdict(one.memory), "total": one.memory.total},
        "collectives": [{**asdict(part), "sent": part.sent} for part in one.collectives],
        "seconds": {**asdict(one.step), "total": one.step.total},
        "tokens": one.tokens,
        "seconds_per_token": one.per_token,
        "why_not": one.why_not,
    }
