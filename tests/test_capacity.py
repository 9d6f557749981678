"""Capacity policies: numbers against fractions, places against a queue."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import collapsed

from switchkit import CapacityPolicy, Dropless, Factor, Fixed, Routing, named

sizes = st.tuples(st.integers(0, 5000), st.integers(1, 300), st.integers(1, 8))
factors = st.decimals("0.01", "20", places=2).map(float)


@settings(max_examples=200, deadline=None)
@given(sizes, factors, st.sampled_from(["ceil", "floor", "round"]), st.integers(1, 9), st.integers(1, 9))
def test_factor_is_its_formula_in_fractions(
    size: tuple[int, int, int], factor: float, rounding: str, minimum: int, multiple: int
) -> None:
    """factor * K * S / E, rounded, at least the minimum, then up to a multiple: 1.1 means 11/10, not its float."""
    s, e, k = size
    exact = Fraction(str(factor)) * k * s / e
    rounded = {"ceil": math.ceil, "floor": math.floor, "round": round}[rounding](exact)
    expected = math.ceil(Fraction(max(rounded, minimum), multiple)) * multiple
    policy = Factor(factor, factor, rounding=rounding, minimum=minimum, multiple=multiple)
    assert policy.limit(s, e, k, training=True) == policy.limit(s, e, k, training=False) == expected


def test_factor_of_the_paper() -> None:
    """Figure 3 of arXiv 2101.03961: six tokens, three experts; factor 1.0 gives two places each, 1.5 gives three."""
    assert Factor(1.0).limit(6, 3, 1, training=True) == 2
    assert Factor(1.5).limit(6, 3, 1, training=True) == 3


def test_factor_is_exact_where_floats_are_not() -> None:
    # 0.07 * 100 is 7.000000000000001 in floats, whose ceiling is 8.
    assert math.ceil(0.07 * 100) == 8
    assert Factor(0.07).limit(100, 1, 1, training=True) == 7


def test_rounding_at_a_half() -> None:
    def limit(rounding: str, tokens: int) -> int | None:
        return Factor(1.0, rounding=rounding).limit(tokens, 2, 1, training=True)

    assert [limit("ceil", s) for s in (5, 7)] == [3, 4]
    assert [limit("floor", s) for s in (5, 7)] == [2, 3]
    assert [limit("round", s) for s in (5, 7)] == [2, 4]


def test_a_short_sequence_keeps_one_place() -> None:
    assert Factor(1.2, rounding="floor").limit(3, 4, 1, training=True) == 1
    assert Factor(0.01).limit(1, 64, 1, training=True) == 1


def test_modes_have_their_own_numbers() -> None:
    for policy, train, evaluate in (
        (Factor(), 2, None),
        (Factor(train=None, eval=2.0), None, 2),
        (Fixed(), 64, None),
        (Fixed(3, 5), 3, 5),
        (Dropless(), None, None),
    ):
        assert policy.limit(4, 4, 1, training=True) == train
        assert policy.limit(4, 4, 1, training=False) == evaluate


@st.composite
def lists(draw: st.DrawFn) -> tuple[Routing, int | None]:
    """Up to three groups of up to twelve assignments of one token each, some of them not chosen."""
    groups, n, experts = draw(st.integers(1, 3)), draw(st.integers(0, 12)), draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 1000)))
    logits = torch.zeros(groups, n, experts)
    routing = Routing(
        logits=logits,
        probs=logits.softmax(-1),
        token=torch.arange(n).expand(groups, n),
        expert=torch.randint(0, experts, (groups, n)),
        weight=torch.ones(groups, n),
        chosen=torch.rand(groups, n) < 0.8,
        valid=torch.ones(groups, n, dtype=torch.bool),
        k=1,
    )
    return routing, draw(st.none() | st.integers(1, 6))


@pytest.mark.parametrize("name", list(named(CapacityPolicy)))
@settings(max_examples=60, deadline=None)
@given(lists())
def test_places_are_those_of_a_queue(name: str, drawn: tuple[Routing, int | None]) -> None:
    """Each expert has a queue per group; who was not chosen does not stand in it."""
    routing, limit = drawn
    placed = named(CapacityPolicy)[name]().place(routing, limit, training=True)
    groups, n = routing.expert.shape
    for g in range(groups):
        queue = [0] * routing.logits.shape[-1]
        for i in range(n):
            e = int(routing.expert[g, i])
            if not routing.chosen[g, i]:
                assert not placed.kept[g, i]
                continue
            assert placed.slot[g, i] == queue[e]
            assert bool(placed.kept[g, i]) == (limit is None or queue[e] < limit)
            queue[e] += 1
        assert placed.load[g].tolist() == queue
    assert placed.capacity == limit


def test_a_routing_that_was_placed_is_left_alone() -> None:
    placed = collapsed(1)
    assert Dropless().place(placed, 1, training=True) is placed


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Factor(-1), "factor train must be a finite number > 0, or null for dropless; got -1"),
        (lambda: Factor(0), "got 0"),
        (lambda: Factor(1.0, float("nan")), "factor eval must be a finite number > 0, or null for dropless; got nan"),
        (lambda: Factor(float("inf")), "got inf"),
        (lambda: Factor(rounding="up"), "rounding must be 'ceil', 'floor' or 'round'; got 'up'"),
        (lambda: Factor(minimum=0), "minimum must be at least 1; got 0"),
        (lambda: Factor(multiple=-8), "multiple must be at least 1; got -8"),
        (lambda: Fixed(0), "train capacity must be at least 1, or null for dropless; got 0"),
        (lambda: Fixed(4, -5), "eval capacity must be at least 1, or null for dropless; got -5"),
    ],
)
def test_bad_numbers_are_refused(make, says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert says in str(caught.value)
