"""The program itself, killed and resumed, in processes of its own."""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from distributed import server

from switchkit import checkpoints

SMALL = """
plugins: [slow]
model:
  class_path: LanguageModule
  init_args:
    net:
      class_path: Decoder
      init_args: {d_model: 16, num_layers: 2, num_heads: 2, d_ff: 24, num_experts: 3, context: 8, dropout: 0.1}
    moe: {class_path: MoELayer, init_args: {router: {class_path: switch, init_args: {jitter: 0.1}}, capacity: factor}}
    losses: [balance, router_z]
    warmup_steps: 3
data: {class_path: TextData, init_args: {path: text.txt, context: 8, batch_size: 4, validation_prefix: 0}}
trainer:
  accelerator: cpu
  max_steps: 40
  val_check_interval: 7
  check_val_every_n_epoch: null
  enable_progress_bar: false
  callbacks: [{class_path: SaveLast, init_args: {every_n_steps: 5}}, {class_path: slow.Slow}]
"""

# Time for the signal to arrive in the middle of the run.
SLOW = """
import time
import lightning as L
class Slow(L.Callback):
    def on_train_batch_start(self, trainer, *rest):
        time.sleep(0.05 if trainer.global_step > 5 else 0)
"""


def start(folder: Path, *options: str) -> ForkServerProcess:
    process = server().Process(target=program, args=(folder, ["fit", "--config", "run.yaml", *options]))
    process.start()
    return process


def program(folder: Path, arguments: list[str]) -> None:
    """The command line in this process, as ``python -m switchkit`` in that folder would run it."""
    from switchkit.cli import main

    os.chdir(folder)
    sys.path.insert(0, str(folder))
    with Path("log.txt").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    torch.set_num_threads(1)
    sys.exit(main(arguments))


def finish(process: ForkServerProcess, folder: Path) -> tuple[int | None, str]:
    process.join(120)
    return process.exitcode, (folder / "log.txt").read_text()


def final(folder: Path) -> torch.Tensor:
    content = checkpoints.read(checkpoints.last(folder / "runs"))
    assert content["global_step"] == 40
    return torch.cat([value.flatten() for value in content["state_dict"].values()])


@pytest.mark.slow
def test_killed_and_stopped_runs_resume_to_the_same_weights(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "killed", "stopped")]
    running = []
    try:
        for folder in folders:
            folder.mkdir()
            (folder / "run.yaml").write_text(SMALL)
            (folder / "slow.py").write_text(SLOW)
            (folder / "text.txt").write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(900)))
            running.append(start(folder))
        for folder, process, number in zip(folders[1:], running[1:], (signal.SIGKILL, signal.SIGTERM), strict=True):
            deadline = time.monotonic() + 90
            while not list((folder / "runs").rglob("last.ckpt")) and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(process.pid, number)
        (code, text), (killed, _), (stopped, told) = map(finish, running, folders)
        assert code == 0, text
        assert killed == -signal.SIGKILL
        assert stopped == 128 + signal.SIGTERM, told
        assert "stopped by SIGTERM after step" in told
        assert "--ckpt_path" in told
        running += [start(folder, "--ckpt_path", "last") for folder in folders[1:]]
        for process, folder in zip(running[3:], folders[1:], strict=True):
            code, text = finish(process, folder)
            assert code == 0, text
            assert "last.ckpt" in text
    finally:
        for process in running:
            process.kill()
    whole = final(folders[0])
    assert torch.equal(final(folders[1]), whole)
    assert torch.equal(final(folders[2]), whole)
