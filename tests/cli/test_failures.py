"""A process of several fails: all end, with a code and a line that says which and why. Through Lightning's launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import failures
import pytest
from failures import fit, group, lay_out

from switchkit import checkpoints


@pytest.mark.slow
def test_the_first_killed(tmp_path: Path) -> None:
    """The process that started the others is gone, and could not end them."""
    found = fit(lay_out(tmp_path), "--trainer.strategy", "ddp", *failures.faulty("kill", 0))
    assert found.code == 128 + signal.SIGKILL
    assert found.left == 0
    assert [line for line in found.lines if line.startswith("switchkit: rank 1 ends: rank 0 (process ")]


@pytest.mark.slow
def test_another_raises(tmp_path: Path) -> None:
    found = fit(lay_out(tmp_path), "--trainer.strategy", "expert_parallel_2", *failures.faulty("raise", 1))
    assert found.code == 1, found.output
    assert found.left == 0
    assert found.output.count("Traceback") == 1
    assert found.lines[-1].startswith("switchkit: rank 1 (process ")
    assert found.lines[-1].endswith(" failed: RuntimeError: a planted fault; the others were ended")


@pytest.mark.slow
def test_another_hangs(tmp_path: Path) -> None:
    """It sleeps for eleven days, and the first has 4 seconds of patience."""
    options = failures.strategy("expert_parallel_2", 4.0)
    found = fit(lay_out(tmp_path), *options, *failures.faulty("hang", 1))
    assert found.code == 1, found.output
    assert found.left == 0
    assert "Traceback" not in found.output
    assert found.lines[-1].startswith("switchkit: rank 1 (process ")
    assert found.lines[-1].endswith(" did not come within 4 s: killed")


@pytest.mark.slow
def test_a_signal_to_one_stops_all_with_a_checkpoint(tmp_path: Path) -> None:
    """Its exit code is no failure to which the others fall victim."""
    found = fit(lay_out(tmp_path), "--trainer.strategy", "ddp", *failures.faulty("SIGTERM", 1))
    assert found.code == 128 + signal.SIGTERM, found.output
    assert found.left == 0
    path = checkpoints.last(tmp_path / "runs")
    assert checkpoints.read_settings(path)["step"] == 7
    assert found.lines[-1].startswith("switchkit: stopped by SIGTERM on rank 1 after step 7; go on with: switchkit fit")


def test_the_harness_sees_what_is_left(tmp_path: Path) -> None:
    """A process that outlives the one that started it counts, until it ends."""
    start = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    first = subprocess.Popen([sys.executable, "-c", start], start_new_session=True)
    assert first.wait(30) == 0
    (orphan,) = group(first.pid)
    assert orphan != first.pid
    os.kill(orphan, signal.SIGKILL)
    until = time.monotonic() + 30
    while group(first.pid) and time.monotonic() < until:
        time.sleep(0.01)
    assert group(first.pid) == []
