"""What the Trainer of a command gets beside what the user gave it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import BasePredictionWriter, Callback, Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import CheckpointIO

from switchkit.callbacks import WritePredictions, defaults
from switchkit.checkpoints import AtomicCheckpointIO

if TYPE_CHECKING:
    from switchkit.cli.lightning import SwitchkitCLI

__all__ = ["add_parts"]


def add_parts(cli: SwitchkitCLI, settings: Any) -> None:
    """Callbacks, a logger and the way to save, into the settings of the Trainer."""
    callbacks = settings.get("callbacks")
    own = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks] if callbacks else []
    if cli.command == "fit":
        settings["callbacks"] = own + [callback for callback in defaults() if _wanted(callback, own, settings)]
        if settings.get("enable_model_summary") is None and not any(isinstance(c, ModelSummary) for c in own):
            settings["enable_model_summary"] = False  # the opening table tells it
    if cli.command == "predict" and (cli.out is not None or not any(_writes(c) for c in own)):
        settings["callbacks"] = [*own, WritePredictions(cli.out)]
    if settings.get("logger") in (None, True) and not settings.get("barebones"):
        # Lightning's own choice depends on what is installed.
        settings["logger"] = CSVLogger(settings["default_root_dir"], name="")
    plugins = settings.get("plugins")
    plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins] if plugins else []
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        settings["plugins"] = [*plugins, AtomicCheckpointIO()]


def _writes(callback: Callback) -> bool:
    """Whether a callback of the user's takes care of predictions."""
    return isinstance(callback, (WritePredictions, BasePredictionWriter))


def _wanted(callback: Callback, own: list[Callback], settings: Any) -> bool:
    """Whether a default callback is added: not if the user configured its like or switched it off."""
    switches = {
        ProgressBar: "enable_progress_bar",
        Checkpoint: "enable_checkpointing",
        ModelSummary: "enable_model_summary",
    }
    # A barebones Trainer refuses all of them.
    off = [kind for kind, name in switches.items() if settings.get("barebones") or settings.get(name) is False]
    if isinstance(callback, tuple(off)):
        return False
    # A Trainer takes one bar only.
    like = next((kind for kind in (ProgressBar, ModelSummary) if isinstance(callback, kind)), type(callback))
    return not any(isinstance(other, like) for other in own)
