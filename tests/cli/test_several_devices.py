"""The program on two devices, through Lightning's launcher, and what one device makes of its checkpoint."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from switchkit import checkpoints
from switchkit.cli.arguments import read_arguments
from switchkit.cli.settings import compose

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]


STRATEGY = ["--trainer.strategy", "expert_parallel", "--trainer.strategy.expert_parallel_size", "2"]
TRAINING = ["fit", "--config", "small.yaml", "--data.batch_size", "2", "--trainer.log_every_n_steps", "1"]


def launched(*commands: list[str], folder: Path) -> tuple[list[int], str]:
    """Exit codes, and the output of the first, of programs that run at once; they and what they started are gone."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    until, processes = time.monotonic() + 300, []
    try:
        for number, command in enumerate(commands):
            with (folder / f"log{number}.txt").open("w") as log:
                started = subprocess.Popen(
                    [sys.executable, "-m", *command],
                    stdout=log, stderr=subprocess.STDOUT, env=env, cwd=folder, start_new_session=True,
                )  # fmt: skip
            processes.append(started)
        codes = [process.wait(timeout=max(0.0, until - time.monotonic())) for process in processes]
        return codes, (folder / "log0.txt").read_text()
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def loopback() -> int | None:
    """A free port of this machine, if it can be reached from itself."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = int(server.getsockname()[1])
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return port
    except OSError:
        return None


def losses(run_folder: Path) -> list[dict[str, str]]:
    """What was logged of the training steps, to the last digit."""
    with (run_folder / "version_0" / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["train/loss"]]


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory: pytest.TempPathFactory, written: Callable[[Path], Path]) -> tuple[Path, str]:
    """A run on two devices by Lightning's launcher: its folder, and what it said."""
    folder = written(tmp_path_factory.mktemp("two_devices"))
    codes, out = launched(["switchkit", *TRAINING, *STRATEGY, "--trainer.devices", "2"], folder=folder)
    assert codes == [0], out
    return folder, out


@pytest.mark.slow
def test_two_devices_train_and_one_goes_on(
    two_devices: tuple[Path, str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts shared out, then `consolidate`, `generate`, `test` and two more steps on one device."""
    folder, out = two_devices
    monkeypatch.chdir(folder)
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
    results, texts = [], []
    for one in (path, folder / "one.ckpt"):
        code, text, error = run("test", "--ckpt_path", str(one), "--trainer.accelerator", "cpu")
        assert code == 0, error
        results.append([line for line in text.splitlines() if "test/loss" in line])
        code, text, error = run("generate", "--ckpt_path", str(one), "--prompt", "the", "--max_new_tokens", "20")
        assert code == 0, error
        texts.append(text)
    assert results[0] == results[1] != []
    assert texts[0] == texts[1] != ""
    code, text, error = run("fit", "--config", "small.yaml", "--ckpt_path", str(path), "--trainer.max_steps", "4",
                            "--trainer.default_root_dir", "on")  # fmt: skip
    assert code == 0, error
    assert checkpoints.read_settings(checkpoints.last(folder / "on"))["step"] == 4


@pytest.mark.slow
@pytest.mark.skipif(loopback() is None, reason="this machine cannot be reached from itself")
def test_two_machines_by_torchrun_train_as_two_devices_do(two_devices: tuple[Path, str], folder: Path) -> None:
    """The fragment for several machines, an agent of torchrun for each, both here."""
    port = loopback()
    program = ["-m", "switchkit", *TRAINING, "--config", "multi_device_2_nodes", "--trainer.accelerator", "cpu"]
    program += ["--trainer.devices", "1", "--trainer.strategy.data_parallel_replicate", "1"]
    program += ["--trainer.strategy.expert_parallel_size", "2"]
    agents = [
        ["torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1",
         "--master_addr", "127.0.0.1", "--master_port", str(port), *program]
        for rank in range(2)
    ]  # fmt: skip
    codes, out = launched(*agents, folder=folder)
    assert codes == [0, 0], out
    found, expected = losses(folder / "runs"), losses(two_devices[0] / "runs")
    assert len(expected) == 2
    assert expected[0]["train/loss"] != expected[1]["train/loss"]
    assert found == expected


def test_consolidate_refuses_what_it_cannot_do(folder: Path, run: Run) -> None:
    (folder / "x.ckpt").mkdir()
    (folder / "there").touch()
    assert "no whole checkpoint of switchkit" in run("consolidate", "x.ckpt", "--out", "y.ckpt")[2]
    assert "there is no such file" in run("consolidate", "z.ckpt", "--out", "y.ckpt")[2]
    assert "--out there is there already: name another file" in run("consolidate", "x.ckpt", "--out", "there")[2]
    assert "there is no folder 'no'" in run("consolidate", "x.ckpt", "--out", "no/y.ckpt")[2]


def test_sizes_that_do_not_fit_are_told_in_one_line(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One device cannot share out experts over two."""
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        # What the launcher sets is gone afterwards.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    try:
        code, _, error = run("fit", "--config", "small.yaml", "--trainer.strategy", "expert_parallel_2",
                             "--trainer.devices", "1")  # fmt: skip
    finally:
        # The process would have ended.
        torch.distributed.destroy_process_group()
    assert code == 2
    assert error.splitlines()[-1] == ("switchkit: error: expert_parallel_size=2 does not divide 1 processes: use 1")


def test_the_batch_script_is_bash_and_goes_on_from_a_checkpoint(folder: Path) -> None:
    """As SLURM would run it, with an srun that tells what it was given."""
    script = ROOT / "docs" / "switchkit.sbatch"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    srun = folder / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "SWITCHKIT_RUNS": "out/of the way"}
    command = ["bash", str(script), "--data.batch_size", "4"]

    def given() -> list[str]:
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    first = given()
    assert first[1:5] == ["python", "-m", "switchkit", "fit"]
    assert first[-4:] == ["--trainer.default_root_dir", "out/of the way", "--data.batch_size", "4"]
    (folder / "out/of the way/version_0").mkdir(parents=True)
    (folder / "out/of the way/version_0/last.ckpt").touch()
    assert given() == [*first[:-2], "--ckpt_path", "last", *first[-2:]]
    settings = compose("fit", read_arguments(first[5:]))["trainer"]
    assert (settings["num_nodes"], settings["devices"], settings["default_root_dir"]) == (2, 8, "out/of the way")
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert f"#SBATCH --nodes={settings['num_nodes']}" in lines
    assert f"#SBATCH --ntasks-per-node={settings['devices']}" in lines
    assert f"#SBATCH --gpus-per-node={settings['devices']}" in lines


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("expert_paralel_2", "unknown strategy 'expert_paralel_2'. Did you mean 'expert_parallel_2'? Accepted: auto,"),
        ("expert_parallel_3", "to share experts out over 3 devices: --trainer.strategy expert_parallel --trainer."),
    ],
)
def test_unknown_strategies_are_told_with_what_was_meant(folder: Path, run: Run, name: str, told: str) -> None:
    code, _, err = run(*TRAINING, "--trainer.strategy", name)
    assert code == 2
    assert f"--trainer.strategy: {told}" in err
    assert not (folder / "runs").exists()
