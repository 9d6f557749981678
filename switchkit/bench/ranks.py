"""What each of several processes does for ``switchkit bench --distributed``: the same steps, in the same order."""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from switchkit.bench.overhead import quiet
from switchkit.bench.timing import Clock, clock_of, interleave
from switchkit.bench.traffic import Traffic, under_way
from switchkit.ddp import DataParallelStrategy
from switchkit.module import LanguageModule
from switchkit.parallel.norm import clip_norm
from switchkit.strategies import ExpertParallelStrategy

__all__ = ["ALONE", "Job", "Step", "work"]

ALONE = "one process"
PROFILED = 5
"""Steps under the profiler, after those that are timed."""


@dataclass(frozen=True)
class Job:
    """What is measured, the same for every process."""

    module: LanguageModule
    batches: list[dict[str, Tensor]]
    """Whole batches, whose rows are shared out."""
    processes: int
    expert_sizes: tuple[int, ...]
    device: str
    """cpu or cuda."""
    precision: Any
    clip: float
    rounds: int
    threads: int
    """Of torch in each process; one process alone has as many as all together."""
    seconds: float
    folder: str
    """Where the processes meet and leave what they found."""


def work(rank: int, job: Job) -> None:
    """Measure as one of the processes; the figures are written to ``RANK.json``."""
    # So that Lightning takes the processes as they are and starts none.
    os.environ["LOCAL_RANK"] = str(rank)
    if sys.platform == "linux":
        # A machine's own name need not be known to itself.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(job.threads)
    device = torch.device("cuda", rank) if job.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(f"{job.folder}/meeting", job.processes),  # type: ignore[attr-defined]
        rank=rank,
        world_size=job.processes,
        timeout=timedelta(seconds=job.seconds),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        with quiet():
            warnings.simplefilter("ignore")
            found = _measure(rank, job, device)
        Path(job.folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


class Step:
    """A training step as `strategy` has it, without the Trainer around it: forward, backward, clip, optimizer."""

    def __init__(self, job: Job, strategy: Strategy | str, devices: int) -> None:
        module = copy.deepcopy(job.module)
        trainer = Trainer(
            accelerator="gpu" if job.device == "cuda" else "cpu",
            devices=devices,
            strategy=strategy,
            precision=job.precision,
            max_steps=1000,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        # What Trainer.fit does before its loop.
        trainer.state.fn = TrainerFn.FITTING
        module.trainer = trainer
        self.strategy, self.module, self.clip = trainer.strategy, module, job.clip
        self.strategy.connect(module)
        self.strategy.setup_environment()
        with self.strategy.model_sharded_context():
            module.configure_model()
        self.strategy.setup(trainer)
        module.train()
        self.norm: Tensor | None = None

    def __call__(self, batch: dict[str, Tensor]) -> None:
        (optimizer,) = self.strategy.optimizers
        optimizer.zero_grad()
        learned: Any = self.strategy.training_step(batch, 0)
        learned["loss"].backward()
        self.norm = clip_norm(self.module.parameters(), self.clip or float("inf"))
        optimizer.step()
        # Lightning's hook before a fit: the module forgets the counts of the step.
        self.module.setup("fit")


class Together(Clock):
    """Every process begins at the same time."""

    def __init__(self, inner: Clock) -> None:
        self.inner = inner

    def time(self, run: Callable[[], object]) -> tuple[float, float]:
        dist.barrier()
        return self.inner.time(run)

    def synchronize(self) -> None:
        self.inner.synchronize()


def _measure(rank: int, job: Job, device: torch.device) -> dict[str, Any]:
    whole = [{name: part.to(device) for name, part in batch.items()} for batch in job.batches]
    rows = len(whole[0]["tokens"]) // job.processes
    own = [{name: part[rank * rows : (rank + 1) * rows] for name, part in batch.items()} for batch in whole]
    contestants: dict[str, Callable[[], object]] = {ALONE: lambda: None}
    norms: dict[str, float] = {}
    steps: dict[str, Step] = {}
    if rank == 0:
        steps[ALONE] = Step(job, "auto", 1)
        run_alone = _in_turn(steps[ALONE], whole)

        def by_itself() -> None:
            torch.set_num_threads(job.threads * job.processes)
            run_alone()
            torch.set_num_threads(job.threads)

        contestants[ALONE] = by_itself
    strategies: dict[str, Strategy] = {"ddp": DataParallelStrategy()}
    for size in job.expert_sizes:
        name = "expert_parallel" if size == 1 else f"expert_parallel_{size}"
        strategies[name] = ExpertParallelStrategy(size)
    for name, strategy in strategies.items():
        steps[name] = Step(job, strategy, job.processes)
        contestants[name] = _in_turn(steps[name], own)
    for name, run in contestants.items():
        dist.barrier()
        run()
        if name in steps:
            norms[name] = float(steps[name].norm)  # type: ignore[arg-type]
    timings = interleave(contestants, Together(clock_of(device)), job.rounds)
    found: dict[str, Any] = {}
    for name, timing in timings.items():
        found[name] = {"seconds": timing.seconds, "first_norm": norms.get(name)}
        if name == ALONE:
            continue
        dist.barrier()
        with Traffic() as traffic:
            contestants[name]()
        dist.barrier()
        share = under_way(contestants[name], PROFILED, device)
        found[name] |= {
            "under_way": share,
            "sent_bytes": dict(traffic.sent),
            "collectives": dict(traffic.calls),
            "not_counted": sorted(traffic.unknown),
        }
    return found


def _in_turn(step: Step, batches: list[dict[str, Tensor]]) -> Callable[[], None]:
    """The step on one batch after another."""
    turns = itertools.cycle(batches)
    return lambda: step(next(turns))
