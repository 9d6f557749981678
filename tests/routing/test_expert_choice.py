"""Experts that choose: against a loop, and what follows from every expert being full."""

from __future__ import annotations

import math
from dataclasses import fields

import oracle
import pytest
import torch
from torch import Tensor

from switchkit import CapacityPolicy, ExpertChoice, Factor, MoELayer, Routing

D, E = 6, 4


def make(experts: int = E, **options) -> ExpertChoice:
    router = ExpertChoice(D, experts, **options).double()
    torch.nn.init.normal_(router.weight)
    return router


def inputs() -> tuple[Tensor, Tensor]:
    """Three groups of nine tokens: full, padded on the right, padded on the left."""
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, 6:] = False
    valid[2, :7] = False
    return torch.randn(3, 9, D, dtype=torch.float64) * valid.unsqueeze(-1), valid


def decisions(r: Routing, g: int) -> dict[tuple[int, int], tuple[int, float]]:
    """(which real token, expert) -> (slot, weight) of a group."""
    order = r.valid[g].cumsum(0) - 1
    made = zip(r.token[g], r.expert[g], r.slot[g], r.weight[g].tolist(), r.chosen[g], strict=True)
    return {(int(order[t]), int(e)): (int(c), w) for t, e, c, w, chosen in made if chosen}


@pytest.mark.parametrize("real", [(0, 1), (2, 3), (0, 3), (1, 2)], ids=str)
def test_padding_comes_behind_tokens_of_probability_zero(real: tuple[int, int]) -> None:
    """In float32 the second expert's is exactly 0 for each of the two real tokens, which it takes nevertheless."""
    router = ExpertChoice(1, 2)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[200.0], [0.0]]))
    valid = torch.tensor([[place in real for place in range(4)]])
    r = router(torch.ones(1, 4, 1) * valid.unsqueeze(-1), 2, valid)
    assert r.probs[0, list(real)].tolist() == [[1, 0], [1, 0]]
    assert r.load.tolist() == [[2, 2]]


@pytest.mark.parametrize(
    ("limit", "factor"), [(None, 2.0), (None, 1.0), (None, 0.1), (None, 50.0), (1, 2.0), (20, 2.0)]
)
def test_each_expert_takes_its_best_tokens(limit: int | None, factor: float) -> None:
    """Equation 1 in a loop: softmax over experts, then for each expert the C tokens with the largest probability."""
    router, (x, valid) = make(capacity_factor=factor), inputs()
    r = router(x, limit, valid)
    capacity = min(9, math.ceil(factor * 9 / E) if limit is None else limit)
    assert r.capacity == capacity
    assert r.token.shape == (3, E * capacity)
    for g in range(3):
        real = [s for s in range(9) if valid[g, s]]
        expected, logits = {}, (x[g] @ router.weight.T).tolist()
        for e in range(E):
            p = {s: math.exp(logits[s][e]) / sum(math.exp(v) for v in logits[s]) for s in real}
            best = sorted(real, key=lambda s, p=p: -p[s])[:capacity]
            expected |= {(real.index(s), e): (c, p[s]) for c, s in enumerate(best)}
            assert r.load[g, e] == len(best)
        found = decisions(r, g)
        assert found.keys() == expected.keys()
        for key, (slot, weight) in expected.items():
            assert found[key][0] == slot
            assert found[key][1] == pytest.approx(weight, rel=1e-12)
    assert torch.equal(r.kept, r.chosen)


def test_every_expert_is_full_and_the_policy_leaves_it_alone() -> None:
    router, x = make(), torch.randn(5, 16, D, dtype=torch.float64)
    r = router(x, None, torch.ones(5, 16, dtype=torch.bool))
    assert (r.load == 8).all()
    for policy in (CapacityPolicy(), Factor(0.1)):
        assert policy.place(r, 1, training=True) is r


def test_a_policy_decides_where_it_has_a_limit() -> None:
    """`capacity_factor` serves where the policy is dropless; k choices are what the policy counts with."""
    x = torch.randn(2, 16, D)
    layer = MoELayer(D, E, d_ff=5, router=ExpertChoice, capacity=lambda: Factor(train=0.5))
    assert layer.router.k == 2
    assert layer.train()(x)[1].capacity == 4  # ceil(0.5 * 2 * 16 / 4)
    assert layer.eval()(x)[1].capacity == 8  # ceil(2.0 * 16 / 4)


@pytest.mark.parametrize(("factor", "experts", "k"), [(0.3, 4, 1), (1.6, 4, 2), (2.0, 1, 1), (3.0, 8, 3)])
def test_k_is_the_mean_number_of_choices(factor: float, experts: int, k: int) -> None:
    assert make(experts, capacity_factor=factor).k == k


def test_factors_are_exact() -> None:
    """1.1 * 100 / 5 is 22; in floats it is a little more, and one slot too many."""
    r = make(5, capacity_factor=1.1)(torch.randn(1, 100, D).double(), None, torch.ones(1, 100, dtype=torch.bool))
    assert math.ceil(1.1 * 100 / 5) == 23
    assert r.capacity == 22


def test_the_side_of_padding_changes_nothing_and_groups_do_not_meet() -> None:
    router, (x, valid) = make(), inputs()
    r = router(x, None, valid)
    for left in (True, False):
        order = valid.int().argsort(dim=1, descending=left, stable=True)
        moved = router(x.gather(1, order.unsqueeze(-1).expand_as(x)), None, valid.gather(1, order))
        for g in range(3):
            here, there = decisions(r, g), decisions(moved, g)
            assert here.keys() == there.keys()
            assert all(here[key] == pytest.approx(there[key], rel=1e-12) for key in here)
    for g in range(3):
        alone = router(x[g : g + 1], None, valid[g : g + 1])
        for field in fields(r):
            if isinstance(value := getattr(r, field.name), Tensor) and not value.is_floating_point():
                assert torch.equal(getattr(alone, field.name)[0], value[g]), field.name
        oracle.assert_same({"weight": alone.weight[0]}, {"weight": r.weight[g]}, 1e-12)


def test_weights_have_the_gradient_of_the_probabilities() -> None:
    router, (x, valid) = make(), inputs()

    def function(x: Tensor, weight: Tensor) -> Tensor:
        r = torch.func.functional_call(router, {"weight": weight}, (x, None, valid))
        return (r.weight * r.chosen).sum(-1)

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), router.weight))


def test_it_says_that_it_leaks() -> None:
    """And it does: a later token takes the place of an earlier one."""
    router = make(2, capacity_factor=1.0)
    with torch.no_grad():
        router.weight.copy_(torch.eye(2, D))
    x = torch.zeros(1, 2, D, dtype=torch.float64)
    x[0, 0, 0] = 1
    valid = torch.ones(1, 2, dtype=torch.bool)
    assert (0, 0) in decisions(router(x, None, valid), 0)
    x[0, 1, 0] = 2
    assert (0, 0) not in decisions(router(x, None, valid), 0)
    assert "later" in router.leaks


@pytest.mark.parametrize("factor", [0, -1.0, float("inf"), float("nan")])
def test_bad_factors_are_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=f"capacity_factor must be a finite number > 0.*got {factor}"):
        ExpertChoice(D, E, capacity_factor=factor)
