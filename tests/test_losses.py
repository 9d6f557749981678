"""Losses on routing records; closed forms and invariances are in the contract."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from properties import Case, collapsed, run

from switchkit import Balance, Loss, RouterZ, load, named
from switchkit.losses.base import over_layers

LOSSES = list(named(Loss).values())


def routings(number: int = 3) -> list:
    return [run(Case(k=2, seed=seed).layer(), *Case(seed=seed).inputs())[1] for seed in range(number)]


@pytest.mark.parametrize("cls", LOSSES, ids=lambda cls: cls.__name__)
def test_layers_are_averaged_or_added_one_by_one(cls: type[Loss]) -> None:
    records = routings()
    alone = torch.stack([cls()([r]) for r in records])
    assert oracle.error(cls()(records), alone.mean()) < 1e-12
    assert oracle.error(cls(layers="sum")(records), alone.sum()) < 1e-12


@pytest.mark.parametrize("cls", LOSSES, ids=lambda cls: cls.__name__)
def test_a_model_without_sparse_layers_has_no_loss(cls: type[Loss]) -> None:
    assert cls()([]) == 0
    assert cls()(()) == 0


@pytest.mark.parametrize("cls", LOSSES, ids=lambda cls: cls.__name__)
def test_the_weight_is_applied_outside(cls: type[Loss]) -> None:
    records = routings()
    assert torch.equal(cls(weight=0.5)(records), cls(weight=7)(records))
    assert cls(weight=0).weight == 0


def test_default_weights_are_those_of_the_papers() -> None:
    assert (Balance().weight, RouterZ().weight) == (0.01, 0.001)


def test_balance_is_its_definition() -> None:
    """E * sum_e f_e P_e, counted by hand; with scale="k" it is k times as much."""
    (record,) = routings(1)
    real = record.probs[record.valid]
    expected = 4 * sum(load(record)[e] / load(record).sum() * real[:, e].sum() / len(real) for e in range(4))
    # One part in 1e12: shares of the load in float32 would be off by 1e-8.
    assert oracle.error(Balance()([record]), expected.double()) < 1e-6
    share = load(record).double() / load(record).sum()
    assert oracle.error(Balance()([record]), 4 * (share * real.mean(0)).sum()) < 1e-12
    assert oracle.error(Balance(scale="k")([record]), 2 * Balance()([record])) < 1e-12


def test_balance_has_no_minimum_of_one() -> None:
    """A load that opposes the probabilities gives less than the uniform value: never assert the opposite."""
    record = collapsed(0)
    away = replace(record, probs=torch.tensor([0.1, 0.3, 0.3, 0.3]).double().expand(1, 6, 4))
    assert Balance()([away]) < 1


def test_balance_pushes_the_busiest_expert_down() -> None:
    record = replace(collapsed(0), logits=torch.zeros(1, 6, 4).double().requires_grad_())
    record = replace(record, probs=record.logits.softmax(-1))
    grad = oracle.gradients(Balance()([record]), logits=record.logits)["logits"]
    assert (grad[..., 0] > 0).all()
    assert (grad[..., 1:] < 0).all()


def test_losses_are_per_token_means() -> None:
    """The same tokens twice give the same loss: weights do not depend on the size of a batch."""
    layer = Case(capacity="dropless").layer()
    x, valid, ids = Case().inputs()
    _, once = run(layer, x, valid, ids)
    _, twice = run(layer, *(torch.cat([value, value]) for value in (x, valid, ids)))
    for cls in LOSSES:
        assert oracle.error(cls()([twice]), cls()([once])) < 1e-12


def test_large_logits_stay_finite() -> None:
    record = replace(collapsed(0), logits=torch.full((1, 6, 4), 1e4))
    assert RouterZ()([record]).isfinite()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Balance(-0.1), "the weight of a loss must be a finite number >= 0; got -0.1"),
        (lambda: RouterZ(float("nan")), "got nan"),
        (lambda: Balance(layers="pool"), "layers must be 'mean' or 'sum'; got 'pool'"),
        (lambda: RouterZ(layers="max"), "layers must be 'mean' or 'sum'; got 'max'"),
        (lambda: Balance(scale="two"), "scale must be 'one' or 'k'; got 'two'"),
        (lambda: over_layers([torch.zeros(())], "median"), "'mean' or 'sum'; got 'median'"),
    ],
)
def test_bad_options_are_refused(make, says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert says in str(caught.value)
