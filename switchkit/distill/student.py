"""How a student begins: what it takes over from its teacher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from switchkit.convert.measuring import measure
from switchkit.convert.merging import How, feed_forwards_of
from switchkit.experts.shared import Shared
from switchkit.layers import FeedForward, MoELayer, moe_layers
from switchkit.module import LanguageModule

__all__ = ["Inherited", "Init", "inherit", "inherit_experts", "outside"]

Init = Literal["fresh", "non_expert", "mean", "usage", "most_used", "aligned"]


@dataclass(frozen=True)
class Inherited:
    """The student's weights, by where they came from."""

    copied: tuple[str, ...] = ()
    """Those that are the teacher's, bit for bit."""
    merged: tuple[str, ...] = ()
    """Those made of the teacher's experts."""
    fresh: tuple[str, ...] = ()
    """Those drawn anew: of experts and routers, and what the teacher has no like of."""
    reshaped: tuple[str, ...] = ()
    """Of the fresh ones, those that the teacher has in another shape."""

    def __str__(self) -> str:
        told = [f"{len(self.copied)} weights from the teacher"]
        told += [f"{len(self.merged)} made of its experts ({_some(self.merged)})"] if self.merged else []
        told += [f"{len(self.fresh)} fresh ({_some(self.fresh)})"] if self.fresh else []
        told += [f"{len(self.reshaped)} of them of another shape"] if self.reshaped else []
        return ", ".join(told)


@torch.no_grad()
def inherit(student: nn.Module, theirs: Mapping[str, Tensor]) -> Inherited:
    """Copy the teacher's non-expert weights into `student`: all names and shapes that both have outside sparse layers.

    Args:
        student: changed in place.
        theirs: the teacher's, see `outside`.

    Source: arXiv 2101.03961, section 4.2, "initializing with the non-expert weights of the teacher".
    """
    copied, fresh, reshaped = [], [], []
    own = student.state_dict(keep_vars=True)
    ours = outside(student)
    for name, value in own.items():
        if name not in ours or name not in theirs:
            fresh.append(name)
        elif theirs[name].shape != value.shape:
            fresh.append(name)
            reshaped.append(name)
        else:
            value.copy_(theirs[name])
            copied.append(name)
    return Inherited(tuple(copied), (), tuple(fresh), tuple(reshaped))


@torch.no_grad()
def inherit_experts(
    student: nn.Module, teacher: LanguageModule, how: str, batches: Iterable[Mapping[str, Tensor]], so_far: Inherited
) -> Inherited:
    """Fill the student's dense layers that stand where the teacher has mixtures with one expert made of theirs.

    The experts' usage, and what the router multiplies their outputs by on average, are measured on `batches`.

    Args:
        student: changed in place.
        teacher: in evaluation mode.
        how: see `switchkit.convert.merging.expert_of`.
        batches: what the teacher is measured on.
        so_far: what `inherit` did.

    Raises:
        ValueError: another word for `how`, no batch, experts that cannot be merged, layers of another class, width or
            activation.
    """
    if how not in get_args(How):
        raise ValueError(f"init {how!r} makes nothing of experts; those that do are {', '.join(get_args(How))}")
    done: list[str] = []
    for name, weights in feed_forwards_of(teacher, measure(teacher, batches), cast(How, how)).items():
        place = _module(student, name)
        if place is None or isinstance(place, MoELayer):
            continue
        # Not a subclass: what it computes is not known.
        if type(place) is not FeedForward:
            raise ValueError(
                f"init {how!r}: the student's {name} is a {type(place).__name__}, and what is made of experts is a "
                "FeedForward: take init non_expert, or a student with feed_forward FeedForward"
            )
        own = place.state_dict(keep_vars=True)
        theirs = {key: list(value.shape) for key, value in weights.items()}
        if {key: list(value.shape) for key, value in own.items()} != theirs:
            raise ValueError(
                f"init {how!r}: the experts of {name} make a layer with {theirs}, and the student's there has "
                f"{ {key: list(value.shape) for key, value in own.items()} }: take init non_expert, or a student with "
                "layers of the experts' width"
            )
        ours, wanted = place.activation, _activation(teacher.net.get_submodule(name))
        if ours != wanted:
            raise ValueError(
                f"init {how!r}: the experts of {name} have the activation {wanted}, and the student's layer there "
                f"{ours}: take init non_expert, or a student with feed_forward of activation {wanted}"
            )
        for key, value in weights.items():
            own[key].copy_(value)
            done.append(f"{name}.{key}")
    fresh = tuple(name for name in so_far.fresh if name not in done)
    return replace(so_far, merged=tuple(done), fresh=fresh)


def _activation(layer: nn.Module) -> str:
    """Of the experts of a sparse layer."""
    experts = cast(MoELayer, layer).experts
    return str((experts.routed if isinstance(experts, Shared) else experts).activation)


def _module(net: nn.Module, name: str) -> nn.Module | None:
    try:
        return net.get_submodule(name)
    except AttributeError:
        return None


def outside(net: nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights outside sparse layers."""
    sparse = tuple(f"{name}." for name in moe_layers(net))
    return {name: value for name, value in net.state_dict().items() if not name.startswith(sparse)}


def _some(names: tuple[str, ...], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
