"""Checkpoint files: whole or not at all, nothing run, the newest found."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from switchkit import checkpoints
from switchkit.checkpoints import AtomicCheckpointIO, settling_later


def save(path: Path, step: int = 3, **more: object) -> Path:
    ours = {"format_version": 1, "version": "0", "model": {"class_path": "switchkit.models.Decoder", "init_args": {}}}
    content = {"state_dict": {"w": torch.ones(1000)}, "global_step": step, "switchkit": {**ours, **more}}
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    content = checkpoints.read(save(tmp_path / "deep" / "a.ckpt"))
    assert torch.equal(content["state_dict"]["w"], torch.ones(1000))
    assert os.listdir(tmp_path / "deep") == ["a.ckpt"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", step=1)
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        AtomicCheckpointIO().save_checkpoint({"cannot": lambda: None, "pickled": (x for x in ())}, path)
    assert checkpoints.read(path)["global_step"] == 1
    assert os.listdir(tmp_path) == ["a.ckpt"]


@pytest.mark.slow
def test_kills_while_saving_leave_a_whole_file(tmp_path: Path) -> None:
    """A process that saves without end is killed at odd moments; what is at the path always reads."""
    path = save(tmp_path / "a.ckpt")
    code = (
        "import sys, torch; from switchkit.checkpoints import AtomicCheckpointIO\n"
        "w = torch.ones(400_000)\n"
        "ours = {'format_version': 1, 'version': '0', 'model': {}}\n"
        "files = AtomicCheckpointIO(); files.settles_later = True\n"
        "print('ready', flush=True)\n"
        "while True: files.save_checkpoint({'state_dict': {'w': w}, 'switchkit': ours}, sys.argv[1])"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    for _ in range(20):
        time.sleep(0.013)
        child.send_signal(signal.SIGSTOP)
        assert checkpoints.intact(path)
        child.send_signal(signal.SIGCONT)
    child.kill()
    child.wait()
    child.stdout.close()
    assert checkpoints.intact(path)


def test_copies_save_by_themselves(tmp_path: Path) -> None:
    files = AtomicCheckpointIO()
    with settling_later(trainer_with(files)):
        files.save_checkpoint({"state_dict": {}, "switchkit": {"format_version": 1}}, tmp_path / "a.ckpt")
    for again in (copy.deepcopy(files), pickle.loads(pickle.dumps(files))):
        again.save_checkpoint({"state_dict": {}, "switchkit": {"format_version": 1}}, tmp_path / "b.ckpt")
        again.wait()
        assert checkpoints.intact(tmp_path / "b.ckpt")
    files.wait()
    assert checkpoints.intact(tmp_path / "a.ckpt")


def trainer_with(files: AtomicCheckpointIO) -> Any:
    return SimpleNamespace(strategy=SimpleNamespace(checkpoint_io=files))


@pytest.mark.parametrize("later", ["", "wait", "save_checkpoint", "load_checkpoint"])
def test_an_error_while_settling_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: str) -> None:
    """By the save itself, or by what waits for it: the next save or load, or the end."""
    path = save(tmp_path / "a.ckpt", step=1)
    files, tried = AtomicCheckpointIO(), threading.Event()

    def full(*rest: object) -> None:
        tried.set()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    if later:
        with settling_later(trainer_with(files)):
            files.save_checkpoint({"global_step": 2}, path)
        tried.wait()
        monkeypatch.undo()  # there is room again, for what comes
        given = {"save_checkpoint": ({"global_step": 3}, path), "load_checkpoint": (path,)}.get(later, ())
        with pytest.raises(OSError, match="No space left") as found:
            getattr(files, later)(*given)
    else:
        with pytest.raises(OSError, match="No space left") as found:
            files.save_checkpoint({"global_step": 2}, path)
    assert found.value.filename == str(path)
    assert checkpoints.read(path)["global_step"] == 1
    assert os.listdir(tmp_path) == ["a.ckpt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize("count", [10, 100_000])
def test_a_full_disk_is_told_of_the_file(tmp_path: Path, count: int) -> None:
    """Of it torch.save makes a RuntimeError, or finds out when the file is closed, as few bytes are."""
    (tmp_path / ".a.ckpt.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as found:
        AtomicCheckpointIO().save_checkpoint({"w": torch.ones(count)}, tmp_path / "a.ckpt")
    assert found.value.filename == str(tmp_path / "a.ckpt")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_file_is_named_with_the_newest_intact_one(tmp_path: Path, keep: float) -> None:
    run = tmp_path / "checkpoints"
    good, bad = save(run / "good.ckpt"), save(run / "bad.ckpt")
    whole = bad.read_bytes()
    bad.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    with pytest.raises(ValueError, match=rf"bad.ckpt \(\d+ bytes\) is truncated or damaged.*{good}"):
        checkpoints.read(bad)


def test_beside_a_truncated_file_outside_a_run_lies_who_knows_what(tmp_path: Path) -> None:
    save(tmp_path / "of another model.ckpt")
    bad = save(tmp_path / "bad.ckpt")
    bad.write_bytes(bad.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is truncated or damaged$"):
        checkpoints.read(bad)


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt")
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(4).numpy().tobytes()) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        checkpoints.read(path)


def test_a_truncated_file_of_a_folder_of_foreign_ones(tmp_path: Path) -> None:
    """Only what can be read is offered in its place."""
    bad = save(tmp_path / "checkpoints" / "bad.ckpt")
    bad.write_bytes(bad.read_bytes()[:-100])
    torch.save({"epoch": 1}, bad.with_name("foreign.ckpt"))
    with pytest.raises(ValueError, match="is truncated or damaged$"):
        checkpoints.read(bad)


def test_what_is_no_checkpoint_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ROMEO:")
    with pytest.raises(ValueError, match="a.txt is no checkpoint, but a file of another kind"):
        checkpoints.read(tmp_path / "a.txt")
    save(tmp_path / "run" / "a.ckpt")
    with pytest.raises(ValueError, match="is a folder and no whole checkpoint.*the newest below it is .*a.ckpt"):
        checkpoints.read(tmp_path / "run")


def test_a_model_that_is_no_description(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", model="Decoder")
    with pytest.raises(ValueError, match="does not say which model it holds"):
        checkpoints.read(path)


class Evil:
    ran = False

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import test_checkpoints_evil",)


def test_a_file_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(ValueError, match="holds more than plain data.*an object of ([a-z_]+[.])?exec, which") as told:
        checkpoints.read(path)
    assert "weights_only" not in str(told.value)  # torch's advice: to load it all the same
    assert "test_checkpoints_evil" not in sys.modules


@pytest.mark.parametrize("content", [{"state_dict": {}, "epoch": 1}, {"model": 1}, [1, 2], torch.ones(2)])
def test_foreign_file_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "foreign.ckpt"
    torch.save(content, path)
    with pytest.raises(ValueError, match="was not written by switchkit"):
        checkpoints.read(path)


def test_later_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", format_version=checkpoints.FORMAT_VERSION + 1)
    with pytest.raises(ValueError, match="upgrade switchkit"):
        checkpoints.read(path)


@pytest.mark.parametrize(
    "name", ["subprocess.Popen", "os.system", "pathlib.Path", "not_there.Router", "json.tool.Nope"]
)
def test_a_class_that_a_file_may_not_name(tmp_path: Path, name: str) -> None:
    before = set(sys.modules)
    path = save(tmp_path / "a.ckpt", model={"class_path": name, "init_args": {}})
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        checkpoints.read_settings(path)
    assert "not_there" not in sys.modules
    assert "json.tool" not in set(sys.modules) - before


def test_last_is_the_newest_intact_over_all_versions(tmp_path: Path) -> None:
    for age, name in enumerate(["v/best.ckpt", "version_1/checkpoints/last.ckpt", "version_0/checkpoints/last.ckpt"]):
        path = save(tmp_path / name, step=age)
        os.utime(path, (1000 - age, 1000 - age))
    assert checkpoints.last(tmp_path) == tmp_path / "version_1/checkpoints/last.ckpt"
    (tmp_path / "version_1/checkpoints/last.ckpt").write_bytes(b"PK half a file")
    assert checkpoints.last(tmp_path) == tmp_path / "version_0/checkpoints/last.ckpt"
    (tmp_path / "version_0/checkpoints/last.ckpt").unlink()
    assert checkpoints.last(tmp_path) == tmp_path / "v/best.ckpt"


def test_last_without_any_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"no checkpoint below {tmp_path}.*start a run without --ckpt_path"):
        checkpoints.last(tmp_path)
    (tmp_path / "last.ckpt").write_bytes(b"half")
    with pytest.raises(ValueError, match="1 damaged"):
        checkpoints.last(tmp_path)


@pytest.mark.slow
def test_a_fresh_process_reads_a_checkpoint_of_built_in_parts(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", model={"class_path": "switchkit.module.LanguageModule", "init_args": {}})
    code = "import sys; from switchkit.checkpoints import read_settings; print(read_settings(sys.argv[1])['step'])"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.stdout.strip() == "3", done.stderr
