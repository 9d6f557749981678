"""What ``--ckpt_path`` means: which file, and which settings it brings along."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from switchkit.cli.errors import UserError, near, short
from switchkit.cli.sources import Source

__all__ = ["checkpoint_path", "given_checkpoint", "missing_told", "read_checkpoint", "root_dir"]


def given_checkpoint(sources: Sequence[Source], option: str = "ckpt_path") -> Path | None:
    """The checkpoint that the last source to say so names."""
    given = [source.values[option] for source in sources if option in source.values]
    return None if not given or given[-1] in (None, "null") else checkpoint_path(given[-1], root_dir(sources), option)


def checkpoint_path(given: Any, root: str, option: str = "ckpt_path") -> Path:
    """The file that ``--ckpt_path`` means; ``last`` is the newest intact one below the run folder.

    An empty `option` is an argument without a name.
    """
    flag = f"--{option} " if option else ""
    if not isinstance(given, str) or not given.strip():
        raise UserError(f"{flag.strip() or 'checkpoint'}: expected a path or 'last', got {short(given)}")
    if given == "last":
        from switchkit import checkpoints

        return Path(checkpoints.last(Path(root).expanduser()))
    if "://" in given:
        raise UserError(f"{flag}{given}: download the checkpoint first; only local files are loaded")
    path = Path(given).expanduser()
    if not path.exists():
        folder = path.parent if path.parent.is_dir() else None
        known = [str(other) for other in folder.glob("*.ckpt")] if folder else []
        raise UserError(
            f"{flag}{given}: there is no such file{near(given, known)} Give {flag}last for the newest below {root}"
        )
    return path


def read_checkpoint(path: Path, *, resume: bool = False) -> tuple[Source, Any]:
    """The settings of model and data that a checkpoint holds, and its tokenizer's.

    The tokenizer is set apart: it belongs to the data, from which the model gets it. With `resume` the model is what
    trained it, where that is more than what it became (a student that still has a teacher).

    Raises:
        ValueError: no checkpoint of ours, or a class in it is not imported (a checkpoint never causes an import).
    """
    from switchkit import checkpoints

    settings = checkpoints.read_settings(path)
    model, tokenizer = (resume and settings.get("resume")) or settings.get("model"), None
    if model:
        arguments = dict(model.get("init_args") or {})
        tokenizer = arguments.pop("tokenizer", None)
        model = {**model, "init_args": arguments}
    values = {"model": model, "data": settings.get("data")}
    return Source({key: value for key, value in values.items() if value}, str(path)), tokenizer


@contextmanager
def missing_told(path: str | None) -> Iterator[None]:
    """Where data are missing that the checkpoint at `path` names, it is told: they are sought from another folder.

    Raises:
        UserError: so it is.
    """
    from switchkit.data.published import DataError

    try:
        yield
    except DataError as error:
        if path is None or "does not exist" not in str(error):
            raise
        kept, _ = read_checkpoint(Path(path))
        values = (kept.values.get("data") or {}).get("init_args", {}).values()
        names = [name for value in values for name in (value if isinstance(value, list) else [value])]
        if not any(isinstance(name, str) and repr(name) in str(error) for name in names):
            raise
        raise UserError(
            f"{error}. The checkpoint {path} has it by this name: run in the folder that it was trained in, or give "
            "the option anew, such as --data.path"
        ) from error


def root_dir(sources: Sequence[Source]) -> str:
    """The folder below which the runs lie."""
    found = "runs"
    for source in sources:
        trainer = source.values.get("trainer")
        if isinstance(trainer, Mapping) and trainer.get("default_root_dir"):
            found = str(trainer["default_root_dir"])
    return found
