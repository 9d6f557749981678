"""The program on two devices, through Lightning's launcher, and what one device makes of its checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from switchkit import checkpoints

pytestmark = [
    # What Lightning and jsonargparse say about each other.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]


def launched(*argv: str) -> tuple[int, str]:
    """Exit code and output of the program; it and whatever it started are gone afterwards."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(
        [sys.executable, "-m", "switchkit", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True,
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=300)
        return process.returncode, out
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_two_devices_train_and_one_goes_on(folder: Path, run: Run) -> None:
    """Experts shared out by class path, then `consolidate`, `test` and two more steps on one device."""
    strategy = ["--trainer.strategy.class_path", "switchkit.parallel.ExpertParallelStrategy"]
    strategy += ["--trainer.strategy.expert_parallel_size", "2", "--trainer.devices", "2"]
    code, out = launched("fit", "--config", "small.yaml", *strategy, "--data.batch_size", "2")
    assert code == 0, out
    assert out.count("Result on the whole held-out text") == 1
    assert out.count("FLOPs per token") == 1
    assert "Warning: FSDP" not in out
    assert "redistributing" not in out
    path = checkpoints.last(folder / "runs")
    assert path.is_dir()
    code, text, error = run("consolidate", str(path), "--out", "one.ckpt")
    assert code == 0, error
    assert text.startswith("one.ckpt: step 2, ")
    whole, parts = checkpoints.read(folder / "one.ckpt"), checkpoints.read(path)
    assert all(torch.equal(whole["state_dict"][name], value) for name, value in parts["state_dict"].items())
    results = []
    for one in (path, folder / "one.ckpt"):
        code, text, error = run("test", "--ckpt_path", str(one), "--trainer.accelerator", "cpu")
        assert code == 0, error
        results.append([line for line in text.splitlines() if "test/loss" in line])
    assert results[0] == results[1] != []
    code, text, error = run("fit", "--config", "small.yaml", "--ckpt_path", str(path), "--trainer.max_steps", "4")
    assert code == 0, error
    assert checkpoints.read_settings(checkpoints.last(folder / "runs"))["step"] == 4


def test_consolidate_refuses_what_it_cannot_do(folder: Path, run: Run) -> None:
    (folder / "x.ckpt").mkdir()
    (folder / "there").touch()
    assert "no whole checkpoint of switchkit" in run("consolidate", "x.ckpt", "--out", "y.ckpt")[2]
    assert "there is no such file" in run("consolidate", "z.ckpt", "--out", "y.ckpt")[2]
    assert "--out there is there already: name another file" in run("consolidate", "x.ckpt", "--out", "there")[2]
    assert "there is no folder 'no'" in run("consolidate", "x.ckpt", "--out", "no/y.ckpt")[2]


def test_sizes_that_do_not_fit_are_told_in_one_line(folder: Path, run: Run) -> None:
    """One device cannot share out experts over two."""
    code, _, error = run("fit", "--config", "small.yaml", "--trainer.strategy", "expert_parallel_2",
                         "--trainer.devices", "1")  # fmt: skip
    assert code == 2
    assert error.splitlines()[-1] == ("switchkit: error: expert_parallel_size=2 does not divide 1 processes: use 1")
