"""Several processes for a test: a function runs as every rank of a gloo group, and nothing is left behind.

Processes are forked from a server that has imported torch and the package once (0.2 s each), and meet at a file, not at
a port. Every call has a deadline, after which its processes are killed.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment

DEADLINE = 240.0
PRELOAD = ["torch.distributed.fsdp", "torch.distributed.checkpoint", "switchkit.callbacks", "switchkit.cli.lightning"]


class RankError(AssertionError):
    """A rank raised, died or did not finish in time."""


def worlds(*numbers: int) -> list[Any]:
    """Numbers of processes to test with: more than two on two cores are slow."""
    return [pytest.param(number, marks=pytest.mark.slow) if number > 2 else number for number in numbers]


def server() -> ForkServerContext:
    """Where processes begin without importing anything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run(world: int, function: Callable[..., Any], *arguments: Any, deadline: float = DEADLINE) -> list[Any]:
    """What ``function(rank, world, *arguments)`` returned in each of `world` processes; it must be importable by name.

    Raises:
        RankError: a rank raised (with its traceback), ended without a result, or was not done in time.
    """
    context = server()
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        try:
            for rank in range(world):
                ours, theirs = context.Pipe(duplex=False)
                given = (theirs, Path(folder) / "store", rank, world, function, arguments)
                process = context.Process(target=_rank, args=given, daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            return _collect(pipes, time.monotonic() + deadline)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join(10)
                assert not process.is_alive()


def _collect(pipes: list[Connection], until: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), max(0.0, until - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())} were not done in time")
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[call-overload]
            try:
                kind, content = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                raise RankError(f"rank {rank} ended without a result") from None
            if kind == "error":
                raise RankError(f"rank {rank} raised\n{content}")
            results[rank] = torch.load(io.BytesIO(content), weights_only=False)
    return [results[rank] for rank in range(len(pipes))]


def _rank(pipe: Connection, store: Path, rank: int, world: int, function: Callable[..., Any], arguments: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # A strategy seeds its processes with what `seed_everything` left here, another test's in the one that forked.
    os.environ.pop("PL_GLOBAL_SEED", None)
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world, timeout=timedelta(seconds=120)
        )
        torch.manual_seed(0)
        buffer = io.BytesIO()
        torch.save(function(rank, world, *arguments), buffer)
        dist.barrier()
        pipe.send(("ok", buffer.getvalue()))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
    finally:
        pipe.close()
        # Threads of gloo and of autograd are not waited for.
        os._exit(0)


class Ranks(ClusterEnvironment):
    """Tells a Trainer which rank it is; the processes and their group are there already."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.rank, self.world = rank, world

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        return 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.world

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self.rank

    def node_rank(self) -> int:
        return 0
