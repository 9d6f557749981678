"""Lightning callbacks: usable in any Trainer, and set up by `switchkit fit` where the user has not done so."""

from switchkit.callbacks.adaptive_l1 import AdaptiveL1
from switchkit.callbacks.compile import Compile
from switchkit.callbacks.defaults import defaults
from switchkit.callbacks.expert_language import ExpertLanguage
from switchkit.callbacks.freeze import FreezeRouter
from switchkit.callbacks.predictions import WritePredictions
from switchkit.callbacks.progress import TrainingBar
from switchkit.callbacks.random_state import RandomState
from switchkit.callbacks.router_bias import UpdateRouterBias
from switchkit.callbacks.save import SaveBest, SaveLast
from switchkit.callbacks.schedules import CapacitySchedule, JitterSchedule
from switchkit.callbacks.stop import CleanStop, Stopped
from switchkit.callbacks.translate import Translation, Translations

__all__ = [
    "AdaptiveL1",
    "CapacitySchedule",
    "CleanStop",
    "Compile",
    "ExpertLanguage",
    "FreezeRouter",
    "JitterSchedule",
    "RandomState",
    "SaveBest",
    "SaveLast",
    "Stopped",
    "TrainingBar",
    "Translation",
    "Translations",
    "UpdateRouterBias",
    "WritePredictions",
    "defaults",
]
