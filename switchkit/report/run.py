"""The opening and the closing of `switchkit fit`."""

from __future__ import annotations

import math
import shlex
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Timer, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden

from switchkit.callbacks import SaveBest, SaveLast, Translations, WritePredictions
from switchkit.checkpoints import read, read_settings
from switchkit.module import LanguageModule
from switchkit.report.began import Began, ended
from switchkit.report.sample import command, sample
from switchkit.report.tables import (
    console,
    device_name,
    fallback_box,
    loads,
    model_table,
    pairs,
    source_rows,
)
from switchkit.report.twins import twin_rows

__all__ = [
    "checkpoint_line",
    "closing",
    "context_of",
    "cut_short",
    "describe",
    "length_name",
    "opening",
    "part_of",
    "predicted",
]


def checkpoint_line(path: str) -> None:
    """Say which checkpoint is used, and how far it had come."""
    console().print(f"checkpoint {path}, step {read_settings(path)['step']}", highlight=False, soft_wrap=True)


def opening(cli: Any) -> None:
    """Print what is about to be trained, on what, from where."""
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    cli.started, cli.began = time.perf_counter(), Began()
    trainer.callbacks.insert(0, cli.began)
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return
    out = console()
    info = data.source_info() if hasattr(data, "source_info") else None
    if (box := fallback_box(info)) is not None:
        out.print(box)
    rows = [*source_rows(info), ("device", device_name(trainer.strategy.root_device)), ("training", _length(trainer))]
    rows += module.opening_rows() if hasattr(module, "opening_rows") else []
    out.print(model_table(_net(module), context_of(cli), rows))


def describe(cli: Any) -> None:
    """Print the opening table and the dense twin, without touching the data beyond its vocabulary."""
    data = cli.datamodule
    info = data.source_info() if hasattr(data, "source_info") else None
    out = console()
    if (box := fallback_box(info)) is not None:
        out.print(box)
    device = ("device", device_name(cli.trainer.strategy.root_device))
    rows = [*source_rows(info), device, *twin_rows(cli.model, context_of(cli))]
    out.print(model_table(_net(cli.model), context_of(cli), rows))


def closing(cli: Any) -> None:
    """Evaluate the best checkpoint on the whole held-out text, then print what came out and what to do next.

    ``limit_val_batches`` holds here too, for the model and for whatever it is compared with, and the title says so.
    All processes evaluate, and write the sample together where each holds a part of the model; the first one prints.
    A run that had come to its end before says so instead.
    """
    module, trainer = cli.model, cli.trainer
    if trainer.fast_dev_run:
        return
    if cli.began.step is None and (past := ended(trainer)) is not None:
        if trainer.is_global_zero:
            console().print(past, highlight=False, soft_wrap=True)
        return
    wall = time.perf_counter() - cli.started
    best, last = _saved(trainer, SaveBest), _saved(trainer, SaveLast)
    for callback in trainer.callbacks:
        if hasattr(callback, "disable"):
            callback.disable()  # the bar
        if isinstance(callback, WeightAveraging):
            callback._average_model = None  # which it would put in the place of the best one's weights
    if not isinstance(cli.model, LanguageModule):
        if trainer.is_global_zero:
            console().print(pairs("Result", _of_another_kind(trainer, wall, best or last)))
        return
    if best is not None:
        module.load_state_dict(read(best)["state_dict"])
    # With limit_val_batches 0 there is nothing to evaluate on, and data of one's own may have none. A barebones Trainer
    # returns nothing of what it evaluates.
    held_out = is_overridden("val_dataloader", cli.datamodule) or is_overridden("val_dataloader", module)
    evaluates = held_out and not trainer.barebones
    found = (trainer.validate(module, datamodule=cli.datamodule, verbose=False) or [{}])[0] if evaluates else {}
    written = None if module.tokenizer is None else sample(module, cli.datamodule)
    config = _config(trainer)
    if not trainer.is_global_zero:
        return
    out = console()
    info = cli.datamodule.source_info() if hasattr(cli.datamodule, "source_info") else None
    if (box := fallback_box(info)) is not None:
        out.print(box)
    rows = [("wall time", f"{wall:.0f} s")]
    if found:
        rows = [
            ("validation loss", f"{found['val/loss']:.4f} nats per token = {found['val/bits']:.4f} bits"),
            ("perplexity", f"{found['val/perplexity']:.3f}"),
            ("token accuracy", f"{found['val/accuracy']:.1%}"),
            *rows,
        ]
    if "val/bleu" in found:
        rows.append(("translation", _translation(trainer, found)))
    if (speed := _speed(cli, wall)) is not None:
        included = f"{'padding, ' * cli.began.padded}validation and checkpoints included"
        rows.append(("speed", f"{speed:,.0f} tokens/s, {included}"))
    if found and hasattr(module, "closing_rows"):
        rows += module.closing_rows(islice(cli.datamodule.val_dataloader(), _batches(trainer)), found["val/loss"])
    rows += source_rows(info)
    experts = module.evaluation.routing.num_experts
    rows += loads(module.last_load, module.sparse_layers, experts) if found else []
    rows += [("checkpoint", str(best or last or "none was saved"))]
    count = _batches(trainer) if found else 0
    out.print(pairs(f"Result{f' on {part_of(count)}' if count != 0 else ', with no validation'}", rows))
    shown = best or last
    if shown is not None:
        on = f"--ckpt_path {shlex.quote(str(last or shown))}{_longer(trainer)}"
        names = cli.settings.get("plugins")
        plugins = f" --plugins {shlex.join(names)}" if names else ""
        out.print("Next:", style="bold")
        for line in (
            command(module, cli.datamodule, shown, written) + plugins,
            f"switchkit test --ckpt_path {shlex.quote(str(shown))}{plugins}",
            f"switchkit fit{config} {on}",
        ):
            out.print(f"  {line}", soft_wrap=True, highlight=False)
    if written is not None:
        out.print("Sample:", style="bold")
        out.print(written, highlight=False)


