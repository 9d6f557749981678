"""BASE: the best of all balanced assignments, found by trying them all."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import product

import oracle
import pytest
import torch
from torch import Tensor

from switchkit import Base
from switchkit.routing.base_layer import balanced_assignment

D = 5


def make(experts: int) -> Base:
    router = Base(D, experts).double()
    torch.nn.init.normal_(router.weight)
    return router


def best(scores: list[list[float]], experts: int) -> float:
    """The highest total of an assignment that gives every expert n/E tokens, rounded down or up."""
    n = len(scores)
    totals = []
    for chosen in product(range(experts), repeat=n):
        counts = Counter(chosen)
        if all(n // experts <= counts[e] <= -(-n // experts) for e in range(experts)):
            totals.append(sum(row[e] for row, e in zip(scores, chosen, strict=True)))
    return max(totals)


@pytest.mark.parametrize("experts", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_the_total_is_the_best_of_all_even_ones(experts: int, count: int) -> None:
    """Six tokens, of which `count` are real, spread over the group."""
    scores = torch.randn(2, 6, experts, dtype=torch.float64)
    # One expert that everyone wants, by different margins.
    scores[..., 0] += 3 * torch.rand(2, 6, dtype=torch.float64)
    valid = torch.stack([torch.randperm(6) < count for _ in range(2)])
    found = balanced_assignment(scores, valid)
    for g in range(2):
        mine = scores[g][valid[g]]
        expert = found[g][valid[g]]
        load = torch.bincount(expert, minlength=experts)
        assert load.max() - load.min() <= 1
        total = mine.gather(1, expert.unsqueeze(-1)).sum().item()
        assert total == pytest.approx(best(mine.tolist(), experts), rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_weights_are_the_sigmoid_of_the_chosen_logit(training: bool) -> None:
    router, x = make(4).train(training), torch.randn(2, 8, D, dtype=torch.float64)
    valid = torch.ones(2, 8, dtype=torch.bool)
    r = router(x, None, valid)
    logits = x @ router.weight.T
    chosen = logits.gather(-1, r.expert.unsqueeze(-1)).squeeze(-1)
    oracle.assert_same({"weight": r.weight}, {"weight": 1 / (1 + (-chosen).exp())}, 1e-12)
    if training:
        assert all(Counter(row) == dict.fromkeys(range(4), 2) for row in r.expert.tolist())
    else:
        assert torch.equal(r.expert, logits.argmax(-1))


def test_padding_and_other_groups_change_nothing() -> None:
    router, x = make(3).train(), torch.randn(3, 9, D, dtype=torch.float64)
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, 6:] = False
    valid[2, :4] = False
    expert = router(x, None, valid).expert
    assert torch.equal(router(x.masked_fill(~valid.unsqueeze(-1), 9.0), None, valid).expert[valid], expert[valid])
    for left in (True, False):
        order = valid.int().argsort(dim=1, descending=left, stable=True)
        real = valid.gather(1, order)
        moved = router(x.gather(1, order.unsqueeze(-1).expand_as(x)), None, real).expert
        assert torch.equal(moved[real], expert[valid])
    for g in range(3):
        assert torch.equal(router(x[g : g + 1], None, valid[g : g + 1]).expert[0], expert[g])
    assert not router(x, None, torch.zeros_like(valid)).chosen.any()


def test_what_is_not_finite_stops_nothing() -> None:
    scores = torch.randn(1, 6, 3, dtype=torch.float64)
    scores[0, 0] = float("nan")
    scores[0, 1, 1] = float("inf")
    scores[0, 2, 2] = -float("inf")
    found = balanced_assignment(scores, torch.ones(1, 6, dtype=torch.bool))
    assert torch.bincount(found[0]).tolist() == [2, 2, 2]


def test_weights_have_their_gradient() -> None:
    router, x = make(3).train(), torch.randn(2, 6, D, dtype=torch.float64)
    valid = torch.ones(2, 6, dtype=torch.bool)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(router, {"weight": weight}, (x, None, valid)).weight

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), router.weight))


def test_training_without_scipy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation needs none."""
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    router, x = make(2), torch.randn(1, 4, D, dtype=torch.float64)
    valid = torch.ones(1, 4, dtype=torch.bool)
    router.eval()(x, None, valid)
    with pytest.raises(ImportError, match="router 'base' .* pip install 'switchkit\\[base\\]'"):
        router.train()(x, None, valid)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own compiler does
@pytest.mark.usefixtures("unchecked")
def test_training_compiles() -> None:
    """The assignment is one operator: no break in the graph."""
    router, x = make(3).train(), torch.randn(2, 6, D, dtype=torch.float64)
    valid = torch.ones(2, 6, dtype=torch.bool)
    expected = router(x, None, valid)
    found = torch.compile(router, fullgraph=True, backend="aot_eager")(x, None, valid)
    assert torch.equal(found.expert, expected.expert)
    oracle.assert_same({"weight": found.weight}, {"weight": expected.weight}, 1e-12)
