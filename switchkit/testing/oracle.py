"""Mixtures of experts by loops over single tokens, written from the papers.

Nothing here is fast and nothing calls the code under test, but for `one_expert`, which asks experts it does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from switchkit.experts.base import Experts
from switchkit.experts.feed_forward import GatedMlp, Mlp
from switchkit.layers import MoELayer
from switchkit.records import Routing, Rows

__all__ = ["ACTIVATIONS", "groups", "mixtures", "one_expert", "outputs", "paper", "with_always"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": lambda x: x * torch.special.ndtr(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def one_expert(experts: Experts, e: int, token: Tensor) -> Tensor:
    """Expert e on one token [D]."""
    if type(experts) not in (Mlp, GatedMlp):
        load = torch.zeros(experts.num_experts, dtype=torch.long, device=token.device)
        load[e] = 1
        found: Tensor = experts(Rows(x=token.unsqueeze(0), load=load, sizes=tuple(load.tolist())))[0]
        return found
    return _feed_forward(experts, e, token)


def _feed_forward(experts: Any, e: int, token: Tensor) -> Tensor:
    hidden = token @ experts.w1[e]
    if experts.b1 is not None:
        hidden = hidden + experts.b1[e]
    if type(experts) is GatedMlp:
        half = len(hidden) // 2
        hidden = ACTIVATIONS[experts.activation](hidden[:half]) * hidden[half:]
    else:
        hidden = ACTIVATIONS[experts.activation](hidden)
    out: Tensor = hidden @ experts.w2[e]
    return out if experts.b2 is None else out + experts.b2[e]


def groups(x: Tensor, group: str | int) -> Tensor:
    """[B, S, ...] as the groups [G, S', ...] that share a capacity, a short last one filled up with zeros."""
    if group == "sequence":
        return x
    flat = list(x.flatten(0, 1))
    size = len(flat) if group == "batch" else int(group)
    while len(flat) % size:
        flat.append(torch.zeros_like(flat[0]))
    return torch.stack([torch.stack(flat[start : start + size]) for start in range(0, len(flat), size)])


def outputs(layer: MoELayer, x: Tensor, routing: Routing) -> Tensor:
    """What `layer` should return for x when its decisions are those of the record."""
    if routing.share is not None:
        return mixtures(layer, x, routing)
    tokens = groups(x, layer.group)
    assert routing.kept is not None
    result = []
    for g in range(tokens.shape[0]):
        for s in range(tokens.shape[1]):
            token = tokens[g, s]
            y, served = torch.zeros_like(token), 0
            for n in range(routing.token.shape[1]):
                if routing.token[g, n] != s or not routing.chosen[g, n]:
                    continue
                if routing.kept[g, n]:
                    y = y + routing.weight[g, n] * one_expert(layer.experts, int(routing.expert[g, n]), token)
                    served += 1
                elif layer.dropped == "weighted_input":
                    y = y + weight_if_kept(routing, g, n) * token
            if layer.dropped == "input" and served == 0 and routing.valid[g, s]:
                y = y + token
            result.append(y)
    return with_always(layer, torch.stack(result[: x.shape[0] * x.shape[1]]).view_as(x), x)


def weight_if_kept(routing: Routing, g: int, n: int) -> Tensor:
    """The weight of an assignment if every one of its token were kept where the router sent it."""
    if routing.given is None:
        return routing.weight[g, n]
    if not routing.renormalize:
        return routing.given[g, n]
    same = [m for m in range(routing.token.shape[1]) if routing.token[g, m] == routing.token[g, n]]
    total = sum(routing.given[g, m] for m in same if routing.chosen[g, m])
    return routing.scale * routing.given[g, n] / (total or 1)


def mixtures(layer: MoELayer, x: Tensor, routing: Routing) -> Tensor:
    """Soft MoE (arXiv 2308.00951): an expert's slot is a mixture of the tokens, a token's output one of all slots.

    X~[e, c] = sum_s share[s, e, c] x[s], and y[s] = sum_ec weight[s, e, c] E_e(X~[e, c]).
    """
    tokens = groups(x, layer.group)
    assert routing.kept is not None
    assert routing.slot is not None
    assert routing.share is not None
    result = []
    for g in range(tokens.shape[0]):
        pairs = [n for n in range(routing.token.shape[1]) if routing.kept[g, n]]
        slots: dict[tuple[int, int], Tensor] = {}
        for n in pairs:
            where = (int(routing.expert[g, n]), int(routing.slot[g, n]))
            part = routing.share[g, n] * tokens[g, int(routing.token[g, n])]
            slots[where] = slots[where] + part if where in slots else part
        done = {where: one_expert(layer.experts, where[0], slot) for where, slot in slots.items()}
        ys = [torch.zeros_like(token) for token in tokens[g]]
        for n in pairs:
            s, where = int(routing.token[g, n]), (int(routing.expert[g, n]), int(routing.slot[g, n]))
            ys[s] = ys[s] + routing.weight[g, n] * done[where]
        result += ys
    return with_always(layer, torch.stack(result[: x.shape[0] * x.shape[1]]).view_as(x), x)


def with_always(layer: MoELayer, routed: Tensor, x: Tensor) -> Tensor:
    """Routed outputs and those of experts that every token meets, where there are any."""
    always = layer.experts.always(x)
    return routed if always is None else layer.experts.mix(routed, always, x)


def paper(
    layer: Any, x: Tensor, valid: Tensor, *, k: int, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor, list[list[tuple[int, int, bool]]]]:
    """Softmax routing from the weights alone: outputs, balance loss, z-loss, and (token, expert, kept) per sequence.

    Switch (arXiv 2101.03961): p = softmax(W x), the best expert, y = p E(x); balance = E sum_e f_e P_e; an expert takes
    the first `capacity` tokens of a sequence. Top k (arXiv 2401.04088): the k best, weights divided by their sum.
    z (arXiv 2202.08906): the mean of logsumexp(W x)^2.
    """
    experts = layer.num_experts
    ys: list[Tensor] = []
    decisions, probs, squares = [], [], []
    made = [0] * experts
    for b in range(x.shape[0]):
        taken, decided = [0] * experts, []
        for s in range(x.shape[1]):
            y = torch.zeros_like(x[b, s])
            if valid[b, s]:
                logits = layer.router.weight @ x[b, s]
                p = logits.exp() / logits.exp().sum()
                probs.append(p)
                squares.append(logits.exp().sum().log() ** 2)
                best = p.argsort(descending=True, stable=True)[:k].tolist()
                total = sum(p[e] for e in best) if k > 1 else 1
                for e in best:
                    kept = capacity is None or taken[e] < capacity
                    decided.append((s, e, kept))
                    made[e] += 1
                    if kept:
                        taken[e] += 1
                        y = y + p[e] / total * one_expert(layer.experts, e, x[b, s])
            ys.append(y)
        decisions.append(decided)
    mean = torch.stack(probs).mean(0)
    balance = experts * sum(made[e] / sum(made) * mean[e] for e in range(experts))
    return torch.stack(ys).view_as(x), balance, torch.stack(squares).mean(), decisions
