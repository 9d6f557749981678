"""Sinkhorn's iteration against a loop in plain numbers, and the choices that follow."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from torch import Tensor

from switchkit import Routing, Sinkhorn
from switchkit.routing.sinkhorn import sinkhorn

D, E = 6, 4


def make(**options) -> Sinkhorn:
    router = Sinkhorn(D, E, **options).double()
    torch.nn.init.normal_(router.weight)
    return router


def inputs() -> tuple[Tensor, Tensor]:
    """Three groups of nine tokens: full, padded on the right, padded on the left."""
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, 6:] = False
    valid[2, :4] = False
    return torch.randn(3, 9, D, dtype=torch.float64) * valid.unsqueeze(-1), valid


def naive(logits: list[list[float]], iterations: int) -> list[list[float]]:
    """Rows, then columns, divided by their sums, as often as it says."""
    m = [[math.exp(v) for v in row] for row in logits]
    for _ in range(iterations):
        m = [[v / sum(row) for v in row] for row in m]
        totals = [sum(column) for column in zip(*m, strict=True)]
        m = [[v / total for v, total in zip(row, totals, strict=True)] for row in m]
    return m


def choices(r: Routing, g: int) -> list[tuple[list[int], list[float]]]:
    """Experts and weights of each real token of a group."""
    shape = (*r.valid.shape, r.k)
    real = r.valid[g]
    return list(zip(r.expert.view(shape)[g][real].tolist(), r.weight.view(shape)[g][real].tolist(), strict=True))


@pytest.mark.parametrize("iterations", [1, 3, 8])
def test_sinkhorn_is_rows_and_columns_in_turn(iterations: int) -> None:
    _, valid = inputs()
    logits = 2 * torch.randn(3, 9, E, dtype=torch.float64)
    found = sinkhorn(logits, valid, iterations).exp()
    for g in range(3):
        expected = torch.tensor(naive(logits[g][valid[g]].tolist(), iterations), dtype=torch.float64)
        oracle.assert_same({"m": found[g][valid[g]]}, {"m": expected}, 1e-10)


def test_sinkhorn_evens_out_both_sides() -> None:
    """At convergence rows hold 1/n of the mass each and columns 1/E; 8 rounds come within 2 % at these logits.

    The columns, which come last, are exact after each round.
    """
    logits = 2 * torch.randn(2, 1024, 8, dtype=torch.float64) + 2 * torch.randn(8, dtype=torch.float64)
    valid = torch.ones(2, 1024, dtype=torch.bool)
    m = sinkhorn(logits, valid, 100).exp()
    m = m / m.sum((1, 2), keepdim=True)
    torch.testing.assert_close(m.sum(1), torch.full_like(m.sum(1), 1 / 8))
    torch.testing.assert_close(m.sum(2), torch.full_like(m.sum(2), 1 / 1024))
    m = sinkhorn(logits, valid, 8).exp()
    torch.testing.assert_close(m.sum(1), torch.ones_like(m.sum(1)))
    assert (m.sum(2) / 8 * 1024 - 1).abs().max() < 0.02
    rows = sinkhorn(logits, valid, 8).softmax(-1)
    assert (rows.mean(1) * 8 - 1).abs().max() < 0.02


def test_sinkhorn_takes_logits_that_no_exponential_can() -> None:
    logits = torch.randn(1, 9, E, dtype=torch.float64)
    shift = torch.tensor([0.0, 1e4, -1e4, 5e3], dtype=torch.float64)
    valid = torch.ones(1, 9, dtype=torch.bool)
    # A column's scale takes up what all its entries have in common.
    found, expected = (sinkhorn(values, valid, 200).softmax(-1) for values in (logits + shift, logits))
    oracle.assert_same({"rows": found}, {"rows": expected}, 1e-8)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_choices_follow_the_even_scores_and_weights_the_raw_ones(k: int, training: bool) -> None:
    router, (x, valid) = make(k=k).train(training), inputs()
    r = router(x, None, valid)
    for g in range(3):
        logits = (x[g] @ router.weight.T)[valid[g]].tolist()
        scores = naive(logits, 8) if training else logits
        for s, (experts, weights) in enumerate(choices(r, g)):
            assert experts == sorted(range(E), key=lambda e, row=scores[s]: -row[e])[:k]
            total = sum(math.exp(v) for v in logits[s])
            for e, weight in zip(experts, weights, strict=True):
                raw = 1 / (1 + math.exp(-logits[s][e])) if k == 1 else math.exp(logits[s][e]) / total
                assert weight == pytest.approx(raw, rel=1e-10)
    assert r.slot is None
    assert r.k == router.k == k


def test_training_is_even_where_the_best_expert_is_not() -> None:
    """One expert is everyone's favourite: evaluation follows, training shares the tokens out."""
    router = make()
    with torch.no_grad():
        router.weight[0, 0] += 3
    x = torch.randn(1, 400, D, dtype=torch.float64)
    x[..., 0] = 1
    valid = torch.ones(1, 400, dtype=torch.bool)
    most = {mode: int(torch.bincount(router.train(mode)(x, None, valid).expert[0]).max()) for mode in (True, False)}
    assert most[False] > 300
    assert most[True] < 140