def _of_another_kind(trainer: Any, wall: float, saved: Path | None) -> list[tuple[str, str]]:
    """What is known of the run of a LightningModule that is none of ours: what it logged last."""
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return [
        *((name, f"{value:.6g}") for name, value in logged.items()),
        ("wall time", f"{wall:.0f} s"),
        ("checkpoint", str(saved or "none was saved")),
    ]


def predicted(cli: Any) -> None:
    """Say where the predictions are."""
    for callback in cli.trainer.callbacks:
        if isinstance(callback, WritePredictions) and callback.written is not None:
            told = f"predictions of {callback.count:,} sequences written to {callback.written}"
            console().print(told, highlight=False, soft_wrap=True)


def _net(module: Any) -> Any:
    """The model of a LanguageModule, or any other module as it is."""
    return getattr(module, "net", module)


def context_of(cli: Any) -> int:
    """Tokens that attention runs over: of the data's windows, sources or longest sentences; else the model's most."""
    return int(getattr(cli.datamodule, length_name(cli.datamodule), 0) or getattr(_net(cli.model), "context", 1))


def length_name(data: Any) -> str:
    """The option of the data that says how long their sequences are."""
    return next((name for name in ("context", "inputs_length", "max_source") if getattr(data, name, 0)), "context")


def _length(trainer: Any) -> str:
    """How long a run is, by what its Trainer says; -1 and None are no limit."""
    if 0 in (trainer.max_steps, trainer.max_epochs):
        return "none: 0 steps"
    limits = ((trainer.max_steps, "step"), (trainer.max_epochs or -1, "epoch"))
    told = [f"{count:,} {one}{'s' * (count > 1)}" for count, one in limits if count > 0]
    return " or ".join(told) + ", whichever comes first" * (len(told) > 1) or "until it is stopped"


def part_of(count: int | None) -> str:
    """What so many batches are of the held-out text; None: all of it."""
    if count is None:
        return "the whole held-out text"
    return f"the first {'batch' if count == 1 else f'{count} batches'} of the held-out text"


def _batches(trainer: Any) -> int | None:
    """How many batches of the held-out data the last evaluation read; null: all, or all of what has no length."""
    loader, most = trainer.validate_loop._combined_loader.flattened[0], trainer.validate_loop.max_batches[0]
    total = sized_len(loader)
    return int(most) if most < (math.inf if total is None else total) else None


def _saved(trainer: Any, kind: type[SaveBest | SaveLast]) -> Path | None:
    """The file that the first callback of a kind saved, if it is still there."""
    path = next((callback.path for callback in trainer.callbacks if isinstance(callback, kind)), None)
    return path if path is not None and path.exists() else None


def _longer(trainer: Any) -> str:
    """Options that let a run go on: twice as far, by what it ended with. One that a callback ended goes on without."""
    found = ""
    if 0 < trainer.max_steps <= trainer.global_step:
        found += f" --trainer.max_steps {2 * trainer.global_step}"
    if 0 < (trainer.max_epochs or -1) <= trainer.current_epoch:
        found += f" --trainer.max_epochs {2 * trainer.max_epochs}"
    left = [callback.time_remaining() for callback in trainer.callbacks if isinstance(callback, Timer)]
    if any(seconds is not None and seconds <= 0 for seconds in left):
        found += " --trainer.max_time null"
    return found


def _config(trainer: Any) -> str:
    """The option that names the saved settings of a run."""
    path = Path(trainer.log_dir or trainer.default_root_dir) / "config.yaml"
    return f" --config {shlex.quote(str(path))}" if path.is_file() else ""


def _speed(cli: Any, wall: float) -> float | None:
    """Tokens per second over the whole of training, validation and checkpoints included."""
    return cli.began.tokens / wall if cli.began.tokens else None


def _translation(trainer: Any, found: dict[str, float]) -> str:
    """BLEU and chrF, and of how many sentences where `Translations` stopped before the end of the held-out text."""
    told = f"BLEU {found['val/bleu']:.1f}, chrF {found['val/chrf']:.1f} of 100"
    # The last one's are what was logged.
    callback = next((one for one in reversed(trainer.callbacks) if isinstance(one, Translations)), None)
    if callback is not None and len(callback.found) == callback.pairs:
        told += f", on the first {'sentence' if callback.pairs == 1 else f'{callback.pairs:,} sentences'}"
    return told


def cut_short(cli: Any) -> None:
    """Say that the run itself is whole where the evaluation after it was interrupted."""
    path = _saved(cli.trainer, SaveBest) or _saved(cli.trainer, SaveLast)
    if path is not None:
        print(
            f"switchkit: the run had ended, its last evaluation is missing: switchkit validate --ckpt_path "
            f"{shlex.quote(str(path))}",
            file=sys.stderr,
        )
