"""When one process of a run fails: the others end too, none is left behind, and a line says which failed and why.

Lightning's launcher starts the processes, and torch.distributed raises where another process is gone or late. What
they lack is added here: a thread that sees a process end which this one depends on, and last words over torch's store.
"""

from __future__ import annotations

import atexit
import gc
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch.distributed as dist

__all__ = ["AGAIN", "watch"]

POLL = 0.2
GRACE = 10.0
"""Seconds that a process has to end by itself before it is killed: enough to write a traceback and close its files."""
ALIKE = 2.0
"""Seconds in which rank 0 ends the others where all fail alike, so that one speaks for all."""
AGAIN = 3.0
"""Seconds after which a signal counts as a second one. Within them it is the same: torchrun hands on what its
processes got already."""

STARTED_BY = "SWITCHKIT_STARTED_BY"
_FROM_OTHERS = re.compile(r"gloo/transport|Connection (closed|reset) by peer|Broken pipe")
_LATE = re.compile(r"Timed out waiting (\d+)ms")


def watch(launcher: Any, tells: Callable[[BaseException], bool] | None = None) -> None:
    """Make the processes of Lightning's subprocess launcher end together; with one process nothing changes.

    A rank that fails ends the run with its own exit code, 128 + the signal if it was killed; a rank that is waited for
    in vain is killed, and the code is 1. `launch` raises SystemExit with that code where another rank failed.
    Processes that torchrun or SLURM started are named in the same way and ended by these.

    Args:
        launcher: a strategy's launcher, before it launches.
        tells: whether the caller prints an error in a line of its own; null: never.
    """
    if launcher.num_processes * launcher.num_nodes > 1:
        launcher.launch = partial(_launch, launcher, tells or (lambda error: False))


def _destroy_group() -> None:
    """Take the process group down, for the end of a process: gloo's threads abort one that ends without it."""
    if dist.is_initialized():
        dist.destroy_process_group()


_watch: _Watch | None = None  # of this process


def _launch(launcher: Any, tells: Callable[[BaseException], bool], function: Callable[..., Any], *arguments: Any,
            trainer: Any = None, **options: Any) -> Any:  # fmt: skip
    started_by = os.environ.pop(STARTED_BY, None)
    if not launcher.cluster_environment.creates_processes_externally:
        os.environ[STARTED_BY] = str(os.getpid())
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, _stop)
        # Lightning's own broadcasts inside the signal handler, from rank 0: another rank alone would wait for ever.
        if trainer is not None:
            trainer._signal_connector._sigterm_notifier_fn = lambda number, frame: None

    def begun(*arguments: Any, **options: Any) -> Any:
        global _watch
        os.environ.pop(STARTED_BY, None)
        if _watch is None:
            atexit.register(_freeze)
            children = list(launcher.procs)
            # Lightning's observer kills this process as soon as another ended with a code, that of a clean stop too.
            # It holds the list, and finds it empty.
            launcher.procs.clear()
            launcher.procs = children
            environment = launcher.cluster_environment
            first = environment.node_rank() * launcher.num_processes
            named = {first + number: process for number, process in enumerate(children, start=1)}
            rank = first + environment.local_rank()
            _watch = _Watch(rank, named, None if started_by is None else int(started_by))
            _watch.start()
            # Later than the watch's own, and so before it: NCCL's processes leave their group together.
            atexit.register(_destroy_group)
        _watch.begin()
        try:
            return function(*arguments, **options)
        except BaseException as error:
            code = _watch.last_words(error, tells)
            if code is None:
                raise
            raise SystemExit(code) from None

    try:
        # Not of the instance, which is this function.
        return type(launcher).launch(launcher, begun, *arguments, trainer=trainer, **options)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _freeze() -> None:
    """Python looks through all objects of torch and Lightning when it ends, for 1.2 s of processor time."""
    # Triton's bindings write lines about each object that is left.
    if "triton" not in sys.modules:
        gc.freeze()


def _stop(number: int, frame: Any) -> None:
    """Before the first step and outside of training there is nothing to save."""
    raise SystemExit(128 + number)


