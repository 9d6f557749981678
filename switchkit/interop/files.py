"""Checkpoint files of switchkit, for models that come from Hugging Face or go there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from switchkit import checkpoints
from switchkit.module import LanguageModule
from switchkit.registry import full_path
from switchkit.spec import OnMeta, build

__all__ = ["open_checkpoint", "open_stored", "save_checkpoint"]


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
    checkpoints.AtomicCheckpointIO().save_checkpoint(content, path)


def open_checkpoint(path: str | Path) -> LanguageModule:
    """The model of a checkpoint, weights in the dtype of the file.

    Raises:
        ValueError: see `LanguageModule.load_from_checkpoint`.
    """
    return _opened(checkpoints.read(path), path)


def open_stored(path: str | Path) -> tuple[LanguageModule, Callable[[str], Tensor]]:
    """The model of a checkpoint, and what reads one of its tensors, by its name in ``state_dict()``.

    Of a sharded checkpoint the model has shapes only ("meta"), and a tensor is read when it is asked for; a single file
    is read at once.

    Raises:
        ValueError: see `LanguageModule.load_from_checkpoint`.
    """
    path = Path(path)
    if not path.is_dir():
        module = open_checkpoint(path)
        return module, module.state_dict().__getitem__
    content = checkpoints.outline(path)
    # Buffers are the same in all processes, and are there already.
    here = {name: value for name, value in content["state_dict"].items() if not value.is_meta}
    return _opened(content, path), lambda name: here[name] if name in here else checkpoints.read_tensor(path, name)


def _opened(content: Mapping[str, Any], path: str | Path) -> LanguageModule:
    factory = build(content["switchkit"]["model"])
    if not issubclass(factory.func, LanguageModule):
        raise ValueError(f"{path} holds a {full_path(factory.func)}, which is no LanguageModule")
    net = factory.keywords.get("net")
    if isinstance(net, partial):
        # Every weight comes from the file: none is drawn first.
        factory = partial(factory, net=OnMeta(net.func, **net.keywords))
    module: LanguageModule = factory()
    module.load_state_dict(content["state_dict"], assign=True)
    module.on_load_checkpoint(dict(content))
    return module
