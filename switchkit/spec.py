"""Parts as plain data, and back: what lets a checkpoint rebuild its model from itself.

`describe` turns a class, a `functools.partial` of one, or an object whose constructor arguments are attributes into
``{"class_path": ..., "init_args": {...}}``; `build` turns that into a factory again, and imports nothing to do so.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import PurePath
from typing import Any

import lightning as L
import torch
from torch import nn

from switchkit.capacity.base import CapacityPolicy
from switchkit.data.base import ResumableData
from switchkit.data.objectives import Objective
from switchkit.data.tokenizers import Tokenizer
from switchkit.dispatch.base import Dispatcher
from switchkit.losses.base import Loss
from switchkit.registry import full_path, resolve

__all__ = ["OnMeta", "build", "describe", "describe_object", "described_data", "find_class"]

# What a file may name. Anything else that is imported (subprocess.Popen, say) stays out of its reach.
ALLOWED = (
    nn.Module,
    CapacityPolicy,
    Loss,
    Dispatcher,
    Tokenizer,
    Objective,
    torch.optim.Optimizer,
    L.LightningDataModule,
)


def describe(value: Any, where: str = "value") -> Any:
    """`value` as plain data: numbers, text, lists, mappings, and parts by their import path.

    Raises:
        ValueError: something that could not be rebuilt: a lambda, a local class or function, an object without a
            description. `where` names it.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): describe(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Tokenizer):
        return describe_object(value)
    keywords: Mapping[str, Any] = {}
    if isinstance(value, partial):
        keywords = value.keywords
        # jsonargparse wraps the class of a factory once more: it is the last positional argument.
        wrapped = value.func.__module__.startswith("jsonargparse")
        if value.args and not wrapped:
            raise ValueError(f"{where}: give the arguments of {value.func.__name__} by name, not by position")
        value = value.args[-1] if wrapped else value.func
    if not isinstance(value, type) or "<locals>" in value.__qualname__:
        raise ValueError(
            f"{where}: {value!r} cannot be written into a checkpoint; "
            "give a class defined at the top of a module, or a functools.partial of one"
        )
    return {"class_path": full_path(value), "init_args": describe(keywords, where)}


def describe_object(value: Any) -> dict[str, Any]:
    """An object whose constructor's arguments are attributes of the same names, or in Lightning's `hparams`; those that
    are neither are left out."""
    given, _ = _arguments(value)
    return {"class_path": full_path(type(value)), "init_args": {n: describe(v, n) for n, v in given.items()}}


def described_data(data: L.LightningDataModule) -> dict[str, Any] | None:
    """`describe_object` of a data module; None for one that keeps an argument to itself, and for one of somebody
    else's that was made with what is no plain data.

    Raises:
        ValueError: one of switchkit's kind was.
    """
    if _arguments(data)[1]:
        return None  # with defaults in place of what nobody knows, it would be other data
    try:
        return describe_object(data)
    except ValueError:
        if isinstance(data, ResumableData):
            raise
        return None


def _arguments(value: Any) -> tuple[dict[str, Any], list[str]]:
    """What an object's constructor was given, as far as the object says so, and the names of the rest."""
    kept = {name: item for name, item in getattr(value, "hparams", {}).items() if not name.startswith("_")}
    known: dict[str, Any] = {}
    unknown: list[str] = []
    constructor = type(value).__init__
    if constructor is L.LightningDataModule.__init__:
        return known, unknown
    for name, parameter in list(inspect.signature(constructor).parameters.items())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD and kept:
            known |= {other: item for other, item in kept.items() if other not in known}
        elif hasattr(value, name):
            known[name] = getattr(value, name)
        elif name in kept:
            known[name] = kept[name]
        else:
            unknown.append(name)
    return known, unknown


def build(spec: Any) -> Any:
    """The inverse of `describe`; every part becomes a factory, its parts too.

    Raises:
        ValueError: a part that is neither registered nor imported, or that a file may not name.
    """
    if isinstance(spec, Mapping) and "class_path" in spec:
        cls = find_class(spec["class_path"])
        if issubclass(cls, Tokenizer) and (spec.get("init_args") or {}).get("path") is not None:
            raise ValueError(f"{spec['class_path']} names a file: a checkpoint holds its vocabulary itself")
        return partial(cls, **{key: build(value) for key, value in (spec.get("init_args") or {}).items()})
    if isinstance(spec, Mapping):
        return {key: build(value) for key, value in spec.items()}
    return [build(item) for item in spec] if isinstance(spec, list) else spec


class OnMeta(partial[nn.Module]):
    """A factory whose model has shapes, but no memory yet."""

    def __call__(self, /, *args: Any, **keywords: Any) -> nn.Module:
        with torch.device("meta"):
            return super().__call__(*args, **keywords)


def find_class(path: str) -> type:
    """The class of an import path, if it is registered or imported already.

    Raises:
        ValueError: it is not, or it is no part, model, data module or optimizer.
    """
    # What is built in is always there; this imports nothing that the file chose.
    importlib.import_module("switchkit.distill")
    cls = resolve(path)
    if cls is None:
        module = path.rpartition(".")[0] or path
        missing = "has no such class" if module in sys.modules else "is not imported"
        raise ValueError(
            f"{path} is needed, but {module} {missing}, and a checkpoint never imports: "
            f"import it first, on the command line by --plugins {module}"
        )
    if not issubclass(cls, ALLOWED):
        raise ValueError(f"{path} is not a part of a model: a checkpoint may not name it")
    return cls
