"""The recipes of translation on files of one's own, at small sizes."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from switchkit.data import toy_languages

SMALL = {
    "data.source": "en.txt",
    "data.target": "{qka: qka.txt, qlu: qlu.txt}",
    "data.batch_size": "8",
    "model.net.d_model": "32",
    "model.optimizer.lr": "1e-2",
    "model.net.d_ff": "32",
    "model.warmup_steps": "2",
    "trainer.max_steps": "20",
    "trainer.val_check_interval": "20",
    "trainer.num_sanity_val_steps": "0",
    "trainer.accelerator": "cpu",
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["t5_translate", "t5_translate_dense"])
def test_the_loss_falls_and_the_scores_are_logged(recipe, run):
    for code, lines in toy_languages(0, 100).items():
        Path(f"{code}.txt").write_text("\n".join(lines))
    code, _, err = run("fit", "-c", recipe, *(word for key, value in SMALL.items() for word in (f"--{key}", value)))
    assert code == 0, err
    (metrics,) = Path("runs").rglob("metrics.csv")
    with metrics.open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    last = rows[0]
    assert float(last["val/loss"]) < 0.7 * math.log(384)  # what knows nothing
    assert all(last[f"val/{kind}{end}"] for kind in ("bleu", "chrf") for end in ("", "_qka", "_qlu"))
    layers = [name for name in last if name.startswith("val/language_nats/") and last[name]]
    assert len(layers) == (2 if recipe == "t5_translate" else 0)
