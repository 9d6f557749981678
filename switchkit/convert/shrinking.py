"""Sparse models with fewer experts: the least useful dropped, or those that are alike merged."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from switchkit.convert.measuring import ExpertUse, Measured
from switchkit.convert.merging import How, merge, stack_of
from switchkit.convert.rebuilding import moe_layers, net_arguments, rebuilt
from switchkit.experts.shared import Shared
from switchkit.layers import MoELayer
from switchkit.module import LanguageModule
from switchkit.registry import full_path
from switchkit.routing.token_choice import Switch

__all__ = ["Criterion", "groups_of", "kept_experts", "merge_experts", "prune", "rescale"]

Criterion = Literal["usage", "gate", "similarity"]


def kept_experts(use: ExpertUse, keep: int, by: Criterion = "usage") -> list[int]:
    """The experts of a layer that stay, in order.

    "usage": those with the most assignments; "gate": with the largest sum of weights (the hit rate and the accumulated
    gate of arXiv 2206.00277); "similarity": of the two that are most alike the less used goes, again and again.
    """
    if by == "similarity":
        left = list(range(len(use.load)))
        while len(left) > keep:
            pairs = ((float(use.alike[a, b]), a, b) for i, a in enumerate(left) for b in left[i + 1 :])
            _, a, b = max(pairs)
            left.remove(a if use.load[a] < use.load[b] else b)
        return left
    return _largest(use.load if by == "usage" else use.weight, keep)


def groups_of(use: ExpertUse, number: int) -> list[list[int]]:
    """The experts of a layer in so many groups, the most used of each first.

    The most used experts lead a group each, and every other joins the leader whose logits are most like its own
    (arXiv 2310.01334, section 3.1; there the number of leaders differs between layers, here it is one for all).
    """
    groups = {leader: [leader] for leader in _largest(use.load, number)}
    for expert in range(len(use.load)):
        if expert not in groups:
            groups[max(groups, key=lambda leader: float(use.alike[expert, leader]))].append(expert)
    return list(groups.values())


def prune(
    module: LanguageModule, keep: int, *, measured: Measured, by: Criterion = "usage", k: int | None = None
) -> LanguageModule:
    """The model with `keep` experts in each sparse layer, and the router's rows of these alone.

    Tokens of the experts that are gone go to the best of those left. Where none went there, and weights are normalised,
    the model computes what it did.

    Args:
        module: stays as it is. Experts are `mlp`, `gated_mlp`, or `shared` over these, whose shared ones stay.
        keep: experts of a layer, fewer than there are.
        measured: what the experts are used for, see `switchkit.convert.measuring`.
        by: which go, see `kept_experts`.
        k: choices of a token; null: as it is.

    Raises:
        ValueError: keep out of range, more choices than experts, or experts or a router that cannot be taken apart (its
            state is not a row for each expert).
    """
    if by not in get_args(Criterion):
        raise ValueError(f"by must be one of {', '.join(get_args(Criterion))}; got {by!r}")
    _check(module, keep, measured, "keep")
    groups = [[[expert] for expert in kept_experts(use, keep, by)] for use in measured.layers]
    return _regrouped(module, groups, measured, "mean", k)


def merge_experts(
    module: LanguageModule, experts: int, *, measured: Measured, how: How = "aligned", k: int | None = None
) -> LanguageModule:
    """The model with so many experts in each sparse layer, each made of a group of those that are most alike.

    Groups are those of `groups_of`, an expert is made as `switchkit.convert.merging.merge` does with `how`, weighted
    by usage. The router's row of a merged expert (and every other number that the router has for each expert) is the
    mean of the members', weighted by usage: its logit is the weighted mean of their logits. Its probability is then
    that of one expert among fewer, whereas the members' were a part each: where weights do not sum to one, `rescale`
    makes up for that.

    Args:
        module: stays as it is. Experts as for `prune`.
        experts: experts of a layer, fewer than there are.
        measured: what the experts are used for.
        how: see `merge`.
        k: choices of a token; null: as it is.

    Raises:
        ValueError: as `prune`.
        ImportError: "aligned" without SciPy.

    Source: arXiv 2310.01334 (MC-SMoE), section 3.1.
    """
    _check(module, experts, measured, "experts")
    groups = [groups_of(use, experts) for use in measured.layers]
    return _regrouped(module, groups, measured, how, k)


@torch.no_grad()
def rescale(module: LanguageModule, before: Measured, after: Measured) -> bool:
    """Multiply the routed experts' outputs so that a token's weights sum to what they did; whether any changed.

    With fewer experts each has a larger probability. Where that is the weight (`switch`), experts that learned to be
    multiplied by less would be too loud. Weights that are normalised sum to one before and after, and nothing changes.
    In place: `module` is the one that was made.
    """
    changed = False
    for (_, layer), old, new in zip(moe_layers(module).items(), before.layers, after.layers, strict=True):
        factor = old.gate / new.gate if new.gate else 1.0
        if abs(factor - 1) > 1e-6:
            changed = True
            routed = layer.experts.routed if isinstance(layer.experts, Shared) else layer.experts
            for name, weight in routed.named_parameters():
                if name in ("w2", "b2"):
                    weight.mul_(factor)
    return changed


def _check(module: LanguageModule, number: int, measured: Measured, word: str) -> None:
    layers = moe_layers(module)
    if not layers:
        raise ValueError("the model has no sparse layer: there is no expert to take away")
    names = [use.layer for use in measured.layers]
    if names != list(layers):
        raise ValueError(f"measured is of other layers, {', '.join(names)}, than the model's, {', '.join(layers)}")
    fewest = min(layer.num_experts for layer in layers.values())
    if not 1 <= number < fewest:
        raise ValueError(
            f"{word} must be from 1 to {fewest - 1}, fewer than the {fewest} experts of a layer; got {number}"
        )


def _regrouped(
    module: LanguageModule, groups: Sequence[list[list[int]]], measured: Measured, how: How, k: int | None
) -> LanguageModule:
    """The model whose experts are made of the groups of each layer."""
    layers, number = moe_layers(module), len(groups[0])
    arguments = net_arguments(module) | {"num_experts": number}
    moe = copy.deepcopy(module.spec["init_args"]["moe"]) or {"class_path": full_path(MoELayer), "init_args": {}}
    if moe["init_args"].pop("granularity", 1) != 1:
        arguments["expert_d_ff"] = next(iter(layers.values())).d_ff
    if k is not None:
        moe["init_args"]["router"] = _with_k(next(iter(layers.values())).router, moe["init_args"].get("router"), k)
    try:
        made = rebuilt(module, arguments, moe=moe)
    except ValueError as error:
        raise ValueError(
            f"no such model with {number} experts in a layer: {error}. Keep more of them, or give k"
        ) from error
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for (name, layer), use, parts in zip(layers.items(), measured.layers, groups, strict=True):
        prefix = f"net.{name}.experts." + ("routed." if isinstance(layer.experts, Shared) else "")
        stack = stack_of(layer.experts)
        merged = [_one({n: w[part] for n, w in stack.items()}, use.load[part], how) for part in parts]
        state |= {f"{prefix}{n}": torch.stack([one[n] for one in merged]) for n in stack}
        router = moe_layers(made)[name].router
        shrunk = _router_state(name, layer, router, parts, use.load)
        state |= {f"net.{name}.router.{n}": tensor for n, tensor in shrunk.items()}
    made.load_state_dict(state, assign=True)
    return made


def _one(stack: Mapping[str, Tensor], load: Float[Tensor, "E"], how: How) -> dict[str, Tensor]:
    """One expert of a group; of a group of one, that one."""
    if len(load) == 1:
        return {name: weight[0] for name, weight in stack.items()}
    # A group that got no token is as good as one that is used evenly.
    return merge(stack, how, usage=load if float(load.sum()) else torch.ones_like(load))


def _router_state(
    name: str, layer: MoELayer, router: nn.Module, groups: Sequence[list[int]], load: Tensor
) -> dict[str, Tensor]:
    """The router's state with a row for each group: the mean of the rows of its experts, weighted by their load.

    Raises:
        ValueError: a state that is not told by experts.
    """
    kind, count, wanted = type(layer.router).__name__, layer.num_experts, router.state_dict()
    found, told = {}, False
    for key, tensor in layer.router.state_dict().items():
        shape = list(wanted[key].shape) if key in wanted else None
        if shape == list(tensor.shape) and tensor.is_floating_point():
            found[key] = tensor.clone()
        elif shape == [len(groups), *tensor.shape[1:]] and tensor.shape[0] == count and tensor.is_floating_point():
            told = True
            found[key] = torch.stack([_mean(tensor[group], load[group]) for group in groups])
        else:
            raise ValueError(
                f"{name}: router {kind} keeps {key!r} {list(tensor.shape)}, which is not a row of numbers for each of "
                f"its {count} experts: it cannot do with fewer"
            )
    if not told:
        raise ValueError(
            f"{name}: router {kind} has learned nothing of single experts, and would send tokens to others: it cannot "
            "do with fewer"
        )
    return found


def _mean(rows: Tensor, load: Tensor) -> Tensor:
    share = load / load.sum() if float(load.sum()) else torch.full_like(load, 1 / len(load))
    return torch.tensordot(share.to(rows.device), rows.double(), 1).to(rows.dtype)


def _largest(values: Float[Tensor, "E"], number: int) -> list[int]:
    """The indices of the largest, in order; of equal ones the first."""
    return sorted(values.argsort(descending=True, stable=True)[:number].tolist())


def _with_k(router: nn.Module, spec: Any, k: int) -> dict[str, Any]:
    """The description of a router with another k."""
    spec = copy.deepcopy(spec) or {"class_path": full_path(Switch), "init_args": {}}
    if "k" not in inspect.signature(type(router)).parameters:
        raise ValueError(f"router {type(router).__name__} has no option k: leave k out")
    spec["init_args"] = {**(spec.get("init_args") or {}), "k": k}
    return dict(spec)
