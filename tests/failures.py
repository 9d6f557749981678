"""A run of several processes in which one fails, through the real launcher, and what becomes of all of them.

``python tests/failures.py [STRATEGY] [FAULT] [0|1|both]`` tries the faults on two CPUs and prints a table.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = ("kill", "raise", "hang", "SIGTERM", "SIGINT")
LATE = 4.0
"""The timeout of a run in which a rank hangs, in seconds."""
START, AFTER = 400.0, 90.0
"""Deadlines in seconds, until the fault and after it: a busy machine takes minutes to import torch several times."""

RECIPE = """\
plugins: [faulty]
model:
  class_path: LanguageModule
  init_args:
    net:
      class_path: Decoder
      init_args: {d_model: 16, num_layers: 2, num_heads: 2, d_ff: 24, num_experts: 4, context: 8, dropout: 0.1}
    moe: {class_path: MoELayer, init_args: {router: {class_path: switch, init_args: {jitter: 0.1}}, capacity: factor}}
    losses: [{class_path: balance, init_args: {scope: global}}, router_z]
    warmup_steps: 3
data: {class_path: TextData, init_args: {path: text.txt, context: 8, batch_size: 4, validation_prefix: 0}}
trainer:
  accelerator: cpu
  devices: 2
  max_steps: 12
  limit_val_batches: 1
  num_sanity_val_steps: 0
  enable_progress_bar: false
"""

# The fault comes from within, at step 6, so that it needs no luck.
FAULTY = """\
import os, signal, time
from pathlib import Path
import lightning as L

class Fault(L.Callback):
    def __init__(self, what: str, ranks: list[int]) -> None:
        self.what, self.ranks = what, ranks

    def on_train_batch_start(self, trainer, *rest):
        if trainer.global_step != 6 or trainer.global_rank not in self.ranks:
            return
        Path("when").touch()
        if self.what == "raise":
            raise RuntimeError("a planted fault")
        if self.what == "hang":
            time.sleep(1e6)
        os.kill(os.getpid(), getattr(signal, "SIGKILL" if self.what == "kill" else self.what))
"""


@dataclass(frozen=True)
class Outcome:
    """What a run left: the shell's exit code, what it printed, and how long after the fault the last process ended."""

    code: int
    output: str
    seconds: float
    left: int

    @property
    def lines(self) -> list[str]:
        """What switchkit said of the end."""
        return [line for line in self.output.splitlines() if line.startswith("switchkit: ")]


def lay_out(folder: Path) -> Path:
    """A working directory for a run."""
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(RECIPE)
    (folder / "faulty.py").write_text(FAULTY)
    (folder / "text.txt").write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(900)))
    return folder


def faulty(what: str, *ranks: int) -> list[str]:
    """Options of a run in which these ranks fail."""
    given = f"[{{class_path: faulty.Fault, init_args: {{what: {what}, ranks: {list(ranks)}}}}}]"
    return ["--trainer.callbacks+", given]


def strategy(name: str, timeout: float | None = None) -> list[str]:
    """Options for a strategy, with a timeout where it is given."""
    if timeout is None:
        return ["--trainer.strategy", name]
    return ["--trainer.strategy", name, "--trainer.strategy.timeout_seconds", str(timeout)]


def fit(folder: Path, *options: str, command: tuple[str, ...] = (sys.executable,)) -> Outcome:
    """Run `switchkit fit` in a process group of its own until all of it has ended, or `AFTER` the fault; then it is
    killed."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    when = folder / "when"
    when.unlink(missing_ok=True)
    with tempfile.TemporaryFile("w+") as output:  # not a pipe, which an orphan would keep open
        argv = [*command, "-m", "switchkit", "fit", "--config", "run.yaml", *options]
        process = subprocess.Popen(argv, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT,
                                   start_new_session=True)  # fmt: skip
        began = time.time()
        try:
            while process.poll() is None or group(process.pid):
                now = time.time()
                if now > (when.stat().st_mtime + AFTER if when.exists() else began + START):
                    break
                time.sleep(0.05)
            ended, left = time.time(), len(group(process.pid))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        output.seek(0)
        seconds = ended - when.stat().st_mtime if when.exists() else 0.0
        return Outcome(128 - code if code < 0 else code, output.read(), seconds, left)


def group(number: int) -> list[int]:
    """The processes of a group that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == number and state != "Z":
                found.append(int(stat.parent.name))
    return found


def cases(names: list[str]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Strategies, faults and ranks; those that `names` has, or all."""
    for name in ("ddp", "expert_parallel_2"):
        for what in FAULTS:
            for ranks in ((0,), (1,), (0, 1)) if what.startswith("SIG") else ((0,), (1,)):
                words = {name, what, *map(str, ranks)} if len(ranks) == 1 else {name, what, "both"}
                if words >= set(names):
                    yield name, what, ranks


def main(names: list[str]) -> None:
    print("| strategy | fault | rank | exit code | seconds | left | checkpoint | line |")
    print("|---|---|---|---|---|---|---|---|")
    for name, what, ranks in cases(names):
        with tempfile.TemporaryDirectory() as folder:
            # Lightning's strategy has one timeout for the start too.
            late = (LATE if name != "ddp" else 60.0) if what == "hang" else None
            found = fit(lay_out(Path(folder)), *strategy(name, late), *faulty(what, *ranks))
            saved = ", ".join(str(path.name) for path in Path(folder).rglob("*.ckpt"))
        told = " ".join(found.lines)
        where = " and ".join(map(str, ranks))
        print(f"| {name} | {what} | {where} | {found.code} | {found.seconds:.1f} | {found.left} | {saved} | {told} |")
        sys.stdout.flush()
        if os.environ.get("VERBOSE"):
            print(found.output, file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
