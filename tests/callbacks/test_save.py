"""When checkpoints are saved, and which one is the best."""

from __future__ import annotations

import math
import os
import re
import threading
import time
import warnings
from pathlib import Path
from typing import ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from small import data, module, trainer, weights

from switchkit import checkpoints
from switchkit.callbacks import SaveBest, SaveLast, defaults
from switchkit.checkpoints import AtomicCheckpointIO, read


def step_of(path: Path) -> int:
    return int(checkpoints.read(path)["global_step"])


def test_last_is_saved_at_the_end_even_between_intervals(tmp_path: Path) -> None:
    source = data(tmp_path)
    trainer(tmp_path, steps=8, every=5).fit(module(source), source)
    assert step_of(tmp_path / "version_0/checkpoints/last.ckpt") == 8


def test_nothing_is_saved_within_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three micro-batches a step: saves fall on every third, in the resumed part too."""
    source = data(tmp_path)
    seen: list[tuple[int, int]] = []

    class Watched(SaveLast):
        def save(self, trainer: L.Trainer) -> None:
            seen.append((trainer.global_step, trainer.fit_loop.batch_idx))
            super().save(trainer)

    monkeypatch.setattr("small.SaveLast", Watched)
    options = {"every": 1, "accumulate_grad_batches": 3, "val_check_interval": 100}
    trainer(tmp_path, steps=2, **options).fit(module(source), source)
    last = str(tmp_path / "version_0/checkpoints/last.ckpt")
    trainer(tmp_path, steps=4, **options).fit(module(source), source, ckpt_path=last)
    assert {step for step, _ in seen} == {1, 2, 3, 4}
    assert [pair for pair in seen if pair[1] != 3 * pair[0] - 1] == []


def test_best_is_the_lowest_over_resumed_parts(tmp_path: Path) -> None:
    source = data(tmp_path)
    loop = trainer(tmp_path, steps=21)
    loop.fit(module(source), source)
    best = next(c for c in loop.callbacks if isinstance(c, SaveBest))
    assert best.path is not None
    assert step_of(best.path) % 7 == 0
    resumed = SaveBest()
    resumed.load_state_dict(best.state_dict())
    assert (resumed.path, resumed.value) == (best.path, best.value)
    another = SaveBest("val/perplexity")
    another.load_state_dict(best.state_dict())
    assert (another.path, another.value) == (None, math.inf)
    best.path.unlink()
    resumed = SaveBest()
    resumed.load_state_dict(best.state_dict())
    assert resumed.path is None


def test_callbacks_serve_run_after_run(tmp_path: Path) -> None:
    last, best = SaveLast(100), SaveBest()
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        source = data(folder)
        model = module(source)
        if folder.name == "two":
            # Much worse than the first one's best.
            model.net.embed.weight.data *= 30
        loop = L.Trainer(
            accelerator="cpu", max_steps=4, val_check_interval=4, check_val_every_n_epoch=None, logger=False,
            default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, callbacks=[last, best],
        )  # fmt: skip
        loop.fit(model, source)
        assert sorted(path.name for path in folder.rglob("*.ckpt")) == ["best.ckpt", "last.ckpt"]


def test_a_file_saved_by_hand_is_there_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a run as within it, however slow the disk; those of the run itself settle while it goes on."""
    slept: list[str] = []

    def slow(file: int) -> None:
        slept.append(threading.current_thread().name)
        time.sleep(0.2)

    monkeypatch.setattr(os, "fsync", slow)
    source = data(tmp_path)
    loop = trainer(tmp_path, steps=5)
    loop.fit(module(source), source)
    assert all(name.startswith("checkpoint") for name in slept)
    loop.save_checkpoint(tmp_path / "mine.ckpt")
    assert step_of(tmp_path / "mine.ckpt") == 5


