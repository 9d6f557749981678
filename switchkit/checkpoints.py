"""Checkpoint files: written whole or not at all, read without running code, found again."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.distributed.tensor import DTensor

from switchkit.files import put, sync_folder
from switchkit.parallel import shards
from switchkit.spec import find_class

__all__ = [
    "FORMAT_VERSION",
    "AtomicCheckpointIO",
    "check_classes",
    "intact",
    "last",
    "read",
    "read_folder",
    "read_settings",
    "write_folder",
]

FORMAT_VERSION = 1
"""Of what switchkit adds to a checkpoint; a file of a later version is refused."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written to a temporary file in the same folder and moved into place.

    A run killed while it saves, or a full disk, leaves the file that was there before. The wait for the disk (fsync)
    and the move happen in a thread while training goes on; the next save, a load and the end of the run wait for them,
    and raise what went wrong there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._settling: Future[None] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or another process, has nothing to wait for and makes a thread of its own.
        return {**self.__dict__, "_settling": None, "_thread": None}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.wait()
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.part")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._thread = self._thread or ThreadPoolExecutor(1, "checkpoint")
        self._settling = self._thread.submit(_settle, temporary, target)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        self.wait()
        return read(path)

    def teardown(self) -> None:
        self.wait()

    def wait(self) -> None:
        """Return when the last checkpoint is in its place.

        Raises:
            OSError: it could not be put there; the file that was there before stays.
        """
        settling, self._settling = self._settling, None
        if settling is not None:
            settling.result()


def _settle(temporary: Path, target: Path) -> None:
    try:
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        put(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a switchkit checkpoint, on the CPU, without running anything that the file says.

    Raises:
        ValueError: no such file, a truncated or damaged one, one that holds more than plain data, one that switchkit
            did not write, or a later switchkit did.
    """
    path = Path(path)
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise ValueError(
            f"there is no checkpoint {path}: give a file, or 'last' for the newest one below the run folder"
        )
    if not intact(path):
        raise ValueError(f"checkpoint {path} ({path.stat().st_size} bytes) is truncated or damaged{_instead(path)}")
    return _ours(path, path)


def _ours(file: Path, path: Path) -> dict[str, Any]:
    """What a file holds, if switchkit wrote it; `path` is the checkpoint that it belongs to."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"checkpoint {path} holds more than plain data and was not loaded: {str(error).splitlines()[0]}"
        ) from error
    ours = content.get("switchkit") if isinstance(content, dict) else None
    if not isinstance(ours, dict) or "state_dict" not in content:
        keys = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"checkpoint {path} was not written by switchkit (it holds {keys})")
    if ours.get("format_version", 0) > FORMAT_VERSION:
        raise ValueError(
            f"checkpoint {path} has format {ours['format_version']} of switchkit {ours.get('version')}; "
            f"this one reads up to {FORMAT_VERSION}: upgrade switchkit"
        )
    return content


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """``{"model": spec, "data": spec or None, "source": ..., "step": n}`` of a checkpoint, every class in it known.

    Beside them `resume`: the description of the module that goes on training, where it is not that of the model.

    Raises:
        ValueError: as `read`, and for a part that is not imported.
    """
    path = Path(path)
    content = read_folder(path, {}) if path.is_dir() else read(path)
    ours = content["switchkit"]
    check_classes(ours["model"], ours.get("data"), ours.get("resume"))
    return {
        "model": ours["model"],
        "data": ours.get("data"),
        "source": ours.get("source"),
        "resume": ours.get("resume"),
        "step": content.get("global_step", 0),
    }


def check_classes(*described: Any) -> None:
    """Raises ValueError for the first class that some descriptions name and that is not imported, or is no part."""
    for part in described:
        for name in _class_paths(part):
            find_class(name)


def intact(path: str | os.PathLike[str]) -> bool:
    """True: the file is a whole archive whose checksums hold, or a folder as its manifest says."""
    if Path(path).is_dir():
        try:
            shards.check(Path(path), alone=True)
        except ValueError:
            return False
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def last(root: str | os.PathLike[str]) -> Path:
    """The newest intact ``last.ckpt`` below a folder, over all runs and versions in it; failing that, any checkpoint.

    Raises:
        ValueError: there is none. Never a silent fresh start.
    """
    found = sorted(Path(root).rglob("*.ckpt"), key=lambda p: (p.name.startswith("last"), p.stat().st_mtime))
    for path in reversed(found):
        if intact(path):
            return path
    broken = f" ({len(found)} damaged)" if found else ""
    raise ValueError(
        f"no checkpoint below {Path(root)}{broken}: start a run without --ckpt_path, "
        "or name another folder with --trainer.default_root_dir"
    )


