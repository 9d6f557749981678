"""What the Trainer of a command gets beside what the user gave it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    BatchSizeFinder,
    Callback,
    Checkpoint,
    EarlyStopping,
    ModelSummary,
    ProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import CheckpointIO

from switchkit.callbacks import WritePredictions, defaults
from switchkit.checkpoints import AtomicCheckpointIO
from switchkit.cli.errors import UserError

if TYPE_CHECKING:
    from switchkit.cli.lightning import SwitchkitCLI

__all__ = ["add_parts"]


def add_parts(cli: SwitchkitCLI, settings: Any) -> None:
    """Callbacks, a logger and the way to save, into the settings of the Trainer."""
    callbacks = settings.get("callbacks")
    own = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks] if callbacks else []
    if cli.command == "fit":
        for callback in own:
            _arrange(callback)
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


def _arrange(callback: Callback) -> None:
    """Let `EarlyStopping` look after validations, whose loss it watches, where the user has not said when.

    Lightning lets it look at the end of an epoch, too, which a run bounded by steps ends in: there the loss is missing
    if this process has not validated yet, and the run would end in an error after all of its training.

    Raises:
        UserError: `BatchSizeFinder`, which goes back in data whose place belongs to a batch size.
    """
    if isinstance(callback, BatchSizeFinder):
        raise UserError(
            "trainer.callbacks: BatchSizeFinder changes the batch size in mid-run, to which a run's place in its data "
            "belongs: leave it out, and set --data.batch_size"
        )
    if not isinstance(callback, EarlyStopping) or not callback.monitor.startswith("val/"):
        return
    # Lightning has no public name for it once it is built.
    if callback._check_on_train_epoch_end is None:
        callback._check_on_train_epoch_end = False


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
