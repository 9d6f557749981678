"""The routing of published systems, ready to use: ``preset("mixtral", d_model=64, d_ff=256, num_experts=8)``.

Each is a fragment, ``recipes/routing/NAME.yaml``, which says where the system comes from and what it chooses where
systems differ. A command line takes the same fragment over any recipe, ``--config tiny_shakespeare --config
routing/mixtral``.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L

from switchkit.checks import at_least
from switchkit.cli.errors import near
from switchkit.cli.normalise import target_of
from switchkit.cli.recipes import load_yaml, recipes
from switchkit.cli.settings import merge_all
from switchkit.cli.sources import Source
from switchkit.layers import MoELayer
from switchkit.losses.base import LossFactory
from switchkit.routing.gshard import GShard
from switchkit.routing.token_choice import Switch
from switchkit.spec import build

__all__ = ["Parts", "preset", "preset_parts", "presets"]

FOLDER = "routing/"


@dataclass(frozen=True)
class Parts:
    """What one published system puts around its experts."""

    moe: partial[MoELayer]
    """Builds a sparse layer, called with `d_model=, d_ff=, num_experts=`; keywords given to it replace a part."""
    losses: list[LossFactory]
    """Build the terms of the loss, as `LanguageModule` takes them."""
    callbacks: list[Callable[[], L.Callback]]
    """Build the callbacks that the routing needs, for a `Trainer`."""


def presets() -> list[str]:
    """The names that `preset` knows."""
    return [name.removeprefix(FOLDER) for name in recipes() if name.startswith(FOLDER) and name.count("/") == 1]


def preset(name: str, *, d_model: int, d_ff: int, num_experts: int, as_published: bool = False) -> MoELayer:
    """One sparse layer as a published system has it.

    `d_ff` is the hidden width of one routed expert. Where `num_experts` is too small for the k or the groups of the
    original, the nearest ones that fit are taken, with one warning. Faults of the original are mended;
    `as_published` restores those that its fragment names.

    Raises:
        ValueError: an unknown name, sizes below 1.
    """
    moe, changed = _fit(preset_parts(name, as_published=as_published).moe, num_experts)
    if changed:
        was = ", ".join(f"{option}={old}" for option, (old, _) in changed.items())
        now = ", ".join(f"{option}={new}" for option, (_, new) in changed.items())
        warnings.warn(
            f"preset {name!r} has {was}, which does not fit num_experts={num_experts}: took {now}",
            UserWarning,
            stacklevel=2,
        )
    return moe(d_model=d_model, d_ff=d_ff, num_experts=num_experts)


def preset_parts(name: str, *, as_published: bool = False) -> Parts:
    """The sparse layer, losses and callbacks of a published system, as factories.

    Raises:
        ValueError: an unknown name.
    """
    if name not in presets():
        raise ValueError(f"unknown preset {name!r}{near(name, presets())} Presets: {', '.join(presets())}")
    # What a fragment may name without its path.
    for module in ("callbacks", "module"):
        importlib.import_module(f"switchkit.{module}")
    known = recipes()
    sources = [Source({"model": {"class_path": "LanguageModule"}})]
    for recipe in [FOLDER + name, f"{FOLDER}as_published/{name}"][: 1 + as_published]:
        if recipe in known:
            sources.append(Source(load_yaml(known[recipe].read_text("utf-8")), recipe))
    tree = merge_all(sources, "fit")
    model = tree["model"]["init_args"]
    callbacks = (tree.get("trainer") or {}).get("callbacks") or []
    return Parts(
        moe=build(model["moe"]),
        losses=build(model["losses"]),
        callbacks=[partial(target_of(spec), **(spec.get("init_args") or {})) for spec in callbacks],
    )


def _fit(moe: partial[MoELayer], num_experts: int) -> tuple[partial[MoELayer], dict[str, tuple[Any, Any]]]:
    """`moe` with a router that `num_experts` allow, and what was changed for it: option, old and new value."""
    at_least(1, num_experts=num_experts)
    router: partial[Any] = moe.keywords["router"]
    if router.func is GShard and num_experts < 2:
        return partial(moe, router=partial(Switch, init_std=router.keywords.get("init_std"))), {"k": (2, 1)}
    given = router.keywords
    fitted = dict(given)
    k = given.get("k", 1)
    if k > num_experts:
        fitted["k"] = num_experts
        if num_experts == 1:
            # Weights of a single expert are 1 whatever divides them.
            fitted.pop("normalize", None)
            fitted.pop("softmax", None)
    if "groups" in given:
        fitted |= _nearest_groups(given, fitted["k"], num_experts)
    changed: dict[str, tuple[Any, Any]] = {
        option: (given[option], fitted[option])
        for option in ("k", "groups", "top_groups")
        if option in given and fitted[option] != given[option]
    }
    return partial(moe, router=partial(router.func, **fitted)) if changed else moe, changed


def _nearest_groups(given: Mapping[str, Any], k: int, num_experts: int) -> dict[str, int]:
    """Groups that divide the experts, and as large a part of them as hold k experts; both near the original's."""
    groups, top = given["groups"], given["top_groups"]
    fit = [
        (g, t)
        for g in range(1, num_experts + 1)
        if num_experts % g == 0
        for t in range(1, g + 1)
        if num_experts // g * t >= k
    ]
    nearest = min(fit, key=lambda pair: (abs(pair[0] - groups), abs(pair[1] / pair[0] - top / groups)))
    return dict(zip(("groups", "top_groups"), nearest, strict=True))
