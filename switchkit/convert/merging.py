"""One expert made of several, and a dense layer made of a sparse one."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from switchkit.checks import one_of
from switchkit.convert.measuring import Measured
from switchkit.experts.feed_forward import GatedMlp, Mlp
from switchkit.experts.shared import Shared
from switchkit.layers import MoELayer, moe_layers
from switchkit.module import LanguageModule

__all__ = [
    "How",
    "align",
    "expert_of",
    "feed_forward_of",
    "feed_forwards_of",
    "stack_for_dense",
    "stack_of",
]

How = Literal["mean", "usage", "most_used", "aligned"]
Weights = Mapping[str, Tensor]
"""``w1`` [..., D, H], ``w2`` [..., F, D], and with biases ``b1`` [..., H], ``b2`` [..., D]; H is F, or 2F where gated
(gate first). Of one expert without, of a stack with E in front."""


def stack_of(experts: nn.Module) -> dict[str, Tensor]:
    """The stacked weights of `mlp` or `gated_mlp` experts, or of the routed ones of `shared`, by their names there.

    Raises:
        ValueError: experts of another kind, which do not all compute the same function of their weights.
    """
    routed = experts.routed if isinstance(experts, Shared) else experts
    # Not a subclass: what it computes is not known.
    if type(routed) not in (Mlp, GatedMlp):
        raise ValueError(
            f"experts of the kind {type(routed).__name__} cannot be taken apart: their weights are no stack of equal "
            "feed-forward experts. That is possible with mlp, gated_mlp, and shared over these"
        )
    return {name: weight.detach() for name, weight in routed.named_parameters()}


def stack_for_dense(experts: nn.Module) -> dict[str, Tensor]:
    """`stack_of` experts that a dense `FeedForward` can express, the mixture of whose copies it is.

    Raises:
        ValueError: another kind, biases, shared experts mixed by a gate.
    """
    stack = stack_of(experts)
    if "b1" in stack:
        raise ValueError("these experts have biases, and a dense FeedForward has none: it cannot express them")
    if isinstance(experts, Shared) and experts.how != "sum":
        raise ValueError(
            f"shared experts with mix={experts.how!r} are weighted by each token, which a dense FeedForward cannot "
            "express; mix 'sum' can be merged"
        )
    return stack


def align(reference: Weights, experts: Weights) -> dict[str, Tensor]:
    """The same experts, the hidden units of each reordered to be most like those of `reference`, one expert.

    Hidden units can change places without a change in what an expert computes, so that a mean of two experts is a mean
    of unrelated units until they are matched. The order maximises the sum over units of the inner product of all
    weights into and out of a unit, which minimises the squared distance to the reference; it is exact, by an
    assignment that SciPy solves in a time that grows with the cube of F.

    Raises:
        ImportError: SciPy is not installed.
        ValueError: experts of another shape than the reference.

    Source: arXiv 2209.04836 (Git Re-Basin), section 3.2; arXiv 2310.01334 (MC-SMoE), section 3.1, for experts.
    """
    for name in reference.keys() | experts.keys():
        theirs = list(experts[name].shape[1:]) if name in experts else None
        ours = list(reference[name].shape) if name in reference else None
        if theirs != ours:
            raise ValueError(f"{name} of the reference is {ours}, that of each expert {theirs}: they must be alike")
    wanted = _units({name: weight.unsqueeze(0) for name, weight in reference.items()})[0]
    order = torch.stack([_best_order(wanted @ units.t()) for units in _units(experts)])
    return _reordered(experts, order)


def expert_of(
    experts: Weights,
    how: How,
    *,
    usage: Float[Tensor, "E"] | None = None,
    gate: float | Float[Tensor, "E"] | None = None,
) -> dict[str, Tensor]:
    """One expert of a stack of E, its weights without the E.

    Args:
        experts: the stack, see `stack_of`.
        how: "mean" of all weights; "usage", the mean weighted by `usage`; "most_used", that expert as it is; "aligned",
            as "usage" once the hidden units of all are aligned to those of the most used one (see `align`).
        usage: what each expert was used, in any unit; needed for "usage" and "most_used". Null with "aligned": all
            alike, aligned to the first.
        gate: what the output of each expert is multiplied by; null: 1.

    Raises:
        ValueError: another word for `how`, a usage that is missing, negative, zero everywhere or of another length.
        ImportError: "aligned" without SciPy.
    """
    one_of("how", how, get_args(How))
    count = len(experts["w1"])
    share = _share(how, usage, count).to(experts["w1"].device)
    if how == "aligned":
        most = int(share.argmax())
        experts = align({name: weight[most] for name, weight in experts.items()}, experts)
    factor = share if gate is None else share * torch.as_tensor(gate, dtype=share.dtype).to(share.device)
    out = {}
    for name, weight in experts.items():
        # The output is linear in w2 and b2: there a factor of the output can go.
        mean = torch.tensordot(factor if name in ("w2", "b2") else share, weight.double(), 1)
        out[name] = mean.to(weight.dtype)
    return out


def feed_forward_of(
    layer: MoELayer,
    how: How,
    *,
    usage: Float[Tensor, "E"] | None = None,
    gate: float | Float[Tensor, "E"] | None = None,
) -> dict[str, Tensor]:
    """The weights of one dense `FeedForward` made of the experts of a sparse layer.

    ``up.weight`` [F, D], ``down.weight`` [D, F], and ``gate.weight`` [F, D] of gated experts; the layer's activation
    must be that of the experts. Shared experts, which every token meets, keep their hidden units, beside those of the
    routed ones merged: F is the sum of both widths. The function is the mixture's only where all experts are the same.

    Args:
        layer: its experts are `mlp`, `gated_mlp`, or `shared` with the mix "sum".
        how: see `expert_of`.
        usage: assignments of each expert, as `switchkit.convert.measuring.measure` counts them.
        gate: what the router multiplied the routed experts by, summed over the choices of a token: one mean, as
            measured, or one for each expert. A `switch` router has weights below 1, so that a copy of its expert would
            be too loud. Null: 1, as with weights that sum to one.

    Raises:
        ValueError: experts that a `FeedForward` cannot express (another kind, biases, shared ones mixed by a gate), or
            what `expert_of` refuses.
        ImportError: "aligned" without SciPy.
    """
    experts = layer.experts
    one = expert_of(stack_for_dense(experts), how, usage=usage, gate=gate)
    if isinstance(experts, Shared):
        always = {name: weight[0] for name, weight in stack_of(experts.shared).items()}
        one = _side_by_side(one, always)
    if _is_gated(one):
        gates, values = one["w1"].chunk(2, dim=-1)
        return {"up.weight": _turned(values), "gate.weight": _turned(gates), "down.weight": _turned(one["w2"])}
    return {"up.weight": _turned(one["w1"]), "down.weight": _turned(one["w2"])}


def feed_forwards_of(module: LanguageModule, measured: Measured, how: How) -> dict[str, dict[str, Tensor]]:
    """`feed_forward_of` each sparse layer of a model by its name, with the usage and the weights that were measured."""
    layers = moe_layers(module.net)
    return {
        use.layer: feed_forward_of(layers[use.layer], how, usage=use.load, gate=use.gate) for use in measured.layers
    }


def _share(how: How, usage: Tensor | None, count: int) -> Float[Tensor, "E"]:
    """The part of each expert in the result."""
    if how == "mean" or (usage is None and how == "aligned"):
        return torch.full((count,), 1 / count, dtype=torch.float64)
    if usage is None:
        raise ValueError(
            f"how={how!r} needs usage=, a number for each of the {count} experts: measure it, or take 'mean'"
        )
    given = usage.detach().double().cpu()
    if given.shape != (count,):
        raise ValueError(f"usage must be [{count}], one number for each expert; got {list(given.shape)}")
    if not bool(torch.isfinite(given).all()) or bool((given < 0).any()) or float(given.sum()) == 0:
        raise ValueError(f"usage must be at least 0, finite, and above 0 somewhere; got {given.tolist()}")
    if how == "most_used":
        return torch.nn.functional.one_hot(given.argmax(), count).double()
    return given / given.sum()


def _is_gated(weights: Weights) -> bool:
    return weights["w1"].shape[-1] != weights["w2"].shape[-2]


def _units(experts: Weights) -> Float[Tensor, "E F N"]:
    """All weights into and out of each hidden unit, in a row."""
    into = experts["w1"].double().transpose(-1, -2)
    rows = [*into.chunk(2, dim=-2)] if _is_gated(experts) else [into]
    if "b1" in experts:
        bias = experts["b1"].double().unsqueeze(-1)
        rows += [*bias.chunk(2, dim=-2)] if _is_gated(experts) else [bias]
    return torch.cat([*rows, experts["w2"].double()], dim=-1)


def _best_order(similarity: Float[Tensor, "F F"]) -> Tensor:
    """Which unit (column) takes each place (row)."""
    try:
        solve = importlib.import_module("scipy.optimize").linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "aligning hidden units solves an assignment with SciPy: pip install 'switchkit[base]', or merge without "
            "alignment"
        ) from error
    return torch.from_numpy(solve(similarity.cpu().numpy(), maximize=True)[1]).to(similarity.device)


def _reordered(experts: Weights, order: Tensor) -> dict[str, Tensor]:
    """The hidden units of each expert in the order [E, F] given for it."""
    twice = torch.cat([order, order + order.shape[1]], 1) if _is_gated(experts) else order
    out = dict(experts)
    out["w1"] = experts["w1"].gather(2, twice.unsqueeze(1).expand_as(experts["w1"]))
    out["w2"] = experts["w2"].gather(1, order.unsqueeze(2).expand_as(experts["w2"]))
    if "b1" in experts:
        out["b1"] = experts["b1"].gather(1, twice)
    return out


def _side_by_side(first: Weights, second: Weights) -> dict[str, Tensor]:
    """One expert with the hidden units of both: its output is the sum of theirs."""
    if _is_gated(first):
        halves = zip(first["w1"].chunk(2, dim=-1), second["w1"].chunk(2, dim=-1), strict=True)
        into = torch.cat([torch.cat(pair, dim=-1) for pair in halves], dim=-1)
    else:
        into = torch.cat([first["w1"], second["w1"]], dim=-1)
    return {"w1": into, "w2": torch.cat([first["w2"], second["w2"]], dim=0)}


def _turned(weight: Float[Tensor, "I O"]) -> Float[Tensor, "O I"]:
    """As `nn.Linear` has it."""
    return weight.t().contiguous()
