"""The state of every random generator, kept in checkpoints."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist

__all__ = ["RandomState"]


class RandomState(L.Callback):
    """Keeps the generators of torch (CPU and CUDA), NumPy and Python in the checkpoint, one state per rank.

    They are restored when training starts, after the loaders were made and the sanity check ran, so that a resumed run
    draws what the uninterrupted one would have drawn. Plain data only, which loads under ``weights_only=True``. A rank
    for which the checkpoint has no state, in a new run every one but the first, is set apart from the others.
    """

    def __init__(self) -> None:
        self._pending: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        own = capture()
        if dist.is_available() and dist.is_initialized():
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, own)
            return {"ranks": every}
        return {"ranks": [own]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending = state_dict["ranks"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._pending is not None and trainer.global_rank < len(self._pending):
            restore(self._pending[trainer.global_rank])
        else:
            set_apart(trainer.global_rank)
        self._pending = None


def set_apart(rank: int) -> None:
    """Give torch's generators a stream of this rank; the first goes on with the one that it has.

    All ranks were seeded alike, and would draw the same dropout masks and jitter, place by place. The generators of
    NumPy and Python are left as they are: data may be cut with them, alike on every rank.
    """
    if rank:
        # From what is drawn next, so that one run after another in a process does not repeat itself.
        torch.manual_seed(int(torch.randint(2**62, ())) + rank)


def capture() -> dict[str, Any]:
    """The states as plain data."""
    version, internal, gauss = random.getstate()
    _, key, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [torch.from_numpy(np.asarray(key).astype(np.int64)), int(position), int(has_gauss), float(cached)],
    }


def restore(state: dict[str, Any]) -> None:
    """What `capture` took."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        # Checkpoints may come from a machine with another number of devices.
        for index, own in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(own.cpu(), index)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    key, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), position, has_gauss, cached))
