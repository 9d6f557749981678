"""A sparse model with fewer experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from switchkit.checks import one_of
from switchkit.convert.measuring import ExpertUse, Measured
from switchkit.convert.merging import How, expert_of, stack_for_dense, stack_of
from switchkit.convert.rebuilding import net_arguments, rebuilt
from switchkit.experts.shared import Shared
from switchkit.layers import FeedForward, MoELayer, moe_layers
from switchkit.module import LanguageModule

__all__ = ["By", "check_shrinks", "groups_of", "kept_experts", "merge", "prune", "rescale"]

By = Literal["usage", "weight", "similarity"]

PER_EXPERT = frozenset(("weight", "offset", "noise_weight", "bias", "embedding"))
"""State of a router with a row, or a number, for each expert."""
SHARED = frozenset(("projection", "log_temperature"))
"""State of a router that all experts share."""


def prune(module: LanguageModule, keep: int, measured: Measured, *, by: By = "weight") -> LanguageModule:
    """The model with `keep` experts of each sparse layer, in their old order; the others go with their router rows.

    What the router's probabilities gave to those that went is shared out by its softmax among those that stay. Where no
    token was sent to what went, and the weights of a token sum to one, the model computes what it did. Where a token
    chooses groups of experts first, as many stay in each group; `sigmoid` judges a group by its two best, so there the
    second of them has a say even if nothing is sent to it.

    Args:
        module: stays as it is.
        keep: experts of each layer that stay, at least the router's k.
        measured: what the experts are used for, see `switchkit.convert.measuring`.
        by: which stay, see `kept_experts`.

    Raises:
        ValueError: `keep` out of range, another word for `by`, a router or experts that no expert can be taken out of.
    """
    one_of("by", by, get_args(By))

    def chosen(layer: MoELayer, use: ExpertUse) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        stays = torch.tensor(kept_experts(use, keep, by, groups=_groups(layer)[0]))
        stack = {name: tensor[stays.to(tensor.device)] for name, tensor in stack_of(layer.experts).items()}
        rows = {name: tensor[stays.to(tensor.device)] for name, tensor in _router_rows(layer).items()}
        return stack, rows

    return _shrunk(module, keep, measured, chosen)


def kept_experts(use: ExpertUse, keep: int, by: By = "weight", *, groups: int = 1) -> list[int]:
    """The experts of a layer that stay, in their old order; as many of each of `groups` runs of neighbours.

    "weight": those whose outputs came back with the largest sum of weights; "usage": those with the most assignments
    (arXiv 2206.00277 drops by either). A weight says how much of an output comes from the expert, a count does not:
    the loss after was lower by weight on six of six checkpoints at half of the experts, and on four of five at a
    quarter, which is why it is the default (docs/upcycling.md). "similarity": of the two that are most alike the less
    used goes, again and again, which a router's rows can tell without data (`switchkit.convert.measuring.assumed`).
    """
    runs = torch.arange(len(use.load)).view(groups, -1)
    if by != "similarity":
        score = use.load if by == "usage" else use.weight
        best = score.cpu()[runs].argsort(descending=True, stable=True)[:, : keep // groups]
        return sorted(runs.gather(1, best).flatten().tolist())
    stay: list[list[int]] = runs.tolist()
    for left in stay:
        while len(left) > keep // groups:
            _, a, b = max((float(use.alike[a, b]), a, b) for i, a in enumerate(left) for b in left[i + 1 :])
            left.remove(a if use.load[a] < use.load[b] else b)
    return [expert for left in stay for expert in left]


def merge(module: LanguageModule, num_experts: int, measured: Measured, *, how: How = "aligned") -> LanguageModule:
    """The model with the experts of each sparse layer merged into `num_experts`.

    The most used experts lead the groups, and every other joins the leader that the router scores most like it
    (`groups_of`). A group becomes one expert by `switchkit.convert.merging.expert_of`, and its rows of the router
    become their mean weighted by usage: where all of a group are alike, that is the row of each. The softmax then
    counts once what it counted as often as the group has members; where its probabilities are the weights, see
    `rescale`.

    Args:
        module: stays as it is.
        num_experts: experts that each layer is left with, at least the router's k.
        measured: what the experts are used for, see `switchkit.convert.measuring`.
        how: see `expert_of`; hidden units are aligned first by default.

    Raises:
        ValueError: a number out of range, a router or experts that cannot be merged.
        ImportError: "aligned" without SciPy.

    Source: arXiv 2310.01334 (MC-SMoE), section 3.1, which keeps the old router and sends a group to its one expert.
    """

    one_of("how", how, get_args(How))

    def chosen(layer: MoELayer, use: ExpertUse) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        group = groups_of(use.alike, use.load, num_experts, _groups(layer)[0])
        stack, rows = stack_of(layer.experts), _router_rows(layer)
        made: list[dict[str, Tensor]] = []
        turned: dict[str, list[Tensor]] = {name: [] for name in rows}
        for number in range(num_experts):
            members = (group == number).nonzero().flatten()
            used = use.load[members]
            # Experts of no use at all weigh alike.
            used = used if float(used.sum()) else torch.ones_like(used)
            made.append(expert_of({n: t[members.to(t.device)] for n, t in stack.items()}, how, usage=used))
            share = used / used.sum()
            for name, tensor in rows.items():
                mean = torch.tensordot(share.to(tensor.device), tensor[members.to(tensor.device)].double(), 1)
                turned[name].append(mean.to(tensor.dtype))
        merged = {name: torch.stack([one[name] for one in made]) for name in stack}
        return merged, {name: torch.stack(tensors) for name, tensors in turned.items()}

    return _shrunk(module, num_experts, measured, chosen)


def groups_of(alike: Float[Tensor, "E E"], usage: Float[Tensor, "E"], count: int, groups: int = 1) -> Int[Tensor, "E"]:
    """The group of each expert: the `count` most used lead, in the order of their numbers, and others join the most
    alike of them. As many lead in each of the router's own `groups`, runs of neighbours, which nobody leaves."""
    runs = torch.arange(len(usage)).view(groups, -1)
    best = usage[runs].argsort(descending=True, stable=True)[:, : count // groups]
    leaders = runs.gather(1, best).flatten().sort().values
    home = torch.arange(len(usage)) // runs.shape[1]
    group = alike[:, leaders].masked_fill(home.unsqueeze(1) != home[leaders], -torch.inf).argmax(-1)
    group[leaders] = torch.arange(count)
    return group


@torch.no_grad()
def rescale(module: LanguageModule, before: Measured, after: Measured) -> bool:
    """Multiply the routed experts' outputs so that a token's weights come to what they did; whether any changed.

    Fewer experts have larger probabilities each. Where these are the weights (`switch`), experts that learned to be
    multiplied by less would be too loud. Weights that sum to one did and do, and nothing changes. What a capacity
    drops is counted in: fewer experts have room for more tokens each, which makes none of them louder in a token.

    Args:
        module: what `prune` or `merge` made; it is changed in place.
        before: measured of the model that it was made of.
        after: measured of `module`, on the same data.
    """
    changed = False
    for layer, old, new in zip(moe_layers(module.net).values(), before.layers, after.layers, strict=True):
        factor = old.gate_undropped / new.gate_undropped if new.gate_undropped else 1.0
        if abs(factor - 1) > 1e-6:
            changed = True
            routed = layer.experts.routed if isinstance(layer.experts, Shared) else layer.experts
            for name, weight in routed.named_parameters():
                if name in ("w2", "b2"):
                    weight.mul_(factor)
    return changed


def check_shrinks(module: LanguageModule, count: int | None = None) -> dict[str, MoELayer]:
    """The sparse layers, if they can be left with `count` experts each, or, without a number, with one dense layer.

    What is known before anything is measured; `prune`, `merge` and `to_dense` ask it themselves.

    Raises:
        ValueError: a dense model, sparse attention, experts that cannot be taken apart; with a number: one out of
            range, or that the devices of a loss cannot share out, experts of several widths, a router without a part
            for each; without: experts that no dense layer expresses, dense layers of a class of one's own.
    """
    layers = moe_layers(module.net)
    if not layers:
        raise ValueError("the model is dense already: it has no experts to prune, merge or replace")
    for name in layers:
        if not name.endswith(".mlp"):
            raise ValueError(
                f"{name} is sparse attention, whose experts this cannot take out: only feed-forward layers"
            )
    if count is None:
        _check_dense(module, layers)
        return layers
    for name, layer in layers.items():
        stack_of(layer.experts)
        _router_rows(layer)
        groups, top_groups = _groups(layer)
        least = -(-layer.router.k // top_groups) * groups
        if least > layer.num_experts - groups:
            among = f", chosen from {top_groups} of {groups} groups" if groups > 1 else ""
            raise ValueError(
                f"no expert can be taken out of {name}: a token is sent to {layer.router.k} of its "
                f"{layer.num_experts}{among}"
            )
        if not least <= count < layer.num_experts or count % groups:
            even = f", and as many in each of the router's {groups} groups" if groups > 1 else ""
            raise ValueError(
                f"{count} experts cannot be left of the {layer.num_experts} of {name}: at least {least}, for a token "
                f"is sent to {layer.router.k}, at most {layer.num_experts - groups}{even}"
            )
    if len({layer.d_ff for layer in layers.values()}) > 1:
        raise ValueError("the experts of the layers have several widths, which no model with fewer can say")
    for loss in module.losses:
        devices = getattr(loss, "devices", None)
        if devices and count % devices:
            raise ValueError(
                f"{count} experts cannot be shared out to the {devices} devices of the loss {type(loss).__name__}: "
                f"leave a multiple of {devices}"
            )
    return layers


def _check_dense(module: LanguageModule, layers: Mapping[str, MoELayer]) -> None:
    """Refuses experts that no `FeedForward` expresses, and dense layers beside them that none can stand for."""
    for layer in layers.values():
        stack_for_dense(layer.experts)
    for name, part in module.net.named_modules():
        # Not a subclass: what it computes is not known.
        if name.endswith(".mlp") and name not in layers and type(part) is not FeedForward:
            raise ValueError(
                f"{name} is a {type(part).__name__}, another kind of dense layer than the FeedForward that is made of "
                "experts: a model has one kind"
            )


def _groups(layer: MoELayer) -> tuple[int, int]:
    """Groups of neighbours that a token chooses experts from, and how many of them it chooses; 1, 1: no groups."""
    return getattr(layer.router, "groups", 1), getattr(layer.router, "top_groups", 1)


def _router_rows(layer: MoELayer) -> dict[str, Tensor]:
    """What a router holds for each expert; or a ValueError."""
    found = {}
    for name, tensor in layer.router.state_dict().items():
        if name in PER_EXPERT and tensor.shape[:1] == (layer.num_experts,):
            found[name] = tensor
        elif name not in SHARED:
            raise ValueError(
                f"the router {type(layer.router).__name__} holds {name!r}, which cannot be told apart by expert: "
                "no expert can be taken out of it"
            )
    if not found:
        raise ValueError(
            f"the router {type(layer.router).__name__} holds nothing for each expert: its choice follows from their "
            "numbers, and others would get the tokens of those that stay. Only to-dense takes such a model"
        )
    return found


def _shrunk(
    module: LanguageModule,
    count: int,
    measured: Measured,
    chosen: Callable[[MoELayer, ExpertUse], tuple[dict[str, Tensor], dict[str, Tensor]]],
) -> LanguageModule:
    """The model with `count` experts in each sparse layer, the stack and the router's rows as `chosen` gives them."""
    arguments = net_arguments(module)
    layers = check_shrinks(module, count)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for (name, layer), use in zip(layers.items(), measured.layers, strict=True):
        stack, rows = chosen(layer, use)
        inner = "experts.routed" if isinstance(layer.experts, Shared) else "experts"
        state |= {f"net.{name}.{inner}.{key}": tensor for key, tensor in stack.items()}
        state |= {f"net.{name}.router.{key}": tensor for key, tensor in rows.items()}
    width = next(iter(layers.values())).d_ff
    moe = module.spec["init_args"]["moe"]
    if moe is not None:
        # The pieces of what was cut finer are experts like others now.
        moe = {**moe, "init_args": {**(moe["init_args"] or {}), "granularity": 1}}
    made = rebuilt(module, {**arguments, "num_experts": count, "expert_d_ff": width}, moe=moe)
    made.load_state_dict(state, assign=True)
    return made
