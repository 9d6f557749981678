"""Checkpoint files of switchkit, for models that come from Hugging Face or go there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L

from switchkit import checkpoints
from switchkit.module import LanguageModule
from switchkit.registry import full_path
from switchkit.spec import OnMeta, build

__all__ = ["open_checkpoint", "save_checkpoint"]


def save_checkpoint(
    module: LanguageModule,
    path: str | Path,
    *,
    data: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
) -> None:
    """Write a model that was never trained as it is, as a checkpoint at step 0.

    Weights keep their dtype. The file appears whole or not at all.

    Args:
        module: the model.
        path: the file.
        data: the settings of the data that it goes with, as another checkpoint has them; null: those of its trainer.
        source: where their text came from, as another checkpoint has it; null: what its trainer's data say.

    Raises:
        OSError: it cannot be written.
    """
    content: dict[str, Any] = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": L.__version__,
        "state_dict": module.state_dict(),
        # None yet, so that training can go on from here: it starts with fresh ones.
        "optimizer_states": [],
        "lr_schedulers": [],
        "callbacks": {},
    }
    module.on_save_checkpoint(content)
    content["switchkit"] |= {name: value for name, value in (("data", data), ("source", source)) if value is not None}
    writer = checkpoints.AtomicCheckpointIO()
    try:
        writer.save_checkpoint(content, path)
    finally:
        writer.teardown()


def open_checkpoint(path: str | Path) -> LanguageModule:
    """The model of a checkpoint, weights in the dtype of the file.

    Raises:
        ValueError: see `LanguageModule.load_from_checkpoint`.
    """
    content = checkpoints.read(path)
    factory = build(content["switchkit"]["model"])
    if not issubclass(factory.func, LanguageModule):
        raise ValueError(f"{path} holds a {full_path(factory.func)}, which is no LanguageModule")
    net = factory.keywords.get("net")
    if isinstance(net, partial):
        # Every weight comes from the file: none is drawn first.
        factory = partial(factory, net=OnMeta(net.func, **net.keywords))
    module: LanguageModule = factory()
    module.load_state_dict(content["state_dict"], assign=True)
    module.on_load_checkpoint(content)
    return module
