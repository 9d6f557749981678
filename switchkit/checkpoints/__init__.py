"""Checkpoint files: written whole or not at all, read without running code, found again."""

from switchkit.checkpoints.content import FORMAT_VERSION, check_classes, check_ours, check_weights
from switchkit.checkpoints.folder import outline, read_folder, read_tensor, write_folder
from switchkit.checkpoints.reading import callback_state, intact, last, read, read_settings
from switchkit.checkpoints.writing import AtomicCheckpointIO, settling_later

__all__ = [
    "FORMAT_VERSION",
    "AtomicCheckpointIO",
    "callback_state",
    "check_classes",
    "check_ours",
    "check_weights",
    "intact",
    "last",
    "outline",
    "read",
    "read_folder",
    "read_settings",
    "settling_later",
    "read_tensor",
    "write_folder",
]
