"""Training one run of a comparison, on the path of ``switchkit fit``."""

from __future__ import annotations

import gc
import math
import tempfile
import traceback
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from switchkit import checkpoints
from switchkit.callbacks import Translations
from switchkit.cli.errors import disk_is_full, one_line
from switchkit.compare.folder import Folder, Result
from switchkit.compare.plan import Model, cli_of
from switchkit.compare.quiet import quiet
from switchkit.compare.recorder import Recorder, Show, recorded
from switchkit.report.tables import device_name
from switchkit.step import NonFiniteError

__all__ = ["seconds_per_step", "train"]

_MEASURED, _WARM = 25, 5


def train(
    folder: Folder,
    name: str,
    seed: int,
    model: Model,
    *,
    steps: int,
    every: int,
    seconds: float | None,
    seeded: bool,
    show: Show,
) -> Result:
    """Train a run, or go on with it from its last checkpoint, and evaluate it over the whole held-out text.

    What goes wrong in training is the run's result; a stop from outside is not, and is raised.
    """
    recorder = Recorder(every, seconds=seconds, show=show)
    place = folder.run(name, seed)
    known: dict[str, Any] = {
        "run": name,
        "seed": seed,
        "parameters": model.counts.parameters,
        "active_parameters": model.counts.active,
        "flops_per_token": model.counts.flops,
        "data": model.data,
    }
    found: Mapping[str, float] = {}
    try:
        with quiet():
            cli = cli_of(folder.recipe(name), steps, seed, place, seeded)
            known["device"] = device_name(cli.trainer.strategy.root_device)
            _fit(cli, recorder, place)
            found = _last_evaluation(cli)
        status, reason = "finished", ""
    except Exception as error:
        if disk_is_full(error):
            raise  # which is none of the run's doing
        status, reason = "failed", one_line(error) or f"{type(error).__name__}: {' '.join(str(error).split())}"
        place.mkdir(parents=True, exist_ok=True)
        (place / "error.txt").write_text(traceback.format_exc(), "utf-8")
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    dense = not model.sparse
    return Result(
        **known,
        status=status,
        reason=reason,
        steps=recorder.steps,
        tokens=recorder.tokens,
        seconds=recorder.seconds,
        held_out_loss=found.get("val/loss"),
        accuracy=found.get("val/accuracy"),
        dropped=None if dense else recorder.dropped,
        imbalance=None if dense else found.get("val/imbalance"),
        dead_experts=None if dense else found.get("val/dead_experts"),
        train_flops=recorder.tokens * model.cost.flops / model.cost.tokens,
        points=recorder.points,
    )


def _fit(cli: Any, recorder: Recorder, place: Path) -> None:
    trainer = cli.trainer
    trainer.callbacks = recorded(trainer.callbacks, recorder)
    if not Path(trainer.log_dir).resolve().is_relative_to(place.resolve()):
        # Checkpoints lie in the folder of the first logger, and are looked for in the run's.
        trainer.loggers = [CSVLogger(place, name=""), *trainer.loggers]
    try:
        path = checkpoints.last(place)
    except ValueError:
        path = None
    if path is not None:
        content = checkpoints.read(path)
        before = content["callbacks"][recorder.state_key]
        if before["done"]:
            recorder.load_state_dict(before)
            cli.model.load_state_dict(content["state_dict"])
            return
    trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=path, weights_only=True)


def _last_evaluation(cli: Any) -> Mapping[str, float]:
    """What the last weights make of the whole held-out text.

    Raises:
        NonFiniteError: the loss is no number. No step after the last one would have noticed.
    """
    # Which would generate, and show what nobody asked for.
    cli.trainer.callbacks = [one for one in cli.trainer.callbacks if not isinstance(one, Translations)]
    found: Mapping[str, float] = cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)[0]
    loss = found["val/loss"]
    if not math.isfinite(loss):
        raise NonFiniteError(f"non-finite held-out loss {loss} after the last step. Lower the learning rate")
    return found


def seconds_per_step(recipe: Path, seeded: bool) -> float:
    """Median wall clock of an optimizer step, over 20 after 5 that are not counted."""

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.step = 0

        def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
            if trainer.global_step != self.step:
                self.step = trainer.global_step
                self.times.append(perf_counter())

    clock = Clock()
    with quiet(), tempfile.TemporaryDirectory() as folder:
        cli = cli_of(recipe, _MEASURED + 1, 0, Path(folder), seeded)
        trainer: Any = cli.trainer
        trainer.callbacks = [*(callback for callback in trainer.callbacks if not hasattr(callback, "save")), clock]
        trainer.fit(cli.model, datamodule=cli.datamodule)
    times = clock.times[_WARM:]
    return median(b - a for a, b in pairwise(times))
