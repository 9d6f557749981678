"""Sharded checkpoints: a folder with what all processes know in META, and the tensors that they share out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from switchkit.checkpoints.content import content_of
from switchkit.files import put, sync_folder, writes
from switchkit.parallel import shards

__all__ = ["outline", "read_folder", "read_tensor", "write_folder"]

META = "meta.pt"


def write_folder(content: dict[str, Any], target: Path) -> None:
    """Write a checkpoint whose tensors are sharded as a folder. Called by all processes with the same path.

    It is written beside its place and moved there when all is on the disk. What was there before stays loadable
    whenever a process is killed: in its place, or for the moment between two renames as ``NAME.previous.ckpt``.

    Raises:
        OSError: it cannot be written.
    """
    with writes(target):
        _write(content, target)


def _write(content: dict[str, Any], target: Path) -> None:
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


def read_folder(path: Path, targets: Mapping[str, Tensor] | None = None, *, ours: bool = True) -> dict[str, Any]:
    """The content of a sharded checkpoint, whatever layout wrote it; nothing is read before its digest was found right.

    Args:
        path: the folder.
        targets: what to fill, by all processes together: parameters as ``model/NAME``, and as ``optimizer/I/NUMBER``
            what its state is shaped like; without a target a tensor is left out. None: whole tensors, read by this
            process alone.
        ours: only one that a `LanguageModule` wrote.

    Raises:
        ValueError: a damaged folder, or one that switchkit did not write.
    """
    alone = not targets
    shards.check(path, alone=alone)
    content = content_of(path / META, path, ours=ours)
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


def outline(path: Path) -> dict[str, Any]:
    """The content of a sharded checkpoint without its optimizers, its model's sharded tensors as shapes ("meta").

    Raises:
        ValueError: a damaged folder, or one that switchkit did not write.
    """
    content = read_folder(path, {})
    content.pop("optimizer_states", None)
    for name, (size, dtype) in shards.tensors_in(path).items():
        if name.startswith("model/"):
            content["state_dict"][name.removeprefix("model/")] = torch.empty(size, dtype=dtype, device="meta")
    return content


def read_tensor(path: Path, name: str) -> Tensor:
    """One sharded tensor of the model, whole, of a folder that `outline` found right."""
    size, dtype = shards.tensors_in(path)[f"model/{name}"]
    tensor = torch.empty(size, dtype=dtype)
    shards.read_tensors(path, {f"model/{name}": tensor}, alone=True)
    return tensor


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
    if "optimizer_states" in content:  # not with weights alone
        rest["optimizer_states"] = [
            {
                **optimizer,
                "state": {
                    number: {name: take(value, f"optimizer/{i}/{number}/{name}") for name, value in entries.items()}
                    for number, entries in optimizer["state"].items()
                },
            }
            for i, optimizer in enumerate(content["optimizer_states"])
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
