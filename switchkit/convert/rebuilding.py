"""A module like another, with other arguments here and there."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

from switchkit.models import Decoder, EncoderDecoder
from switchkit.module import LanguageModule
from switchkit.registry import full_path
from switchkit.spec import OnMeta, build

__all__ = ["net_arguments", "rebuilt"]


def net_arguments(module: LanguageModule) -> dict[str, Any]:
    """The arguments that the module's net was built with, as its checkpoint describes them.

    Raises:
        ValueError: a net whose arguments are not known here.
    """
    if type(module.net) not in (Decoder, EncoderDecoder):
        raise ValueError(f"only a Decoder or an EncoderDecoder can be converted; got a {type(module.net).__name__}")
    described = module.spec["init_args"]["net"] or {}
    return dict(described.get("init_args") or {})


def rebuilt(module: LanguageModule, net: Mapping[str, Any], **arguments: Any) -> LanguageModule:
    """The module with these arguments of its net, and `arguments` in place of its own; its net has no memory yet.

    Everything is given as plain data, see `switchkit.spec.describe`.

    Raises:
        ValueError: arguments that make no model.
    """
    spec = copy.deepcopy(module.spec)
    described = {"class_path": full_path(type(module.net)), "init_args": dict(net)}
    spec["init_args"] |= {"net": described, **arguments}
    factory = build(spec)
    bare = factory.keywords["net"]
    made: LanguageModule = partial(factory, net=OnMeta(bare.func, **bare.keywords))()
    made.hugging_face = copy.deepcopy(module.hugging_face)
    return made
