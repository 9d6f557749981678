"""What a teacher brings to a run that distils: its data and its vocabulary, before anything else is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from switchkit.cli.checkpoint import checkpoint_path, read_checkpoint, root_dir
from switchkit.cli.errors import UserError
from switchkit.cli.normalise import target_of
from switchkit.cli.sources import Source

__all__ = ["distils", "teacher_of", "teacher_settings"]

HOW = (
    "Train one: switchkit fit --config tiny_shakespeare --trainer.default_root_dir teacher. Then distil it: "
    "switchkit fit --config distill --model.teacher teacher/version_0/checkpoints/best.ckpt"
)


def distils(tree: Mapping[str, Any]) -> bool:
    """Whether the model of some settings learns from a teacher."""
    from switchkit.distill import DistillModule

    model = tree.get("model")
    target = target_of(model) if model else None
    return isinstance(target, type) and issubclass(target, DistillModule)


def teacher_of(tree: Mapping[str, Any], sources: Sequence[Source]) -> Path:
    """The teacher that the settings name.

    Raises:
        UserError: none, or one that is not there.
    """
    given = (tree["model"].get("init_args") or {}).get("teacher")
    if given in (None, "null", ""):
        raise UserError(f"model.teacher: a run that distils needs a teacher, and none was given. {HOW}")
    try:
        return checkpoint_path(str(given), root_dir(sources), "model.teacher")
    except UserError as error:
        raise UserError(f"{error}. The run learns from it; if it was moved, say where to") from error


def teacher_settings(path: Path) -> tuple[Source, Any]:
    """The data of the teacher's checkpoint, or of the folder that holds its words, and its tokenizer."""
    from switchkit.distill.stored import StoredIndex, is_stored

    if is_stored(path):
        index = StoredIndex.read(path)
        return Source({"data": dict(index.data)}, str(path)), (index.model.get("init_args") or {}).get("tokenizer")
    found, tokenizer = read_checkpoint(path)
    data = found.values.get("data")
    return Source({"data": data} if data else {}, found.label), tokenizer
