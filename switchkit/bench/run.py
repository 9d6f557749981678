"""Measuring what the command line asked for, and telling it."""

from __future__ import annotations

import argparse
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from rich.console import Console, RenderableType

from switchkit.bench import generation, machine, tables
from switchkit.bench.contestants import Setup
from switchkit.bench.growth import growth
from switchkit.bench.layer import measure
from switchkit.bench.peers import check_peers
from switchkit.bench.routers import routing
from switchkit.bench.shapes import CPU_SHAPES, CUDA_SHAPES
from switchkit.cli.devices import device_of
from switchkit.cli.errors import UserError, near
from switchkit.cli.options import json_target, write_json
from switchkit.dispatch.base import Dispatcher
from switchkit.process import keep_memory, threads
from switchkit.registry import named
from switchkit.report.tables import console

__all__ = ["run"]


def run(options: argparse.Namespace, command: str) -> int:
    """Print the tables, or the figures; the exit code."""
    device = _device(options.device)
    known = named(Dispatcher)
    unknown = next((name for name in options.dispatchers or () if name not in known), None)
    if unknown is not None:
        raise UserError(
            f"--dispatchers {unknown}: there is no such dispatcher{near(unknown, known)} Known: {', '.join(known)}"
        )
    if options.peers:
        check_peers()
    to_output = options.json == "-"
    # Rather now than after minutes of measuring.
    target = json_target(options.json)
    if options.recipe is not None:
        # Its imports take seconds, so only where there is something to check.
        from switchkit.bench import step

        if options.with_recipe:
            step.check(options.recipe, device)
        else:
            step.found_recipe(options.recipe)  # all that --distributed asks of it, which measures dense ones too
    shapes = options.shapes or (CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES)
    setup = Setup(
        device=device,
        dtype=options.dtype or ("bf16" if device.type == "cuda" else "fp32"),
        dispatchers=tuple(dict.fromkeys(options.dispatchers or known)),
        rounds=options.rounds,
        peers=options.peers,
        compile=options.compile,
    )
    out = Console(quiet=True) if to_output else console(markup=True)
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with threads(options.threads), on_device, warnings.catch_warnings():
        # Of torch, where a first product runs in the backward pass, and about what compiled contestants could round.
        warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        kept = device.type == "cpu" and keep_memory()
        found: dict[str, Any] = {"command": command, "machine": machine.describe(device, kept)}
        _show(out, tables.machine(found["machine"]))
        found["layers"], found["routers"], found["memory"], found["recipe"] = [], None, [], None
        found["generation"], found["seq2seq"], found["distributed"] = [], [], None
        if options.with_layer:
            for shape in shapes:
                found["layers"].append(measure(shape, setup))
                _show(out, tables.layer(found["layers"][-1]))
        if options.with_routers:
            found["routers"] = routing(shapes[0], setup)
            _show(out, tables.routers(found["routers"]))
        if options.memory:
            for shape in shapes:
                found["memory"].append(growth(shape, setup))
                _show(out, tables.growth(found["memory"][-1]))
        if options.distributed is not None:
            from switchkit.bench import distributed

            recipe = options.recipe or "tiny_shakespeare"
            found["distributed"] = distributed.measure(
                recipe, device, options.distributed, options.rounds, options.threads
            )
            _show(out, tables.distributed(found["distributed"]))
        if options.with_recipe:
            # Lightning and its command line take seconds to import.
            from switchkit.bench import step

            found["recipe"] = step.measure(
                options.recipe or "tiny_shakespeare", device, options.rounds, options.steps, compiled=options.compile
            )
            _show(out, tables.recipe(found["recipe"]))
        if options.with_generation:
            for width in generation.WIDTHS:
                found["generation"].append(generation.measure(device, options.rounds, options.new_tokens, width))
                _show(out, tables.generation(found["generation"][-1]))
        if options.peers and options.with_seq2seq:
            from switchkit.bench import seq2seq

            for size in seq2seq.SIZES:
                found["seq2seq"].append(seq2seq.measure(size, device, options.rounds))
                _show(out, tables.seq2seq(found["seq2seq"][-1]))
        found["machine"]["load_average_after"] = machine.load_average()
    write_json(options.json, target, found)
    return 0


def _show(out: Console, what: RenderableType) -> None:
    out.print(what)
    out.print()


def _device(name: str | None) -> torch.device:
    device = torch.device(device_of(name))
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: expected cpu, cuda or cuda:N")
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device
