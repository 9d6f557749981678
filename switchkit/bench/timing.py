"""Interleaved timing: whatever else the machine does hits every contestant alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Clock", "CpuClock", "CudaClock", "Timing", "clock_of", "interleave", "ratios"]

WARM_UP = 3
LEAST_ROUNDS, LEAST_SECONDS, MOST_ROUNDS = 25, 3.0, 500


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant, one figure per round."""

    seconds: tuple[float, ...]
    host: tuple[float, ...]
    """What the host needed to queue the work; on a CPU the same."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        return min(self.seconds)


class Clock:
    """Times one call: seconds on the device, and seconds of the host."""

    def time(self, run: Callable[[], object]) -> tuple[float, float]:
        raise NotImplementedError

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""


class CpuClock(Clock):
    """Wall time."""

    def time(self, run: Callable[[], object]) -> tuple[float, float]:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        return seconds, seconds


class CudaClock(Clock):
    """CUDA events around several calls in a row, so that the host can run ahead of the device as in training."""

    def __init__(self, device: torch.device, repeats: int = 10) -> None:
        self.device, self.repeats = device, repeats

    def time(self, run: Callable[[], object]) -> tuple[float, float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.synchronize()
        start = time.perf_counter()
        begin.record()
        for _ in range(self.repeats):
            run()
        end.record()
        host = time.perf_counter() - start
        self.synchronize()
        return begin.elapsed_time(end) / 1000 / self.repeats, host / self.repeats

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


def clock_of(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def interleave(
    contestants: Mapping[str, Callable[[], object]], clock: Clock, rounds: int | None = None, *, warm: bool = False
) -> dict[str, Timing]:
    """Every contestant once per round, each round in another order; untimed rounds come first.

    `rounds` None: 25 at least, and more until three seconds have gone by, so that short ones get more rounds. `warm`
    runs a contestant once more, untimed, before each time: what the one before it drove out of the caches is not its
    own cost.
    """
    names = list(contestants)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    order = random.Random(0)
    with _no_collection():
        for _ in range(WARM_UP if rounds is None else min(WARM_UP, rounds)):
            for name in names:
                clock.time(contestants[name])
        started, done = time.perf_counter(), 0
        while _go_on(done, rounds, time.perf_counter() - started):
            for name in order.sample(names, len(names)):
                if warm:
                    contestants[name]()
                found[name].append(clock.time(contestants[name]))
            done += 1
    return {n: Timing(tuple(s for s, _ in pairs), tuple(h for _, h in pairs)) for n, pairs in found.items()}


def ratios(ours: Timing, base: Timing) -> tuple[float, float, float]:
    """Ratio of the medians, and the quartiles of the ratios within each round."""
    each = sorted(a / b for a, b in zip(ours.seconds, base.seconds, strict=True))
    low, _, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return ours.median / base.median, low, high


def _go_on(done: int, rounds: int | None, seconds: float) -> bool:
    if rounds is not None:
        return done < rounds
    return done < LEAST_ROUNDS or (done < MOST_ROUNDS and seconds < LEAST_SECONDS)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's collector, which would run in the middle of some contestant."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
