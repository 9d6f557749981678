"""Forward and backward of one layer, by each dispatcher, against the dense layer of equal FLOPs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from switchkit import stats
from switchkit.bench.contestants import DTYPES, FOREIGN, Contestant, Setup, build, inputs, output, step
from switchkit.bench.memory import peak_bytes, saved_bytes
from switchkit.bench.shapes import Shape, goal
from switchkit.bench.timing import Timing, clock_of, interleave, ratios
from switchkit.layers import MoELayer

__all__ = ["bytes_of", "ceiling", "measure", "waits"]


def measure(shape: Shape, setup: Setup) -> dict[str, Any]:
    """Every figure about one shape, as plain data."""
    device, dtype = setup.device, DTYPES[setup.dtype]
    groups = shape.groups(64 if device.type == "cpu" else 2048)
    contestants, left_out = build(shape, setup, groups)
    x, grad = inputs(shape, groups, device, dtype)
    failed: dict[str, str] = {}
    runs: dict[str, Callable[[], object]] = {}
    memory: dict[str, int] = {}
    for contestant in contestants:
        run = partial(step, contestant.layer, x, grad)
        try:
            run()
            memory[contestant.name] = bytes_of(contestant.layer, x, grad)
        except torch.OutOfMemoryError:
            failed[contestant.name] = "out of memory"
            continue
        except Exception as error:
            # Whether others' code and compilers work here is not for us to say; our own layer has to.
            if contestant.name not in FOREIGN:
                raise
            reason = str(error).strip().partition("\n")[0][:160]
            failed[contestant.name] = f"failed: {type(error).__name__}: {reason}"
            continue
        runs[contestant.name] = run
    matmul, matmul_flops = ceiling(device, dtype)
    clock = clock_of(device)
    timings = interleave(runs, clock, setup.rounds, warm=True)
    # Apart, for it would leave the caches of a CPU to nobody.
    best = interleave({"matmul": matmul}, clock, len(timings["dense"].seconds))["matmul"]
    rate = matmul_flops / best.median
    rows = []
    for contestant in contestants:
        if contestant.name in failed:
            rows.append({"name": contestant.name, "note": failed[contestant.name]})
            continue
        row = _row(contestant, shape, timings, memory, rate)
        if isinstance(contestant.layer, MoELayer):
            row |= {"goal": goal(shape, contestant.name, device.type, setup.dtype)}
            row |= {"waits_for_device": waits(runs[contestant.name], device)}
        rows.append(row)
    rows += [{"name": name, "note": note} for name, note in left_out.items()]
    return {
        "shape": str(shape),
        "dtype": setup.dtype,
        "input": list(x.shape),
        "flops": shape.flops,
        "rounds": len(timings["dense"].seconds),
        "matmul": {"size": _side(device, dtype), "ms": 1000 * best.median, "flops_per_second": rate},
        "imbalance": _imbalance(contestants, x),
        "rows": rows,
    }


def bytes_of(layer: nn.Module, x: Tensor, grad: Tensor) -> int:
    """Peak of forward and backward on CUDA; elsewhere what is kept between the two."""
    if x.device.type == "cuda":
        return peak_bytes(partial(step, layer, x, grad), x.device)
    return saved_bytes(lambda: output(layer, x), [x, *layer.parameters()])


def ceiling(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """One large square product, and its operations: what the machine can do at best."""
    side = _side(device, dtype)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    out = torch.empty_like(a)
    return partial(torch.mm, a, b, out=out), 2 * side**3


def waits(run: Callable[[], object], device: torch.device) -> bool | None:
    """Whether forward and backward make the host wait for the device; None where there is nothing to wait for."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with _error_at_waits():
        try:
            run()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
    return False


@contextmanager
def _error_at_waits() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _row(
    contestant: Contestant, shape: Shape, timings: dict[str, Timing], memory: dict[str, int], rate: float
) -> dict[str, Any]:
    ours, base = timings[contestant.name], timings[contestant.base]
    ratio, low, high = ratios(ours, base)
    # A gated contestant at a shape that is not has three products for two.
    flops = shape.flops if contestant.base == "dense" else shape.flops * 3 // 2
    return {
        "name": contestant.name,
        "base": contestant.base,
        "ratio": ratio,
        "quartiles": [low, high],
        "ms": 1000 * ours.median,
        "min_ms": 1000 * ours.least,
        "max_ms": 1000 * max(ours.seconds),
        "host_ms": 1000 * Timing(ours.host, ours.host).median,
        "flops_per_second": flops / ours.median,
        "share_of_matmul": flops / ours.median / rate,
        "memory_bytes": memory[contestant.name],
    }


def _imbalance(contestants: Sequence[Contestant], x: Tensor) -> float | None:
    """Largest over mean load."""
    layer = next((c.layer for c in contestants if isinstance(c.layer, MoELayer)), None)
    if layer is None:
        return None
    with torch.no_grad():
        routing = layer(x)[1]
    return float(stats.imbalance(routing))


def _side(device: torch.device, dtype: torch.dtype) -> int:
    if device.type == "cuda":
        return 8192
    # Many CPUs have no instructions for bfloat16 and take a hundred times as long.
    return 1024 if dtype == torch.float32 else 256
