"""The record of a sparse layer, and the three numbers that losses read from it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from jaxtyping import TypeCheckError
from properties import Case, run

from switchkit import Routing, load, mean_probs, mean_square_logsumexp


@pytest.fixture
def routing() -> Routing:
    return run(Case(k=2).layer(), *Case().inputs())[1]


def test_a_record_is_frozen(routing: Routing) -> None:
    with pytest.raises(FrozenInstanceError):
        routing.k = 3


def test_numbers_are_those_of_a_loop_over_real_tokens(routing: Routing) -> None:
    groups, size, experts = routing.logits.shape
    real = [(g, s) for g in range(groups) for s in range(size) if routing.valid[g, s]]
    for e in range(experts):
        chosen = sum(
            int(routing.chosen[g, n]) for g in range(groups) for n in range(size * 2) if routing.expert[g, n] == e
        )
        assert load(routing)[e] == chosen
        mean = sum(routing.probs[g, s, e] for g, s in real) / len(real)
        torch.testing.assert_close(mean_probs(routing)[e], mean, rtol=1e-12, atol=0)
    square = sum(routing.logits[g, s].exp().sum().log() ** 2 for g, s in real) / len(real)
    torch.testing.assert_close(mean_square_logsumexp(routing), square, rtol=1e-12, atol=0)


def test_without_a_real_token_they_are_zero(routing: Routing) -> None:
    nothing = replace(routing, valid=torch.zeros_like(routing.valid))
    assert (mean_probs(nothing) == 0).all()
    assert mean_square_logsumexp(nothing) == 0


def test_load_before_placing_says_what_to_do(routing: Routing) -> None:
    with pytest.raises(ValueError, match=r"call capacity\.place"):
        load(replace(routing, load=None))


def test_shapes_are_checked_in_tests(routing: Routing) -> None:
    """The checks of `shapes.py` are at work, so a wrong shape anywhere in the suite is an error."""
    with pytest.raises(TypeCheckError):
        replace(routing, weight=routing.weight[:, 1:])
    with pytest.raises(TypeCheckError):
        replace(routing, expert=routing.expert.double())
