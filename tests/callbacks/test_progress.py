"""What the bar shows."""

from __future__ import annotations

import copy
import io
import logging
import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from rich.console import Console
from small import NET, Pads, data, module, trainer

from switchkit import Decoder
from switchkit.callbacks import TrainingBar


def shown(folder: Path, terminal: bool, dumb: bool = False, callback: L.Callback | None = None, **more: Any) -> str:
    bar = TrainingBar(refresh_rate=1)
    out = io.StringIO()
    kind = {"TERM": "dumb"} if dumb else {}
    bar._console = Console(file=out, force_terminal=terminal, width=80, no_color=True, _environ=kind)
    source = data(folder)
    others = [] if callback is None else [callback]
    trainer(folder, bar, *others, steps=14, enable_progress_bar=True, **more).fit(module(source), source)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())


def test_bar_shows_loss_bits_speed_imbalance_and_drops(tmp_path: Path) -> None:
    text = shown(tmp_path, terminal=True)
    for value in (
        r"loss \d\.\d{3}",
        r"val bits \d\.\d{3}",
        r"tokens/s [\d,]+",
        r"imbalance [1-3]\.\d\d",
        r"dropped \d+\.\d%",
    ):
        assert re.search(value, text), value
    assert re.search(r"training .* 14/14 .*\d:\d\d:\d\d", text)
    assert "…" not in text  # all of it finds room in 80 columns


class Uneven(Decoder):
    """Its last layer has twelve experts where the others have three."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.blocks[-1].mlp = given["moe"](d_model=16, num_experts=12, d_ff=24)


class Last(L.Callback):
    """What the last step returned."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
        self.loss, self.stats = float(outputs["loss"]), outputs["stats"]


def test_the_values_are_those_of_the_step(tmp_path: Path) -> None:
    """The worst layer is the one of the largest load over the mean of its own experts, however many others have."""
    bar, last, source = TrainingBar(refresh_rate=1), Last(), data(tmp_path)
    model = module(source, net=partial(Uneven, **NET.keywords))
    trainer(tmp_path, bar, last, steps=2, enable_progress_bar=True).fit(model, source)
    loads = [load[:count].tolist() for load, count in zip(last.stats["load"], (3, 12), strict=True)]
    lost = [int(dropped) / sum(load) for load, dropped in zip(loads, last.stats["dropped"], strict=True)]
    assert bar._shown["imbalance"] == f"{max(max(load) * len(load) / sum(load) for load in loads):.2f}"
    assert bar._shown["dropped"] == f"{100 * sum(lost) / 2:.1f}%"
    assert sum(lost) > 0
    assert bar._shown["loss"] == f"{last.loss:.3f}"


@pytest.mark.slow
def test_the_loss_is_that_of_a_whole_batch_when_gradients_are_accumulated(tmp_path: Path) -> None:
    def losses(**more: Any) -> list[float]:
        return [float(found) for found in re.findall(r"loss (\d\.\d{3})", shown(tmp_path, terminal=False, **more))]

    assert max(losses(accumulate_grad_batches=4)) < 2 * min(losses())
    assert 2 * min(losses(accumulate_grad_batches=4)) > max(losses())


def test_the_loss_is_that_of_a_micro_batch_whatever_it_weighs(tmp_path: Path) -> None:
    """26 symbols, of which nothing is learned yet."""
    bar = TrainingBar(refresh_rate=1)
    source = data(tmp_path)
    trainer(tmp_path, Pads(), bar, steps=1, accumulate_grad_batches=2, enable_progress_bar=True).fit(
        module(source), source
    )
    assert float(bar._shown["loss"]) == pytest.approx(math.log(26), abs=1)


class Tells(L.Callback):
    """What a library logs in mid-run, by a handler that is older than the bar."""

    def __init__(self) -> None:
        self.handler = logging.StreamHandler(sys.stderr)
        self.logger = logging.getLogger("switchkit.tests.library")
        self.logger.addHandler(self.handler)

    def on_train_batch_end(self, *rest: Any) -> None:
        self.logger.warning("told by a library")


def test_what_libraries_log_stands_above_the_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tells = Tells()
    try:
        stream = tells.handler.stream
        text = shown(tmp_path, True, False, callback=tells)
        assert tells.handler.stream is stream
    finally:
        tells.logger.removeHandler(tells.handler)
    assert sum(line.strip() == "told by a library" for line in text.splitlines()) == 14
    assert "told by a library" not in capsys.readouterr().err


@pytest.mark.parametrize("dumb", [False, True])
def test_without_a_terminal_there_is_a_line_per_validation(tmp_path: Path, dumb: bool) -> None:
    """A terminal that cannot move its cursor is as good as none."""
    lines = shown(tmp_path, terminal=dumb, dumb=dumb).splitlines()
    assert [line.split()[:2] for line in lines] == [["step", "7"], ["step", "14"]]
    assert all(word in line for line in lines for word in ("loss", "val bits", "tokens/s", "imbalance", "dropped"))


def test_a_second_run_shows_its_own_values_alone(tmp_path: Path) -> None:
    bar, source = TrainingBar(refresh_rate=1), data(tmp_path)
    trainer(tmp_path, bar, steps=14, enable_progress_bar=True).fit(module(source), source)
    bar._tokens, bar._seconds = 10**12, 1e6
    trainer(tmp_path, bar, steps=2, enable_progress_bar=True).fit(module(source), source)
    assert bar._tokens == 2 * 4 * 8
    assert bar._seconds < 1e6
    assert "val bits" not in bar._shown


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_a_module_of_another_kind(tmp_path: Path) -> None:
    bar = TrainingBar(refresh_rate=1)
    L.Trainer(
        accelerator="cpu", max_steps=2, limit_val_batches=1, callbacks=[bar], logger=False, enable_checkpointing=False,
        default_root_dir=tmp_path, enable_model_summary=False,
    ).fit(BoringModel())  # fmt: skip
    assert list(bar._shown) == ["loss"]


def test_a_copy_is_a_bar_of_its_own() -> None:
    bar = TrainingBar(refresh_rate=3)
    other = copy.deepcopy(bar)
    assert other.refresh_rate == 3
    assert other._console is not bar._console


def test_bad_refresh_rate() -> None:
    with pytest.raises(ValueError, match="refresh_rate must be at least 1; got 0"):
        TrainingBar(refresh_rate=0)
