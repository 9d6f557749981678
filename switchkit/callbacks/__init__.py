"""Lightning callbacks: usable in any Trainer, and set up by `switchkit fit` where the user has not done so."""

from switchkit.callbacks.defaults import defaults
from switchkit.callbacks.progress import TrainingBar
from switchkit.callbacks.random_state import RandomState
from switchkit.callbacks.save import SaveBest, SaveLast
from switchkit.callbacks.stop import CleanStop, Stopped

__all__ = ["CleanStop", "RandomState", "SaveBest", "SaveLast", "Stopped", "TrainingBar", "defaults"]
