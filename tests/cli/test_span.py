"""The recipe of span corruption, on a small text: its loss falls, and what it learned is gone on from."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from switchkit import checkpoints

SMALL = {
    "--model.net.d_model": "32",
    "--model.net.encoder_layers": "2",
    "--model.net.d_ff": "64",
    "--model.warmup_steps": "5",
    "--data.path": "text.txt",
    "--data.inputs_length": "64",
    "--data.batch_size": "8",
    "--trainer.max_steps": "40",
    "--trainer.val_check_interval": "20",
    "--trainer.num_sanity_val_steps": "0",
    "--trainer.accelerator": "cpu",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5_span", "t5_span_dense"])
def test_the_loss_falls(name, run):
    """Two validations of 40 steps; a byte of the text is worth 5.6 nats to a model that knows nothing."""
    options = [word for pair in SMALL.items() for word in pair]
    code, out, err = run("fit", "--config", name, *options, "--trainer.default_root_dir", "runs")
    assert code == 0, err
    with next(Path("runs").rglob("metrics.csv")).open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert losses[1] < losses[0] - 0.3
    assert losses[1] < 3.5
    assert "token accuracy" in out
    assert "->" in out  # what it makes of a held-out window
    last = str(checkpoints.last(Path("runs")))
    code, out, err = run("generate", "--ckpt_path", last, "--prompt", "the quick <extra_id_0> fox", "--device", "cpu")
    assert code == 0, err