# Sharded checkpoints: a folder with what all processes know in META, and the tensors that they share out.

META = "meta.pt"


def write_folder(content: dict[str, Any], target: Path) -> None:
    """Write a checkpoint whose tensors are sharded as a folder. Called by all processes with the same path.

    It is written beside its place and moved there when all is on the disk. What was there before stays loadable
    whenever a process is killed: in its place, or for the moment between two renames as ``NAME.previous.ckpt``.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    temporary = target.with_name(f".{target.name}.part")
    if first:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    _wait()
    rest, tensors = _split(content)
    shards.write_tensors(temporary, tensors)
    if first:
        with (temporary / META).open("wb") as file:
            torch.save(rest, file)
            file.flush()
            os.fsync(file.fileno())
    _wait()
    shards.seal(temporary)
    if first:
        sync_folder(temporary)
        put(temporary, target)
    _wait()


def read_folder(path: Path, targets: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """The content of a sharded checkpoint, whatever layout wrote it; nothing is read before its digest was found right.

    Args:
        path: the folder.
        targets: what to fill, by all processes together: parameters as ``model/NAME``, and as ``optimizer/I/NUMBER``
            what its state is shaped like; without a target a tensor is left out. None: whole tensors, read by this
            process alone.

    Raises:
        ValueError: a damaged folder, or one that switchkit did not write.
    """
    alone = not targets
    shards.check(path, alone=alone)
    content = _ours(path / META, path)
    if targets is not None and not targets:
        return content
    filled: dict[str, Tensor] = {}
    for name, (size, dtype) in shards.tensors_in(path).items():
        if targets is None:
            filled[name] = torch.empty(size, dtype=dtype)
            continue
        like = targets.get(name if name.startswith("model/") else name.rpartition("/")[0])
        if like is None and name.startswith("optimizer/"):
            continue
        if like is None or like.shape != size:
            # Of another model: the error that says so comes later, and names all of them.
            filled[name] = torch.empty(size, dtype=dtype)
        elif name.startswith("model/") and like.dtype == dtype:
            filled[name] = like
        else:
            filled[name] = torch.empty_like(like, dtype=dtype)
    shards.read_tensors(path, filled, alone=alone)
    return _join(content, filled)


def _split(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint without its sharded tensors, None in their places; and these, by path."""
    tensors: dict[str, Tensor] = {}

    def take(value: Any, name: str) -> Any:
        if isinstance(value, DTensor):
            tensors[name] = value
            return None
        return value

    rest = dict(content)
    rest["state_dict"] = {name: take(value, f"model/{name}") for name, value in content["state_dict"].items()}
    rest["optimizer_states"] = [
        {
            **optimizer,
            "state": {
                number: {name: take(value, f"optimizer/{i}/{number}/{name}") for name, value in entries.items()}
                for number, entries in optimizer["state"].items()
            },
        }
        for i, optimizer in enumerate(content.get("optimizer_states", []))
    ]
    return rest, tensors


def _join(content: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The reverse of `_split`, in place."""
    for path, tensor in tensors.items():
        kind, _, name = path.partition("/")
        if kind == "model":
            content["state_dict"][name] = tensor
        else:
            index, number, entry = name.split("/", 2)
            content["optimizer_states"][int(index)]["state"][int(number)][entry] = tensor
    return content


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def _instead(path: Path) -> str:
    others = [p for p in path.parent.rglob("*.ckpt") if p != path and intact(p)]
    return f"; the newest intact one beside it is {max(others, key=lambda p: p.stat().st_mtime)}" if others else ""


def _class_paths(spec: Any) -> Iterator[str]:
    if isinstance(spec, dict):
        if "class_path" in spec:
            yield spec["class_path"]
        spec = list(spec.values())
    if isinstance(spec, list):
        for item in spec:
            yield from _class_paths(item)