class _Watch(threading.Thread):
    """Of one process: those that it started (rank -> process), or the one that started it."""

    def __init__(self, rank: int, children: Mapping[int, subprocess.Popen[Any]], parent: int | None) -> None:
        super().__init__(name="switchkit-watch", daemon=True)
        self.rank, self.children, self.parent = rank, children, parent
        self._alarm, told = os.pipe()
        os.set_blocking(told, False)
        # A handler waits for the main thread, which may wait for a hung rank; this is written at once.
        if threading.current_thread() is threading.main_thread():
            others = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
            if others != -1:
                signal.set_wakeup_fd(others)
        self.begin()
        if children:
            atexit.register(self._wait)

    def begin(self) -> None:
        """A launch begins; a process may see several."""
        self._told_at: float | None = None
        self._until: float | None = None  # the main thread has to be done by then
        self._over = False

    def run(self) -> None:
        while True:
            if select.select([self._alarm], [], [], POLL)[0]:
                self._signals(os.read(self._alarm, 64))
            if self.parent is not None and os.getppid() != self.parent:
                self._end(1, f"rank {self.rank} ends: rank 0 (process {self.parent}) is gone")
            failed = None if self._over else self._failed()
            if failed is not None and self._until is None:
                self._until = time.monotonic() + GRACE
            if self._until is not None and time.monotonic() > self._until:
                if failed is None:
                    self._end(1, f"rank {self.rank} does not end: killed")
                else:
                    self._end(_code(self.children[failed]), self._fate(failed))

    def _signals(self, numbers: bytes) -> None:
        now = time.monotonic()
        for number in numbers:
            if number not in (signal.SIGINT, signal.SIGTERM):
                continue
            if self._told_at is not None and now - self._told_at > AGAIN:
                self._end(128 + number, f"rank {self.rank}: stopped at once by a second {signal.Signals(number).name}")
            self._told_at = self._told_at or now

    def _failed(self) -> int | None:
        """The first rank found to have ended with a code other than 0."""
        return next((rank for rank, process in self.children.items() if process.poll()), None)

    def _end(self, code: int, line: str) -> None:
        """End this process from the thread, whatever the main thread does."""
        _say(line)
        self._kill()
        # The main thread may hold the lock of what it was printing.
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(1)
        os._exit(code)

    def _kill(self) -> None:
        for process in self.children.values():
            process.kill()
        for process in self.children.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)

    def _wait(self) -> None:
        """At the end of this process: the others end with it, and it does not end well if they did not."""
        ended_well, self._over = not self._over, True
        until = time.monotonic() + 3 * GRACE
        for rank, process in self.children.items():
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                _say(f"rank {rank} (process {process.pid}) does not end: killed")
                process.kill()
                process.wait()
        failed = self._failed()
        if ended_well and failed is not None:
            self._end(_code(self.children[failed]), self._fate(failed))

    # -- what the main thread does when `launch` fails -----------------------------------------------------------

    def last_words(self, error: BaseException, tells: Callable[[BaseException], bool]) -> int | None:
        """Say what failed and end the others; the exit code where that was another rank, None to raise the error."""
        self._over, self._until = True, None
        if getattr(error, "agreed", False):
            return None  # All ranks raise it together, and `_wait` waits for them.
        others = bool(isinstance(error, dist.DistError) or _FROM_OTHERS.search(str(error)))
        if self.rank == 0 or self.children:
            line, code = self._culprit(error) if others else (None, None)
            if line is not None or not tells(error):
                _say(line or f"rank {self.rank}: {_words(error)}")
            self._kill()
            self._until = time.monotonic() + 2 * GRACE
            return code
        _report(self.rank, "" if others else _words(error))
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Rank 0 knows more, and ends this process meanwhile.
        time.sleep(GRACE if others else ALIKE)
        if others and self.parent is not None:
            late = _LATE.search(str(error))
            cause = f"did not come within {_seconds(late)}" if late else f"does not end ({_words(error)})"
            _say(f"rank 0 (process {self.parent}) {cause}: killed by rank {self.rank}")
            with suppress(ProcessLookupError):
                os.kill(self.parent, signal.SIGKILL)
            return 1
        if others or not tells(error):
            _say(f"rank {self.rank}: {_words(error)}")
        return None

    def _culprit(self, error: BaseException) -> tuple[str | None, int | None]:
        """Which other rank failed, as a line, and the exit code; (None, None): none is known to have."""
        late = _LATE.search(str(error))
        until = time.monotonic() + GRACE
        while time.monotonic() < until:
            failed = self._failed()
            if failed is not None:
                return self._fate(failed, _reported(failed)), _code(self.children[failed])
            quiet = []
            for rank in range(dist.get_world_size() if dist.is_initialized() else 0):
                said = _reported(rank)
                if said and rank not in self.children:
                    return f"rank {rank} failed: {said}", 1
                if said is None and rank != self.rank:
                    quiet.append(rank)
            time.sleep(POLL)
            if late and time.monotonic() > until - GRACE + (1 if len(quiet) == 1 else GRACE / 2):
                break  # Who waited too has said so by now.
        if not late or not quiet:
            return None, None
        names = [f"{r} (process {self.children[r].pid})" if r in self.children else str(r) for r in quiet]
        what = "rank" if len(quiet) == 1 else "ranks"
        return f"{what} {', '.join(names)} did not come within {_seconds(late)}: killed", 1

    def _fate(self, rank: int, said: str | None = None) -> str:
        process = self.children[rank]
        code = process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"rank {rank} (process {process.pid}) {f'failed: {said}' if said else how}; the others were ended"


def _code(process: subprocess.Popen[Any]) -> int:
    """As shells have it."""
    return 128 - process.returncode if process.returncode < 0 else process.returncode


def _seconds(late: re.Match[str]) -> str:
    return f"{int(late[1]) / 1000:g} s"


def _words(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "stopped by SIGINT"
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
        return f"stopped by {signal.Signals(error.code - 128).name}"
    return " ".join(f"{type(error).__name__}: {error}".split())


def _say(line: str) -> None:
    # Not by sys.stderr, whose lock a blocked thread may hold.
    os.write(2, f"switchkit: {line}\n".encode())


def _report(rank: int, words: str) -> None:
    """Leave word for rank 0 of why this rank ends; empty: another failed before."""
    with suppress(Exception):
        dist.distributed_c10d._get_default_store().set(f"switchkit/failed/{rank}", words)


def _reported(rank: int) -> str | None:
    with suppress(Exception):
        store = dist.distributed_c10d._get_default_store()
        if store.check([f"switchkit/failed/{rank}"]):
            return store.get(f"switchkit/failed/{rank}").decode()
    return None
