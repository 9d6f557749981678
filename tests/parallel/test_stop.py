"""A signal to some of the processes stops all of them at the same step, and the run goes on from there exactly."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from distributed import Ranks, run
from equal import whole
from small import MOE, NET, data, module, trainer

from switchkit import checkpoints
from switchkit.callbacks import CleanStop, Stopped
from switchkit.parallel import ExpertParallelStrategy

TWO = partial(ExpertParallelStrategy, expert_parallel_size=2)
STEPS = 20


@dataclass(frozen=True)
class Told:
    """The signals that reach each rank, by the batch in which they do."""

    signals: tuple[dict[int, list[int]], ...]


class SignalAt(L.Callback):
    def __init__(self, signals: dict[int, list[int]]) -> None:
        self.signals = signals

    def on_before_zero_grad(self, trainer: L.Trainer, *rest: Any) -> None:
        for number in self.signals.get(trainer.global_step, []):
            signal.raise_signal(number)


def fit(rank: int, world: int, folder: Path, strategy: Any, *callbacks: L.Callback, resume: bool = False) -> Any:
    source = data(folder)
    model = module(source, net=partial(NET, num_experts=4), moe=MOE)
    torch.manual_seed(rank if not resume else 99)
    path = checkpoints.last(folder) if resume else None
    own = strategy() if callable(strategy) else strategy
    trainer(
        folder, *callbacks, steps=STEPS, strategy=own, devices=world, plugins=[Ranks(rank, world)],
        use_distributed_sampler=False,
    ).fit(model, source, ckpt_path=path)  # fmt: skip
    return torch.cat([whole(p).flatten() for p in model.parameters()])


def stopped(rank: int, world: int, folder: Path, strategy: Any, told: list[Told]) -> list[dict[str, Any]]:
    """What each way to be told comes to, and whether the resumed run ends as one that was never stopped."""
    uninterrupted = fit(rank, world, folder / "whole", strategy)
    found = []
    for number, one in enumerate(told):
        place = folder / str(number)
        try:
            fit(rank, world, place, strategy, SignalAt(one.signals[rank]))
        except Stopped as end:
            # The first process writes for all; it has, when its run is taken down.
            dist.barrier()
            settings = checkpoints.read_settings(end.path)
            resumed = fit(rank, world, place, strategy, resume=True)
            found.append({"code": end.code, "step": end.step, "ranks": end.ranks, "saved": settings["step"],
                          "same": torch.equal(resumed, uninterrupted)})  # fmt: skip
    return found


# One rank alone, both by the same signal, both by different ones at different times, and each twice, as torchrun does.
TOLD = [
    Told(({}, {8: [signal.SIGTERM]})),
    Told(({8: [signal.SIGINT]}, {8: [signal.SIGINT]})),
    Told(({8: [signal.SIGTERM]}, {8: [signal.SIGINT]})),
    Told(({8: [signal.SIGTERM] * 2}, {8: [signal.SIGTERM] * 2})),
]
ENDS = [(143, (1,)), (130, (0, 1)), (143, (0, 1)), (143, (0, 1))]


def hold(tmp_path: Path, strategy: Any, told: list[Told] = TOLD, ends: Any = ENDS) -> None:
    for number in ["whole", *range(len(told))]:
        (tmp_path / str(number)).mkdir()
    for found in run(2, stopped, tmp_path, strategy, told):
        assert found == [{"code": c, "step": 9, "ranks": r, "saved": 9, "same": True} for c, r in ends]


@pytest.mark.slow
def test_all_stop_at_one_step_and_go_on_exactly_under_ddp(tmp_path: Path) -> None:
    hold(tmp_path, "ddp")


@pytest.mark.slow
def test_all_stop_at_one_step_and_go_on_exactly_with_shared_out_experts(tmp_path: Path) -> None:
    hold(tmp_path, TWO, TOLD[:1], ENDS[:1])


def test_a_second_signal_is_one_that_comes_later() -> None:
    """In one process the next signal ends the run; in several it does 3 seconds later, and not before."""
    ended = []
    for several, later in ((0.0, 0.0), (3.0, 0.0), (3.0, 3.5)):
        stop = CleanStop()
        stop._again = several
        stop._told(signal.SIGUSR1, None)
        stop._told_at -= later
        before = signal.signal(signal.SIGUSR1, lambda *rest: None)
        try:
            # The default action of SIGUSR1 would end the tests: it is blocked, and seen as pending.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            stop._told(signal.SIGUSR1, None)
            ended.append(signal.SIGUSR1 in signal.sigpending())
            if ended[-1]:
                signal.sigwait([signal.SIGUSR1])
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
            signal.signal(signal.SIGUSR1, before)
    assert ended == [True, False, True]
