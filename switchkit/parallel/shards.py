"""Sharded tensors in a folder: written by all processes together, read by any number of them.

``torch.distributed.checkpoint`` plans who writes and reads what. Its index is a pickle, which runs what it says; here
the index is ``tensors.json``, and ``manifest.json`` holds the SHA-256 of every file. Nothing is read before its digest
was found right, and nothing is unpickled but tensors (``weights_only=True``).
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

__all__ = ["check", "read_tensors", "seal", "tensors_in", "write_tensors"]

INDEX, MANIFEST = "tensors.json", "manifest.json"
FORMAT = 1


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, sharded or the same on all processes, into an empty folder. Called by all processes.

    Raises:
        OSError: one of them cannot write its part.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _quiet():
            save(dict(tensors), storage_writer=_Writer(folder), planner=planner, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        failed = (failure[0] for failure in error.failures.values())
        cause = next((one for one in failed if isinstance(one, OSError)), None)
        raise (error if cause is None else cause) from None


def read_tensors(folder: Path, targets: Mapping[str, Tensor], *, alone: bool) -> None:
    """Fill `targets` from a folder that was checked. `alone`: by this process; else all call it, each for its parts.

    Raises:
        ValueError: tensors that are not there, or of another shape, or files that hold something else.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _quiet():
            load(dict(targets), storage_reader=_Reader(folder), planner=planner, no_dist=alone)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        first = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise ValueError(f"the tensors of checkpoint {folder} cannot be read: {first}") from error


def tensors_in(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shapes and dtypes of the tensors in a folder that was checked."""
    table = json.loads((folder / INDEX).read_text(encoding="utf-8"))["tensors"]
    return {name: (torch.Size(entry["size"]), _dtype(entry["dtype"])) for name, entry in table.items()}


def seal(folder: Path) -> None:
    """Write the manifest over all files of the folder; it comes last. Called by all processes, each reads some."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    found: dict[str, Any] = {}
    for part in _gathered({name: _digest(folder / name) for name in _own(names)}):
        found |= part
    if not dist.is_initialized() or dist.get_rank() == 0:
        text = json.dumps({"format": FORMAT, "files": dict(sorted(found.items()))}, indent=1)
        with (folder / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def check(folder: Path, *, alone: bool) -> None:
    """Hold every file to the manifest. `alone`: by this process; else all call it and find the same.

    Raises:
        ValueError: a folder without our manifest, of a later format, a missing or changed file; names the first.
    """
    if not (folder / MANIFEST).exists() and not (folder / INDEX).exists():
        inside = sorted(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
        hint = f"; the newest below it is {inside[-1]}" if inside else ""
        raise ValueError(
            f"{folder} is a folder and no whole checkpoint of switchkit: its {MANIFEST} is missing. Give the .ckpt "
            f"file of a run{hint}"
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
        version = int(manifest["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is no whole checkpoint of switchkit: its {MANIFEST} is missing or damaged ({error})"
        ) from None
    if version > FORMAT:
        raise ValueError(f"checkpoint {folder} has format {version}; this one reads up to {FORMAT}: upgrade switchkit")
    wrong = []
    for name in sorted(files) if alone else _own(sorted(files)):
        path = folder / name
        if path.name != name or not path.is_file() or path.is_symlink():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != files[name]["bytes"]:
            wrong.append(f"{name} has {path.stat().st_size} bytes, not {files[name]['bytes']}")
        elif _digest(path) != files[name]:
            wrong.append(f"{name} was changed (its SHA-256 is another)")
    every = wrong if alone else [line for part in _gathered(wrong) for line in part]
    if not every:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        every = [f"{p['file']} is not in the manifest" for p in index["places"] if p["file"] not in files]
    if every:
        raise ValueError(f"checkpoint {folder} is damaged: {every[0]}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's word that one process works alone, which is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


class _Writer(FileSystemWriter):
    """DCP's files with an index that is data."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, overwrite=False)

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            tensors[name] = {
                "dtype": str(entry.properties.dtype).removeprefix("torch."),
                "size": list(entry.size),
                "chunks": [{"offset": list(c.offsets), "size": list(c.sizes)} for c in entry.chunks],
            }
        places = [
            {
                "name": result.index.fqn,
                "offset": None if result.index.offset is None else list(result.index.offset),
                "file": result.storage_data.relative_path,
                "start": result.storage_data.offset,
                "length": result.storage_data.length,
            }
            for part in results
            for result in part
        ]
        text = json.dumps({"tensors": tensors, "places": places})
        with (Path(self.path) / INDEX).open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


class _Reader(FileSystemReader):
    """Reads what `_Writer` wrote."""

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        index = json.loads((Path(self.path) / INDEX).read_text(encoding="utf-8"))
        table: dict[str, Any] = {}
        for name, entry in index["tensors"].items():
            chunks = [
                ChunkStorageMetadata(torch.Size(chunk["offset"]), torch.Size(chunk["size"]))
                for chunk in entry["chunks"]
            ]
            properties = TensorProperties(dtype=_dtype(entry["dtype"]))
            table[name] = TensorStorageMetadata(properties, torch.Size(entry["size"]), chunks)
        places = {}
        for place in index["places"]:
            offset = None if place["offset"] is None else torch.Size(place["offset"])
            key = MetadataIndex(place["name"], offset)
            places[key] = _StorageInfo(place["file"], int(place["start"]), int(place["length"]))
        meta = StorageMeta(load_id=self.load_id)
        return Metadata(state_dict_metadata=table, storage_data=places, storage_meta=meta)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} in {INDEX} is no dtype of torch")
    return found


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _own(names: list[str]) -> list[str]:
    """The share of this process."""
    return names[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else names


def _gathered(own: Any) -> list[Any]:
    if not dist.is_initialized():
        return [own]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return every
