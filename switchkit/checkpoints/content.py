"""What a checkpoint holds, read without running anything that it says."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchkit.spec import find_class

__all__ = ["FORMAT_VERSION", "check_classes", "check_ours", "check_weights", "content_of"]

FORMAT_VERSION = 1
"""Of what switchkit adds to a checkpoint; a file of a later version is refused."""


def content_of(file: Path, path: Path, *, ours: bool = True) -> dict[str, Any]:
    """What a file holds; `path` is the checkpoint that it belongs to.

    Raises:
        ValueError: more than plain data; with `ours`, what no `LanguageModule` wrote.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        # torch's own advice is to load it all the same.
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"an object of {found[1]}" if found else "what torch.load refuses"
        raise ValueError(
            f"checkpoint {path} holds more than plain data and was not loaded: {what}, which could run anything. "
            "switchkit writes tensors, numbers and text alone"
        ) from error
    if ours:
        check_ours(content, f"checkpoint {path}")
    return content


def check_ours(content: Any, told: str = "this checkpoint") -> None:
    """Raises ValueError where a `LanguageModule` did not write what a checkpoint holds, or a later one did."""
    ours = content.get("switchkit") if isinstance(content, dict) else None
    if not isinstance(ours, dict) or "state_dict" not in content:
        keys = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{told} was not written by switchkit (it holds {keys})")
    model = ours.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("class_path"), str):
        raise ValueError(f"{told} does not say which model it holds: it was changed after it was written")
    if ours.get("format_version", 0) > FORMAT_VERSION:
        raise ValueError(
            f"{told} has format {ours['format_version']} of switchkit {ours.get('version')}; "
            f"this one reads up to {FORMAT_VERSION}: upgrade switchkit"
        )


def check_classes(*described: Any) -> None:
    """Raises ValueError for the first class that some descriptions name and that is not imported, or is no part."""
    for part in described:
        for name in _class_paths(part):
            find_class(name)


def check_weights(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises ValueError where weights of a checkpoint are not those that a model has by name and shape."""
    shared = [(name, list(given[name].shape), list(own[name].shape)) for name in own if name in given]
    kinds = {
        "missing": sorted(own.keys() - given.keys()),
        "unexpected": sorted(given.keys() - own.keys()),
        "of another shape": [f"{name} {theirs} for {ours}" for name, theirs, ours in shared if theirs != ours],
    }
    found = [f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in kinds.items() if names]
    if found:
        raise ValueError(f"these weights belong to another model: {'; '.join(found)}")


def _class_paths(spec: Any) -> Iterator[str]:
    if isinstance(spec, dict):
        if "class_path" in spec:
            yield spec["class_path"]
        spec = list(spec.values())
    if isinstance(spec, list):
        for item in spec:
            yield from _class_paths(item)
