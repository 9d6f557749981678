"""What every record of decisions must hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from math import ceil
from typing import Any

import torch
from torch import Tensor

from switchkit.capacity.policies import Factor
from switchkit.dispatch.base import placed
from switchkit.layers import MoELayer
from switchkit.records import Routing, asked_expert, load
from switchkit.testing import oracle
from switchkit.testing.cases import EXACT, Case, run
from switchkit.testing.expect import breaks, error, expect

__all__ = [
    "accounts_balance",
    "capacity_is_filled",
    "counts_are_exact",
    "first_come_first_served",
    "probabilities_add_up",
]


def _decide(case: Case) -> tuple[MoELayer, Tensor, Tensor, Routing, Tensor, Tensor]:
    """The layer, its tokens, which are real, its record, and of that `kept` and `slot`."""
    layer = case.layer()
    x, valid, ids = case.inputs()
    _, r = run(layer, x, valid, ids)
    slot, kept, _ = placed(r)
    return layer, x, valid, r, kept, slot


@breaks("tokens are lost or computed for nothing, and every loss and metric that counts them is off")
def accounts_balance(case: Case, *, exact: bool = True, steady: bool = True) -> None:
    """kept + dropped = chosen, no padding among them, k for every real token, and load counts them before a drop.

    What a policy moves to another expert counts in load for the one that the router chose (`asked`).

    Without `exact` a token may make fewer than k choices, without `steady` in training. The router's own `k` is the
    record's, unless it is `uneven` or has slots that are mixtures.
    """
    exact = exact and (steady or not case.training)
    layer, x, valid, r, kept, slot = _decide(case)
    real = oracle.groups(valid, case.group)
    padding = int((r.chosen & ~real.gather(1, r.token)).sum())
    expect(not padding, f"{padding} assignments were chosen for padding, none expected")
    expect(torch.equal(r.valid, real), "the record's `valid` is not that of the tokens")
    expect(not (kept & ~r.chosen).any(), "some assignments are kept that were never chosen")
    if r.k is not None:
        own, router = min(layer.router.k, case.num_experts), layer.router
        free = r.share is not None or (router.uneven is not None and not exact)
        expect(
            free or own == r.k,
            f"the router's `k` is {own}, its record has k={r.k}: capacities and counts read the former (set self.k in "
            "the constructor, and `uneven` where a token may choose fewer)",
        )
        made, most = int(r.chosen.sum()), r.k * int(valid.sum())
        fits = made == most if exact else made <= most
        expect(fits, f"{made} assignments were chosen for {int(valid.sum())} real tokens, k={r.k} for each expected")
        expect(r.token.shape[1] == r.k * real.shape[1], f"the list has {r.token.shape[1]} places, k * S expected")
    assert r.load is not None
    for g in range(len(r.expert)):
        made_by, kept_by = (
            Counter(int(e) for e, here in zip(expert[g], which[g], strict=True) if here)
            for expert, which in ((asked_expert(r), r.chosen), (r.expert, kept))
        )
        counted = r.load[g].tolist()
        true = [made_by[e] for e in range(case.num_experts)]
        expect(counted == true, f"load counts {counted} where {true} assignments were chosen")
        if r.share is None:
            told = _kept_load(r)[g].tolist()
            true = [kept_by[e] for e in range(case.num_experts)]
            expect(told == true, f"experts are said to keep {told} assignments where they keep {true}")
            pairs = [(int(t), int(e)) for t, e, c in zip(r.token[g], r.expert[g], kept[g], strict=True) if c]
            expect(len(pairs) == len(set(pairs)), "a token is with an expert twice")
            places = [(int(e), int(s)) for e, s, c in zip(r.expert[g], slot[g], kept[g], strict=True) if c]
            full = [(e, s) for e in range(case.num_experts) for s in range(kept_by[e])]
            expect(sorted(places) == full, "the kept assignments of an expert do not sit in its slots 0, 1, ...")
    expect(torch.equal(load(r), r.load.sum(0)), "load(routing) is not the sum over the groups")
    expect(r.batch == x.shape[0], f"the record says {r.batch} sequences, the batch has {x.shape[0]}")
    expect(r.length == x.shape[1], f"the record says sequences of {r.length} tokens, they have {x.shape[1]}")


def _kept_load(r: Routing) -> Tensor:
    _, _, made = placed(r)
    if r.taken is not None:
        return r.taken
    return made if r.capacity is None else made.clamp(max=r.capacity)


@breaks("the balance loss compares them with shares that add up to 1, and pushes the router the wrong way")
def probabilities_add_up(case: Case) -> None:
    """`probs` of a real token are not negative and add up to 1 over the experts."""
    _, _, valid, r, _, _ = _decide(case)
    probs = r.probs.detach()[oracle.groups(valid, case.group)]
    expect(bool((probs >= 0).all()), f"a probability is {float(probs.min()):.3g}, at least 0 expected")
    total = probs.sum(-1)
    worst = float(total[(total - 1).abs().argmax()])
    expect(
        error(total, torch.ones_like(total)) <= EXACT,
        f"the probabilities of a token add up to {worst:.3g} over the experts, 1 expected (is the softmax over another "
        "dimension?)",
    )


@breaks("tokens are dropped without need, or more of them computed than there is room for")
def capacity_is_filled(case: Case) -> None:
    """An expert keeps min(load, C) of a group: never more, and nothing is dropped without need.

    C = max(1, ceil(factor * k * S / E)) for `factor` (arXiv 2101.03961, equation 3, with a floor of one token).
    """
    layer, x, _, r, kept, slot = _decide(case)
    size = oracle.groups(x, case.group).shape[1]
    expected = layer.capacity.limit(size, case.num_experts, layer.router.k, training=case.training)
    policy: Any = layer.capacity
    plain = type(policy) is Factor and (policy.rounding, policy.minimum, policy.multiple) == ("ceil", 1, 1)
    if plain and policy.eval is not None and not case.training:
        expected = max(1, ceil(Fraction(str(policy.eval)) * layer.router.k * size / case.num_experts))
    expect(expected is None or expected >= 1, f"an expert has room for {expected} tokens, at least 1 expected")
    expect(r.capacity == expected, f"the capacity is {r.capacity}, {expected} expected")
    for g in range(len(r.expert)):
        for e in range(case.num_experts):
            here = r.expert[g] == e
            made, took = int((here & r.chosen[g]).sum()), here & kept[g]
            fits = made if expected is None else min(made, expected)
            found = int(took.sum())
            expect(found == fits, f"an expert kept {found} of the {made} assignments that came, {fits} expected")
            expect(sorted(slot[g][took].tolist()) == list(range(fits)), "the slots of an expert are not 0, 1, ...")


@breaks("a later token pushes out an earlier one, so that a causal model sees the future")
def first_come_first_served(case: Case) -> None:
    """Token by token: what is kept is what arrived first, so that no token pushes out an earlier one."""
    _, _, _, r, kept, slot = _decide(case)
    for g in range(len(r.expert)):
        taken: Counter[int] = Counter()
        arrivals = sorted(range(r.token.shape[1]), key=lambda n, g=g: (int(r.token[g, n]), n))  # type: ignore[misc]
        for n in arrivals:
            if not r.chosen[g, n]:
                continue
            e = int(r.expert[g, n])
            fits = r.capacity is None or taken[e] < r.capacity
            token = int(r.token[g, n])
            expect(
                bool(kept[g, n]) == fits,
                f"token {token} was {'kept' if kept[g, n] else 'dropped'} as number {taken[e] + 1} of an expert with "
                f"room for {r.capacity}",
            )
            if kept[g, n]:
                expect(int(slot[g, n]) == taken[e], f"token {token} has slot {int(slot[g, n])}, {taken[e]} expected")
            taken[e] += 1


@breaks("with long sequences several tokens share a slot, and all but one are lost")
def counts_are_exact(case: Case) -> None:
    """1000 tokens for one expert, in bfloat16, which knows no integer between 256 and 258."""
    case = replace(case, router="switch", k=None, options=(), shape=(1, 1000), dtype=torch.bfloat16)
    if case.capacity in ("factor", "fixed"):
        case = replace(case, capacity="fixed", capacity_options=(("eval", 777),))
    layer: Any = case.layer(training=False)
    x = case.inputs()[0].abs()
    with torch.no_grad():
        layer.router.weight.fill_(-1)
        layer.router.weight[2].fill_(1)
    y, r = run(layer, x)
    slot, kept, made = placed(r)
    expect(made.tolist() == [[0, 0, 1000, 0]], f"load counts {made.tolist()} where 1000 tokens chose expert 2")
    limit = r.capacity or 1000
    if r.asked is None:
        expect(int(kept.sum()) == min(1000, limit), f"{int(kept.sum())} of 1000 tokens were kept, {limit} expected")
        mine = slot[0][kept[0]].tolist()
        expect(sorted(mine) == list(range(len(mine))), f"{len(mine)} kept tokens sit in {len(set(mine))} slots")
        if layer.leaks is None:
            # Where a policy of the user's own changed what is kept, a dropped token has no place.
            queue = list(range(1000)) if r.taken is None else list(range(len(mine)))
            sit = slot[0].tolist() if r.taken is None else mine
            expect(sit == queue, f"{len(sit)} tokens of one expert sit in {len(set(sit))} slots, not in order")
    expect(bool((y[0][~kept[0]] == 0).all()) or r.asked is not None, "a dropped token has an output")
