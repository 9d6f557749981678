"""The training step of a recipe in several processes, against one process on the same batch."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.spawn import ProcessException, start_processes

from switchkit.bench.overhead import quiet
from switchkit.bench.ranks import ALONE, Job, work
from switchkit.bench.step import found_recipe, pool, read
from switchkit.bench.timing import Timing, ratios
from switchkit.cli.errors import UserError
from switchkit.layers import moe_layers
from switchkit.parallel.experts import stacked
from switchkit.spec import build

__all__ = ["expert_sizes", "launch", "measure"]

ROUNDS = 25
"""Processes have to agree on when to end, so it is a number and no time."""
DEADLINE = 1800.0
"""Seconds, after which all processes are ended."""


def measure(name: str, device: torch.device, processes: int, rounds: int | None, threads: int | None) -> dict[str, Any]:
    """Every figure about a recipe's step in so many processes, as plain data.

    On a CPU they talk by gloo over the loopback, each with `threads` threads (1 by default), and one process alone has
    as many threads as all of them; on GPUs by NCCL, each with a GPU of its own.

    Raises:
        UserError: too few GPUs, a batch that cannot be shared out, a recipe that is not measured.
        RuntimeError: a process failed, or the deadline passed; all have ended.
    """
    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise UserError(
            f"--distributed {processes}: there are {torch.cuda.device_count()} GPUs; give at most as many processes, "
            "or --device cpu"
        )
    with tempfile.TemporaryDirectory() as folder, quiet():
        recipe = read(["--config", found_recipe(name)], torch.device("cpu"), folder)
        batches = pool(recipe, torch.device("cpu"))
        rows, length = batches[0]["tokens"].shape
        if rows % processes:
            raise UserError(
                f"--distributed {processes}: the {rows} sequences of {name}'s batch cannot be shared out; give a "
                "number of processes that divides them"
            )
        # As a checkpoint rebuilds it: what jsonargparse made of an optimizer does not travel to another process.
        module = build(recipe.module.spec)()
        module.load_state_dict(recipe.module.state_dict())
        job = Job(
            module=module,
            batches=batches,
            processes=processes,
            expert_sizes=expert_sizes(module, processes),
            device=device.type,
            precision=recipe.trainer.precision,
            clip=float(recipe.trainer.gradient_clip_val or 0.0),
            rounds=rounds or ROUNDS,
            threads=threads or 1,
            seconds=DEADLINE,
            folder=folder,
        )
        launch(work, job, processes, DEADLINE)
        found = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]
    # A step is over when the last process is done with it.
    timings = {
        label: Timing(
            seconds := tuple(map(max, zip(*(each[label]["seconds"] for each in found), strict=True))), seconds
        )
        for label in found[0]
    }
    return {
        "recipe": name,
        "processes": processes,
        "backend": "nccl" if device.type == "cuda" else "gloo",
        "threads": {"each": job.threads, "alone": job.threads * processes},
        "parameters": sum(weight.numel() for weight in module.parameters()),
        "sequences": rows,
        "tokens_per_step": rows * length,
        "precision": str(job.precision),
        "rounds": job.rounds,
        "rows": [_row(label, timings, [each[label] for each in found]) for label in timings],
    }


def expert_sizes(module: nn.Module, processes: int) -> tuple[int, ...]:
    """1, which is FSDP2 alone, and each power of two up to the processes that divides them and all layers' experts.

    A dense model, and experts that have no stacked weights, leave 1.
    """
    layers = moe_layers(module)
    try:
        for name, layer in layers.items():
            stacked(name, layer.experts)
    except ValueError:
        return (1,)
    sizes = [2**power for power in range(processes.bit_length())] if layers else [1]
    shared = [processes, *(layer.num_experts for layer in layers.values())]
    return tuple(size for size in sizes if all(number % size == 0 for number in shared))


def launch(function: Callable[..., None], job: Any, processes: int, seconds: float) -> None:
    """Run ``function(rank, job)`` in so many processes, which all end when one of them fails or the time is over.

    Raises:
        RuntimeError: names the process and gives its traceback, or says that the time was over.
    """
    # Kineto, torch's profiler, tells of its start and end.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    context = start_processes(  # type: ignore[no-untyped-call]
        function, args=(job,), nprocs=processes, join=False, daemon=True
    )
    assert context is not None
    until = time.monotonic() + seconds
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > until:
                raise RuntimeError(f"the {processes} processes were not done within {seconds:g} seconds")
    except ProcessException as error:
        raise RuntimeError(f"process {error.error_index} of {processes} failed: {error}") from None
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def _row(label: str, timings: dict[str, Timing], each: list[dict[str, Any]]) -> dict[str, Any]:
    """One contestant: times, and the means over the processes of what they sent."""
    timing = timings[label]
    ratio, low, high = ratios(timing, timings[ALONE])
    row = {
        "name": label,
        "ms": 1000 * timing.median,
        "min_ms": 1000 * timing.least,
        "max_ms": 1000 * max(timing.seconds),
        "ratio": ratio,
        "quartiles": [low, high],
        "first_norm": each[0]["first_norm"],
    }
    if label == ALONE:
        return row
    kinds = sorted({kind for one in each for kind in one["sent_bytes"]})
    sent = {kind: statistics.fmean(one["sent_bytes"].get(kind, 0) for one in each) for kind in kinds}
    return row | {
        "under_way": statistics.fmean(one["under_way"] for one in each),
        "sent_bytes": sum(sent.values()),
        "sent_by_kind": sent,
        "collectives": sum(each[0]["collectives"].values()),
        "not_counted": sorted({name for one in each for name in one["not_counted"]}),
    }
