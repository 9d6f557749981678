"""What is written down of a run, against what its module and trainer say."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from small import NET, TOP2, Pads, data, module, trainer, weights

from switchkit import Factor, MoELayer, Switch, checkpoints
from switchkit.compare.recorder import Recorder, recorded


class Witness(L.Callback):
    """Adds up by itself, in integers of Python, and sleeps where the clock should stand."""

    def __init__(self) -> None:
        self.assigned = self.dropped = self.tokens = 0
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.assigned += sum(outputs["stats"]["load"].flatten().tolist())
        self.dropped += sum(outputs["stats"]["dropped"].tolist())
        self.tokens += len(batch["tokens"].flatten())
        self.losses.append(float(outputs["loss"]))


def fit(folder: Path, recorder: Recorder, *more: L.Callback, moe: Any = None, **options: Any) -> tuple[Any, Any]:
    source = data(folder)
    model = module(source, moe=moe or partial(MoELayer, router=Switch, capacity=partial(Factor, train=0.5, eval=None)))
    runner: Any = trainer(folder, val_check_interval=10**9, num_sanity_val_steps=0, **options)
    runner.callbacks = recorded([*runner.callbacks, *more], recorder)
    runner.fit(model, source)
    return runner, model


def test_points_counts_and_losses(tmp_path: Path) -> None:
    recorder, witness = Recorder(4), Witness()
    runner, model = fit(tmp_path, recorder, witness, steps=10)
    assert [point["step"] for point in recorder.points] == [4, 8, 10]
    assert recorder.done
    assert recorder.tokens == witness.tokens == recorder.points[-1]["tokens"]
    assert witness.dropped > 0
    assert recorder.dropped == witness.dropped / witness.assigned
    means = [sum(part) / len(part) for part in (witness.losses[:4], witness.losses[4:8], witness.losses[8:])]
    assert [point["train_loss"] for point in recorder.points] == pytest.approx(means, abs=1e-6)
    # The data's validation reads all of the held-out text here, as `validate` does.
    (found,) = runner.validate(model, datamodule=runner.datamodule, verbose=False)
    assert recorder.points[-1]["held_out_loss"] == pytest.approx(found["val/loss"], abs=1e-6)


def test_a_share_of_the_batches_is_lightnings(tmp_path: Path) -> None:
    recorder = Recorder(2)
    runner, model = fit(tmp_path, recorder, steps=2, limit_val_batches=0.5)
    assert len(runner.datamodule.val_dataloader()) == 3, "of which a half is one and a bit"
    (found,) = runner.validate(model, datamodule=runner.datamodule, verbose=False)
    assert recorder.points[-1]["held_out_loss"] == pytest.approx(found["val/loss"], abs=1e-6)


def test_curves_are_of_averaged_weights_where_the_end_is(tmp_path: Path) -> None:
    for name in ("plain", "average"):
        (tmp_path / name).mkdir()
    plain = fit(tmp_path / "plain", Recorder(2), steps=4)[1]
    recorder = Recorder(2)
    runner, model = fit(tmp_path / "average", recorder, EMAWeightAveraging(decay=0.9), steps=4)
    (found,) = runner.validate(model, datamodule=runner.datamodule, verbose=False)
    assert recorder.points[-1]["held_out_loss"] == pytest.approx(found["val/loss"], abs=1e-6)
    # The weights that train are their own again.
    saved = checkpoints.read(checkpoints.last(tmp_path / "average"))["current_model_state"]
    assert all(torch.equal(saved[name], value) for name, value in plain.state_dict().items())


def test_training_is_the_same_with_and_without_points(tmp_path: Path) -> None:
    # Jitter and dropout draw from the generator that evaluation must leave alone.
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = fit(tmp_path / "a", Recorder(1), steps=6, moe=TOP2)[1]
    second = fit(tmp_path / "b", Recorder(100), steps=6, moe=TOP2)[1]
    assert NET.keywords["dropout"] > 0
    assert torch.equal(weights(first), weights(second))
    assert first.training


def test_the_clock_stands_while_others_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks once when it is looked at, and a thousand times in a callback that comes after."""
    now = [0.0]

    def tick() -> float:
        now[0] += 1
        return now[0]

    class Slow(L.Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            now[0] += 1000

    monkeypatch.setattr("switchkit.compare.recorder.time.perf_counter", tick)
    recorder = Recorder(100)
    fit(tmp_path, recorder, Slow(), steps=5)
    assert 5 <= recorder.seconds < 100


def test_time_ends_a_run_between_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def tick() -> float:
        now[0] += 1
        return now[0]

    monkeypatch.setattr("switchkit.compare.recorder.time.perf_counter", tick)
    recorder = Recorder(100, seconds=6.5)
    runner, _ = fit(tmp_path, recorder, steps=30)
    assert recorder.done
    assert recorder.steps == runner.global_step == recorder.points[-1]["step"] == 7
    saved = checkpoints.read(checkpoints.last(tmp_path))["callbacks"][recorder.state_key]
    assert saved["done"]


def test_gradient_accumulation_counts_steps_not_batches(tmp_path: Path) -> None:
    recorder = Recorder(2)
    fit(tmp_path, recorder, steps=4, accumulate_grad_batches=3)
    assert [point["step"] for point in recorder.points] == [2, 4]
    assert recorder.tokens == 4 * 3 * 4 * 8
    # Of a model that has not learned yet, over 26 symbols: not a third of it.
    assert recorder.points[0]["train_loss"] > 0.8 * recorder.points[0]["held_out_loss"]


def test_a_run_that_a_callback_ends_has_a_point_there(tmp_path: Path) -> None:
    class Ends(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    recorder = Recorder(2)
    fit(tmp_path, recorder, Ends(), steps=9)
    assert [point["step"] for point in recorder.points] == [2, 3]


def test_the_training_loss_weighs_by_targets(tmp_path: Path) -> None:
    """As what is logged does, where the micro-batches of a step have unlike numbers of them."""
    recorder = Recorder(1)
    runner, _ = fit(tmp_path, recorder, Pads(), steps=3, accumulate_grad_batches=2, log_every_n_steps=1)
    rows = csv.DictReader((Path(runner.log_dir) / "metrics.csv").read_text().splitlines())
    logged = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert [point["train_loss"] for point in recorder.points] == pytest.approx(logged, abs=1e-6)


def test_a_step_of_ones_own_tells_its_loss_alone() -> None:
    from switchkit.compare.recorder import _own

    assert _own({"loss": torch.tensor(0.5)}, 4) == (2.0, 1)


def test_another_module_is_refused(tmp_path: Path) -> None:
    from switchkit.compare.recorder import held_out_loss

    with pytest.raises(ValueError, match="needs LanguageModules; got a LightningModule"):
        held_out_loss(L.Trainer(logger=False), L.LightningModule())
