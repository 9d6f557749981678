"""A run small enough to repeat many times: the real module, data and callbacks at the smallest sizes."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from switchkit import Balance, Decoder, Factor, LanguageModule, MoELayer, RouterZ, Switch, TextData, TopK, checkpoints
from switchkit.callbacks import CleanStop, RandomState, SaveBest, SaveLast
from switchkit.checkpoints import AtomicCheckpointIO

# Jitter, dropout and expert dropout, so that a random state that is not restored shows in the weights.
NET = partial(
    Decoder, d_model=16, num_layers=2, num_heads=2, d_ff=24, num_experts=3, context=8, sparse="every(1)", dropout=0.1
)
MOE = partial(MoELayer, router=partial(Switch, jitter=0.1), capacity=partial(Factor, train=1.25))
TOP2 = partial(MoELayer, router=partial(TopK, k=2))

DEFAULTS = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "val_check_interval": 7,
    "check_val_every_n_epoch": None,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 2,
}


def text_file(folder: Path, characters: int = 900) -> Path:
    """A text of our own with 26 symbols."""
    text = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(characters))
    return whole_file(folder / "text.txt", text)


def whole_file(path: Path, text: str) -> Path:
    """The file, never half-written: several processes may write the same one at once, and read it."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    return part.replace(path)


def data(folder: Path, **more: Any) -> TextData:
    path = text_file(folder)
    return TextData(str(path), **{"context": 8, "batch_size": 4, "eval_batch_size": 4, "validation_prefix": 0, **more})


def module(source: TextData, **more: Any) -> LanguageModule:
    torch.manual_seed(0)
    losses = [Balance, partial(RouterZ, weight=0.01)]
    given = {"net": NET, "moe": MOE, "losses": losses, "tokenizer": source.tokenizer, "warmup_steps": 3}
    return LanguageModule(**{**given, **more})


def trainer(folder: Path, *callbacks: L.Callback, every: int = 5, steps: int = 40, **more: Any) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        logger=CSVLogger(folder, name="", flush_logs_every_n_steps=1),
        plugins=[AtomicCheckpointIO(), *more.pop("plugins", [])],
        callbacks=[RandomState(), SaveLast(every), CleanStop(), SaveBest(), *callbacks],
        enable_model_summary=False,
        **{**DEFAULTS, "max_steps": steps, **more},
    )


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class KillAt(L.Callback):
    """Ends the process's run as SIGKILL would: no callback, no hook, no checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyError("killed")


class Pads(L.Callback):
    """Marks all but the first token of every row as padding, in every other batch."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        real = torch.arange(batch["tokens"].shape[1]) < (1 if batch_idx % 2 == 0 else 99)
        batch["valid"] = real.expand_as(batch["tokens"])


def fit(folder: Path, *callbacks: L.Callback, resume: bool = False, **options: Any) -> L.LightningModule:
    """A run below the folder, or what goes on from its last checkpoint."""
    source = data(folder)
    model = module(source)
    torch.manual_seed(1 if not resume else 99)  # A resumed process starts from any random state.
    path = checkpoints.last(folder) if resume else None
    trainer(folder, *callbacks, **options).fit(model, source, ckpt_path=path)
    return model