def test_one_token_alone_goes_to_its_best_expert() -> None:
    router, x = make(), torch.randn(20, 3, D, dtype=torch.float64)
    valid = torch.tensor([True, False, False]).expand(20, 3)
    r = router.train()(x, None, valid)
    assert torch.equal(r.expert[:, 0], r.logits[:, 0].argmax(-1))


def test_padding_and_other_groups_change_nothing() -> None:
    router, (x, valid) = make(k=2).train(), inputs()
    r = router(x, None, valid)
    filled = router(x.masked_fill(~valid.unsqueeze(-1), 9.0), None, valid)
    for left in (True, False):
        order = valid.int().argsort(dim=1, descending=left, stable=True)
        moved = router(x.gather(1, order.unsqueeze(-1).expand_as(x)), None, valid.gather(1, order))
        for g in range(3):
            alone = router(x[g : g + 1], None, valid[g : g + 1])
            for other, at in ((moved, g), (filled, g), (alone, 0)):
                for (experts, weights), (found, values) in zip(choices(r, g), choices(other, at), strict=True):
                    assert found == experts
                    assert values == pytest.approx(weights, rel=1e-12)
    nothing = router(x, None, torch.zeros_like(valid))
    assert not nothing.chosen.any()
    assert ((nothing.expert >= 0) & (nothing.expert < E)).all()


@pytest.mark.parametrize("k", [1, 2])
def test_weights_have_their_gradient(k: int) -> None:
    router, (x, valid) = make(k=k).train(), inputs()

    def function(x: Tensor, weight: Tensor) -> Tensor:
        r = torch.func.functional_call(router, {"weight": weight}, (x, None, valid))
        return (r.weight * r.chosen).sum(-1)

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), router.weight))


def test_as_many_iterations_as_even_out_a_small_group() -> None:
    """As many tokens as experts, logits with a deviation of 2: masses of tokens within 4 %, those of experts equal."""
    logits, valid = 2 * torch.randn(20, 64, 64, dtype=torch.float64), torch.ones(20, 64, dtype=torch.bool)
    mass = sinkhorn(logits, valid, Sinkhorn(8, 64).iterations).exp()
    for found, most in ((mass.sum(-1), 0.04), (mass.sum(1), 1e-9)):
        assert (found / found.mean(-1, keepdim=True) - 1).abs().max() < most


@pytest.mark.parametrize(
    ("options", "says"), [({"k": 5}, "k=5"), ({"iterations": 0}, "iterations must be at least 1; got 0")]
)
def test_bad_options_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sinkhorn(D, E, **options)