@pytest.mark.daily(
    "3-7-None-3-validation every 7 batches falls into the middle of optimizer steps of 3, whose", "4-8-None-7-None"
)
@pytest.mark.parametrize(
    ("accumulate", "every", "epochs", "steps", "told"),
    [
        (3, 7, None, 3, "validation every 7 batches falls into the middle of optimizer steps of 3, whose"),
        (3, 7, 1, 3, "validation every 7 batches falls into the middle of optimizer steps of 3, whose"),
        # 25 batches make an epoch, which ends with a short step.
        (
            4,
            8,
            None,
            9,
            "steps of 4, as epochs of 25 batches end .* check_val_every_n_epoch 1 and a",
        ),
        (4, 8, None, 7, None),
        (4, 8, 1, 8, None),
        (4, 25, None, 8, None),
        (5, 10, None, 6, None),
    ],
)
def test_validation_within_a_step_is_warned_of(
    tmp_path: Path, accumulate: int, every: int, epochs: int | None, steps: int, told: str | None
) -> None:
    """Of each run that has one, and of no other."""
    source = data(tmp_path)
    within: list[int] = []

    class Watched(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            if not trainer.sanity_checking and module._step.batches:
                within.append(trainer.global_step)

    options = {"accumulate_grad_batches": accumulate, "val_check_interval": every, "check_val_every_n_epoch": epochs}
    loop = trainer(tmp_path, Watched(), steps=steps, limit_val_batches=1, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.fit(module(source), source)
    found = [str(one.message) for one in caught if "falls into the middle" in str(one.message)]
    assert bool(within) == bool(found) == bool(told)
    assert all(re.search(told or "", one) for one in found)


def test_a_metric_that_nobody_logs_is_told(tmp_path: Path) -> None:
    source = data(tmp_path)
    loop = trainer(tmp_path, steps=7)
    loop.callbacks[:] = [c if not isinstance(c, SaveBest) else SaveBest("val/los") for c in loop.callbacks]
    with pytest.warns(UserWarning, match="best.ckpt is not saved: nobody logs val/los; there are .*val/loss"):
        loop.fit(module(source), source)


def test_fast_dev_run_saves_nothing(tmp_path: Path) -> None:
    source = data(tmp_path)
    trainer(tmp_path, fast_dev_run=3, steps=3).fit(module(source), source)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_bad_interval() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be at least 1; got 0"):
        SaveLast(0)


class Raw(L.Callback):
    """The weights that training has come to, before a callback averages them."""

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *rest: object) -> None:
        self.weights = weights(module)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch:UserWarning")
def test_weights_to_go_on_from_are_kept_beside_averages(tmp_path: Path) -> None:
    """Of a run that ends with its epochs, between two saves and with one."""
    for every, averaging in ((100, EMAWeightAveraging(decay=0.5)), (25, StochasticWeightAveraging(1e-2, 1)),
                             (100, StochasticWeightAveraging(1e-2, 1))):  # fmt: skip
        folder = tmp_path / f"{type(averaging).__name__}{every}"
        folder.mkdir()
        source, raw = data(folder), Raw()
        model = module(source)
        trainer(folder, raw, averaging, every=every, steps=-1, max_epochs=1).fit(model, source)
        ema = isinstance(averaging, EMAWeightAveraging)
        files = folder / "version_0/checkpoints"
        last = read(files / "last.ckpt")["current_model_state" if ema else "state_dict"]
        assert torch.equal(torch.cat([last[name].flatten() for name, _ in model.named_parameters()]), raw.weights)
        averaged = read(files / ("last.ckpt" if ema else "averaged.ckpt"))["state_dict"]
        ended = torch.cat([averaged[name].flatten() for name, _ in model.named_parameters()])
        assert torch.equal(ended, weights(model))
        assert not torch.equal(ended, raw.weights)
        assert (files / "averaged.ckpt").exists() != ema


class Ends(L.Callback):
    """Ends training at a batch, as `EarlyStopping` on a value of training does."""

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *rest: Any) -> None:
        trainer.should_stop = trainer.should_stop or rest[-1] == 3


def test_a_run_that_ends_within_a_step_ends_with_that_step(tmp_path: Path) -> None:
    """Told at the first of its three batches."""
    source = data(tmp_path)
    loop = trainer(tmp_path, steps=6, every=4, accumulate_grad_batches=3, val_check_interval=12)
    loop.callbacks.insert(0, Ends())
    loop.fit(module(source), source)
    assert loop.global_step == 2
    assert checkpoints.read(tmp_path / "version_0/checkpoints/last.ckpt")["global_step"] == 2


class Told(L.Callback):
    """Validation values that are known beforehand, by step."""

    values: ClassVar[dict[int, float]] = {7: 2.2, 14: 2.0, 21: 2.1, 28: 2.15}

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            module.log("val/told", self.values[trainer.global_step])


def test_the_best_of_the_step_that_a_run_stopped_at_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """last.ckpt of step 14 is saved before the validation there, and best.ckpt after it."""
    source = data(tmp_path)
    monkeypatch.setattr("small.SaveBest", lambda: SaveBest("val/told"))
    # What Lightning calls first logs first.
    trainer(tmp_path, Told(), steps=14, every=7).fit(module(source), source)
    first = tmp_path / "version_0/checkpoints"
    loop = trainer(tmp_path, Told(), steps=28, every=7)
    loop.fit(module(source), source, ckpt_path=str(first / "last.ckpt"))
    best = next(c for c in loop.callbacks if isinstance(c, SaveBest))
    assert (best.path, best.value) == (first / "best.ckpt", 2.0)
    assert not (tmp_path / "version_1/checkpoints/best.ckpt").exists()


@pytest.mark.filterwarnings("ignore:.*first checkpoint callback:UserWarning")
@pytest.mark.filterwarnings("ignore:.*was called without a model:UserWarning")
def test_lightning_finds_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, model = data(tmp_path), module(data(tmp_path))
    loop = L.Trainer(
        default_root_dir=tmp_path, callbacks=defaults(), max_steps=8, val_check_interval=4, accelerator="cpu",
        logger=False, enable_model_summary=False, plugins=[AtomicCheckpointIO()],
    )  # fmt: skip
    loop.fit(model, source)
    (best,) = (c for c in loop.callbacks if isinstance(c, SaveBest))
    used: list[object] = []
    monkeypatch.setattr(AtomicCheckpointIO, "load_checkpoint", lambda io, path, **_: used.append(path) or read(path))
    (found,) = loop.validate(model, source, ckpt_path="best", verbose=False)
    assert found["val/loss"] == pytest.approx(best.value)
    assert loop.test(datamodule=source, verbose=False)
    assert used == [str(best.path)] * 2
