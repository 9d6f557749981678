"""Numbers that Lightning takes without a look and trips over later."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from switchkit.cli.errors import UserError

__all__ = ["check_ranges", "check_run", "is_zero"]

SEEDS = 2**32
_Fits = Callable[[Any], bool]
_TRAINER: dict[str, tuple[_Fits, str]] = {
    "accumulate_grad_batches": (lambda x: x >= 1, "a number of batches from 1"),
    "log_every_n_steps": (lambda x: x >= 0, "a number of steps from 1, or 0 for no rows of train/*"),
    "check_val_every_n_epoch": (lambda x: x >= 1, "a number of epochs from 1, or null"),
    "val_check_interval": (lambda x: x > 0, "a number of batches from 1, or a share of them above 0"),
    "gradient_clip_val": (lambda x: x >= 0, "a number from 0, or null"),
    "num_sanity_val_steps": (lambda x: x >= -1, "a number of batches from 0, or -1 for all"),
    "num_nodes": (lambda x: x >= 1, "a number of machines from 1"),
}


def check_ranges(tree: Mapping[str, Any]) -> None:
    """Refuse settings of the trainer, or a seed, outside what works.

    Raises:
        UserError: one is; it names the key, the value and what is accepted.
    """
    seed = tree.get("seed_everything")
    if _number(seed) and not 0 <= seed < SEEDS:
        raise UserError(f"seed_everything {seed}: expected an integer from 0 to {SEEDS - 1}")
    trainer = tree.get("trainer") or {}
    for name, (fits, accepted) in _TRAINER.items():
        value = _read(trainer.get(name))
        if _number(value) and not fits(value):
            raise UserError(f"trainer.{name} {value:g}: expected {accepted}")
    least, most = trainer.get("min_steps"), trainer.get("max_steps")
    if _number(least) and _number(most) and 0 <= most < least:
        raise UserError(f"trainer.min_steps {least}: expected at most trainer.max_steps, which is {most}")
    devices = trainer.get("devices")
    wrong = isinstance(devices, str) and not re.fullmatch(r"auto|-1|\d+(\s*,\s*\d+)*,?", devices.strip())
    if wrong or (_number(devices) and devices != -1 and devices < 1):
        raise UserError(f"trainer.devices {devices}: expected a number from 1, -1 for all, auto, or a list of indices")
    root = trainer.get("default_root_dir")
    if isinstance(root, str) and Path(root).expanduser().is_file():
        raise UserError(f"trainer.default_root_dir {root}: this is a file; give a folder")


def check_run(tree: Mapping[str, Any], command: str) -> None:
    """Refuse a run that would read nothing, or has no place to write to.

    Raises:
        UserError: it names the key, the value and what is accepted.
    """
    trainer = tree.get("trainer") or {}
    if trainer.get("fast_dev_run"):
        return  # which has limits of its own, and writes nothing
    own = {"validate": "limit_val_batches", "test": "limit_test_batches", "predict": "limit_predict_batches"}
    limit = own.get(command, "limit_train_batches")
    steps = trainer.get("max_steps")
    if is_zero(trainer.get(limit)) and steps != 0:
        raise UserError(f"trainer.{limit} 0: {command} would read nothing: leave it out, or give a number above 0")
    root = trainer.get("default_root_dir", "runs")
    if isinstance(root, str) and "://" not in root:
        there = next(path for path in (Path(root).absolute() / "_").parents if path.exists())
        if not there.is_dir():
            raise UserError(f"trainer.default_root_dir {root}: {there} is a file, and no folder: give another")
        if not os.access(there, os.W_OK):
            raise UserError(f"trainer.default_root_dir {root}: the folder {there} cannot be written in; give another")


def is_zero(value: Any) -> bool:
    """Whether a setting is the number 0, a word of the command line included."""
    read = _read(value)
    return _number(read) and read == 0


def _read(value: Any) -> Any:
    """A number that the command line left a word, where words are accepted too."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
