"""What one router may do that others may not, found by looking at it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from switchkit.testing.cases import Case, run, seeded

__all__ = ["Traits", "traits_of"]


@dataclass(frozen=True)
class Traits:
    """What is true of a router, and so what cannot be asked of it."""

    learned: bool
    """It has parameters."""
    draws: bool
    """It draws random numbers in training."""
    by_position: bool
    """It decides without looking at a token, in evaluation: other tokens and ids get the same experts."""
    places: bool
    """It places tokens itself and leaves the capacity policy no say."""
    mixes: bool
    """Its slots are mixtures of tokens."""
    irregular: bool
    """Its list is no list of k choices for each token."""
    optional: bool
    """A token may make fewer than k choices in evaluation."""
    whole: bool
    """The weights of a token are probabilities of its experts, or add up to one: a single expert has a weight of 1."""
    single: bool
    """It works with one expert."""
    uniform: bool
    """With parameters of zero its probabilities are uniform."""
    leaks: str | None
    """Why it lets a causal model see the future, as it declares."""


def traits_of(case: Case) -> Traits:
    """The traits of the router of a case."""
    case = replace(case, capacity="dropless", capacity_options=None, dtype=torch.float64, device="cpu", num_experts=4)
    x, valid, ids = case.inputs()
    layer = case.layer(training=True)
    seeded(0)
    before = torch.get_rng_state()
    layer(x, valid, ids)
    draws = not torch.equal(before, torch.get_rng_state())
    layer.eval()
    limit = layer.capacity.limit(x.shape[1], case.num_experts, layer.router.k, training=False)
    made = layer.router(x, limit, valid, ids)
    _, r = run(layer, x, valid, ids)
    _, other = run(layer, torch.randn_like(x), valid, ids + 1 + torch.randint_like(ids, 20))
    by_position = torch.equal(r.expert, other.expert) and torch.equal(r.weight, other.weight)
    learned = any(parameter.requires_grad for parameter in layer.router.parameters())
    try:
        replace(case, num_experts=1, k=case.k and 1).layer()
        single = True
    except ValueError:
        single = False
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.zero_()
    _, zero = run(layer, x, valid, ids)
    uniform = torch.allclose(zero.probs, torch.full_like(zero.probs, 1 / case.num_experts))
    return Traits(
        learned=learned,
        draws=draws,
        by_position=by_position,
        places=made.slot is not None,
        mixes=made.share is not None,
        irregular=made.k is None,
        optional=made.k is not None and int(made.chosen.sum()) < made.k * int(valid.sum()),
        whole=made.share is None and _whole(case),
        single=single,
        uniform=uniform,
        leaks=layer.router.leaks,
    )


def _whole(case: Case) -> bool:
    """Whether weights are probabilities or add up to one, for a single choice where that can be built."""
    x, valid, ids = case.inputs()
    try:
        layer = replace(case, k=case.k and 1).layer()
    except ValueError:
        layer = case.layer()
    _, r = run(layer, x, valid, ids)
    probs = r.probs.flatten(1).gather(1, r.token * case.num_experts + r.expert)
    total = torch.zeros_like(r.probs[..., 0]).scatter_add(1, r.token, r.weight.masked_fill(~r.chosen, 0))[valid]
    return torch.allclose(r.weight[r.chosen], probs[r.chosen]) or torch.allclose(total, torch.ones_like(total))
