"""Distillation from the command line: a student of a teacher's checkpoint, which then stands alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from switchkit import LanguageModule

# Of Lightning and jsonargparse, as in every run.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

STEPS = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.accelerator", "cpu"]


@pytest.fixture
def teacher(folder: Path, run) -> Path:
    assert run("fit", "-c", "small.yaml", "--trainer.default_root_dir", "teacher")[0] == 0
    return next((folder / "teacher").rglob("last.ckpt"))


def test_a_student_trains_and_is_read_without_its_teacher(teacher: Path, folder: Path, run) -> None:
    before = teacher.read_bytes()
    code, out, err = run("fit", "-c", "distill", "--model.teacher", str(teacher), *STEPS)
    assert code == 0, err
    assert "0.75 cross-entropy + 0.25 divergence" in out
    assert teacher.read_bytes() == before
    student = next((folder / "runs").rglob("last.ckpt"))
    teacher.unlink()
    module = LanguageModule.load_from_checkpoint(student)
    assert type(module) is LanguageModule
    assert not module.sparse_layers
    code, out, err = run("generate", "--ckpt_path", str(student), "--prompt", "the ", "--max_new_tokens", "3")
    assert code == 0, err
    assert out.startswith("the ")


def test_no_teacher_says_which_two_commands_make_one(run) -> None:
    code, _, err = run("fit", "-c", "distill", *STEPS)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.count("switchkit fit --config") == 2
