"""What a record says about itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from properties import Case, collapsed, run

from switchkit import RoundRobin, Routing, stats


def routed(case: Case) -> Routing:
    return run(case.layer(), *case.inputs())[1]


def test_dropped_counts_what_did_not_fit() -> None:
    routing = routed(Case(k=2))
    expected = sum(
        int(chosen) and not int(kept)
        for chosen, kept in zip(routing.chosen.flatten(), routing.kept.flatten(), strict=True)
    )
    assert stats.dropped(routing) == expected > 0
    assert stats.dropped(routed(Case(k=2, capacity="dropless"))) == 0


def test_dropped_before_placing_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"call capacity\.place"):
        stats.dropped(replace(collapsed(0), kept=None))


def test_imbalance_goes_from_one_to_the_number_of_experts() -> None:
    assert stats.imbalance(collapsed(2)) == 4
    assert stats.imbalance(collapsed(2, k=2)) == 2
    even = RoundRobin(6, 4)(torch.zeros(1, 8, 6), None, torch.ones(1, 8, dtype=torch.bool))
    from switchkit import Dropless

    assert stats.imbalance(Dropless().place(even, None, training=True)) == 1


def test_imbalance_of_nothing_is_zero() -> None:
    x, valid, _ = Case().inputs()
    assert stats.imbalance(run(Case().layer(), x, torch.zeros_like(valid))[1]) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_tokens_are_counted_where_they_are_real(bad: float) -> None:
    layer = Case().layer()
    x, valid, ids = Case().inputs()
    assert stats.bad_tokens(run(layer, x, valid, ids)[1]) == 0
    x[0, 1, 2] = x[0, 4, 0] = bad
    x[1, 6] = bad
    assert not valid[1, 6]
    y, routing = run(layer, x, valid, ids)
    assert stats.bad_tokens(routing) == 2
    # The default dispatcher keeps the damage where it is.
    assert y[1:].isfinite().all()
