"""``switchkit predict``: its results as a file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from switchkit.cli.lightning import SwitchkitCLI

WRITER = """\
from lightning.pytorch.callbacks import BasePredictionWriter


class Mine(BasePredictionWriter):
    def __init__(self):
        super().__init__("batch")

    def write_on_batch_end(self, *arguments):
        open("mine.txt", "w").close()
"""


@pytest.mark.slow
def test_results_below_the_run_folder_or_where_out_says(run):
    assert run("fit", "-c", "small.yaml")[0] == 0
    last = ("--ckpt_path", "last")
    code, out, err = run("predict", *last)
    assert code == 0, err
    path = next(Path(word) for word in out.split() if word.endswith(".jsonl"))
    assert path.parent.parent == Path("runs")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert f"predictions of {len(found)} sequences written to {path}" in " ".join(out.split())
    text = Path("text.txt").read_text()
    assert "".join(line["text"] for line in found) == text[len(text) * 9 // 10 + 1 :]
    assert run("predict", *last, "--out", "new/mine.jsonl")[0] == 0
    assert Path("new/mine.jsonl").read_text() == path.read_text()
    code, _, err = run("predict", *last, "--out", "new")
    assert code == 2
    assert "--out new is a folder: name a file in it" in err
    code, _, err = run("predict", *last, "--out", "new/mine.jsonl")
    assert code == 2
    assert "--out new/mine.jsonl is there already: name another file" in err


@pytest.mark.parametrize("out", ["ro/mine.jsonl", "ro/new/mine.jsonl"])
def test_a_place_that_cannot_be_written_in_is_told_at_once(run, monkeypatch, out):
    Path("ro").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "ro" and access(path, mode))
    monkeypatch.setattr(SwitchkitCLI, "instantiate_classes", None)
    code, _, err = run("predict", "-c", "small.yaml", "--out", out)
    assert code == 2
    assert f"--out {out}: the folder 'ro' cannot be written in: name another" in err


def test_a_folder_that_is_a_file_is_told_at_once(run):
    code, _, err = run("predict", "-c", "small.yaml", "--out", "text.txt/mine.jsonl")
    assert code == 2
    assert "--out text.txt/mine.jsonl: 'text.txt' is a file, and no folder: name another" in err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices fetched from your dataloader:UserWarning")
def test_a_writer_of_ones_own_takes_the_place_of_ours(run):
    Path("writer.py").write_text(WRITER)
    argv = ("-c", "small.yaml", "--plugins", "writer", "--trainer.callbacks", "[{class_path: writer.Mine}]")
    assert run("predict", *argv)[0] == 0
    assert Path("mine.txt").is_file()
    assert not list(Path().rglob("*.jsonl"))
    assert run("predict", *argv, "--out", "both.jsonl")[0] == 0
    assert Path("both.jsonl").is_file()
