"""What `switchkit fit` adds to a Trainer by itself."""

from __future__ import annotations

import lightning as L

from switchkit.callbacks.progress import TrainingBar
from switchkit.callbacks.random_state import RandomState
from switchkit.callbacks.save import SaveBest, SaveLast
from switchkit.callbacks.stop import CleanStop

__all__ = ["defaults"]


def defaults() -> list[L.Callback]:
    """Exact resume, clean stop, checkpoints and the bar."""
    # Lightning's ckpt_path="best" asks the first that saves.
    return [RandomState(), SaveBest(), SaveLast(), CleanStop(), TrainingBar()]
