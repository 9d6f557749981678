"""A run that is stopped and resumed ends with the very weights of one that was not."""

from __future__ import annotations

import csv
import gc
import signal
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from small import KillAt, fit, weights

from switchkit import checkpoints
from switchkit.callbacks import CleanStop, RandomState, Stopped


class SignalAt(L.Callback):
    """Sends a real signal to the process in the middle of a step."""

    def __init__(self, batch: int, number: int) -> None:
        self.batch, self.number, self.seen = batch, number, 0

    def on_before_zero_grad(self, *rest: Any) -> None:
        self.seen += 1
        if self.seen == self.batch:
            signal.raise_signal(self.number)


class StopAt(L.Callback):
    """Ends training after a batch, as `max_time` does, or after the validation of a batch, as `EarlyStopping` does."""

    def __init__(self, batch: int, validation: bool) -> None:
        self.batch, self.validation = batch, validation

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        trainer.should_stop |= not self.validation and trainer.fit_loop.total_batch_idx + 1 >= self.batch

    def on_validation_end(self, trainer: L.Trainer, *rest: Any) -> None:
        trainer.should_stop |= self.validation and trainer.fit_loop.total_batch_idx + 1 == self.batch


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return weights(fit(tmp_path_factory.mktemp("whole")))


@pytest.mark.daily("killed_at_17")
@pytest.mark.parametrize("step", [6, 17, 26, 39], ids="killed_at_{}".format)
def test_killed_run_resumes_bit_identical(whole: torch.Tensor, tmp_path: Path, step: int) -> None:
    # 25 batches make an epoch: 26 lies in the second, and its checkpoint on the boundary. 7 steps make a validation.
    with pytest.raises(KeyError, match="killed"):
        fit(tmp_path, KillAt(step))
    assert torch.equal(weights(fit(tmp_path, resume=True)), whole)


@pytest.mark.slow
def test_several_kills_in_one_run(whole: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fit(tmp_path, KillAt(8))
    for step in (13, 22, 31):
        with pytest.raises(KeyError):
            fit(tmp_path, KillAt(step), resume=True)
    assert torch.equal(weights(fit(tmp_path, resume=True)), whole)


@pytest.mark.daily("1-2")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_signal_stops_between_steps_and_resumes_bit_identical(tmp_path: Path, number: int, accumulate: int) -> None:
    options = {"steps": 20, "accumulate_grad_batches": accumulate}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    uninterrupted = weights(fit(tmp_path / "a", **options))
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        fit(tmp_path / "b", SignalAt(8, number), **options)
    assert stopped.value.code == 128 + number
    assert stopped.value.path == checkpoints.last(tmp_path / "b")
    assert checkpoints.read_settings(stopped.value.path)["step"] == stopped.value.step == 8
    assert signal.getsignal(number) is before
    assert torch.equal(weights(fit(tmp_path / "b", resume=True, **options)), uninterrupted)


def test_a_run_in_double_precision_resumes_bit_identical(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    uninterrupted = weights(fit(tmp_path / "a", steps=12, precision="64-true"))
    assert uninterrupted.dtype == torch.float64
    with pytest.raises(KeyError, match="killed"):
        fit(tmp_path / "b", KillAt(9), steps=12, precision="64-true")
    assert torch.equal(weights(fit(tmp_path / "b", resume=True, steps=12, precision="64-true")), uninterrupted)


def test_after_a_run_signals_mean_what_they_did_and_nothing_of_it_is_held(tmp_path: Path) -> None:
    """Lightning's handler holds its trainer, with model and optimizer, and ignores SIGTERM once a run is over."""
    before = [signal.getsignal(number) for number in CleanStop.SIGNALS]
    made = fit(tmp_path, steps=2)
    assert [signal.getsignal(number) for number in CleanStop.SIGNALS] == before
    freed = weakref.ref(made)
    del made
    gc.collect()
    assert freed() is None


def test_a_signal_in_the_last_validation_stops_there(tmp_path: Path) -> None:
    """After the last step nothing looks between two steps."""

    class InValidation(L.Callback):
        def on_validation_batch_end(self, *rest: Any) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped) as stopped:
        fit(tmp_path, InValidation(), steps=7, num_sanity_val_steps=0, limit_val_batches=1)
    assert (stopped.value.code, stopped.value.step) == (143, 7)
    assert checkpoints.read_settings(stopped.value.path)["step"] == 7


EPOCH = {"every": 100, "steps": -1, "max_epochs": 1, "check_val_every_n_epoch": 1}
STEPS = {"every": 100, "steps": 10, "accumulate_grad_batches": 4}


@pytest.mark.daily("8-False-options0-8")
@pytest.mark.parametrize(
    ("batch", "validation", "options", "steps"),
    [
        (8, False, EPOCH, 8),
        (14, True, EPOCH, 14),
        (14, True, STEPS, 4),  # a validation in the middle of the fourth step
        (6, False, STEPS, 2),  # in the middle of the second step
        (26, False, STEPS, 8),  # in the middle of the first step of the second epoch, after a short one
    ],
)
def test_a_run_that_a_callback_ends_goes_on_bit_identical(
    tmp_path: Path, batch: int, validation: bool, options: dict[str, Any], steps: int
) -> None:
    """In the middle of an epoch of 25 batches, and after a whole step."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    uninterrupted = weights(fit(tmp_path / "a", **options))
    fit(tmp_path / "b", StopAt(batch, validation), **options)
    stopped = checkpoints.last(tmp_path / "b")
    assert checkpoints.read_settings(stopped)["step"] == steps
    assert torch.equal(weights(fit(tmp_path / "b", resume=True, **options)), uninterrupted)
    ends = [checkpoints.read(checkpoints.last(tmp_path / part)) for part in ("a", "b")]
    assert ends[0]["global_step"] == ends[1]["global_step"]
    assert ends[0]["epoch"] == ends[1]["epoch"]


@pytest.mark.slow
def test_without_the_random_state_the_weights_differ(
    whole: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison has teeth: dropout and jitter of a resumed run depend on the restored state."""
    with pytest.raises(KeyError):
        fit(tmp_path, KillAt(17))
    monkeypatch.setattr(RandomState, "on_train_start", lambda *rest: None)
    assert not torch.equal(weights(fit(tmp_path, resume=True)), whole)


def test_logs_of_both_runs_join_without_a_gap(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fit(tmp_path, KillAt(17))
    first = rows(tmp_path / "version_0")
    fit(tmp_path, resume=True)
    assert rows(tmp_path / "version_0") == first
    steps = {
        int(row["step"]) for version in (0, 1) for row in rows(tmp_path / f"version_{version}") if row["train/loss"]
    }
    assert steps == set(range(1, 40, 2))


def test_interval_metrics_survive_the_resume(tmp_path: Path) -> None:
    """Load counted since the last log is in the checkpoint: the next log covers the same steps as without a stop."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    fit(tmp_path / "a", steps=10, log_every_n_steps=10)
    with pytest.raises(KeyError):
        fit(tmp_path / "b", KillAt(7), steps=10, log_every_n_steps=10)
    fit(tmp_path / "b", resume=True, steps=10, log_every_n_steps=10)
    whole = [r["train/imbalance"] for r in rows(tmp_path / "a" / "version_0") if r.get("train/imbalance")]
    resumed = [r["train/imbalance"] for r in rows(tmp_path / "b" / "version_1") if r.get("train/imbalance")]
    assert whole == resumed
    assert len(whole) == 1


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))
