"""What a record says about itself."""

from __future__ import annotations

import math
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
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


def test_padding_is_no_bad_token() -> None:
    """Of a router whose weights are not finite any more, which scores padding badly too."""
    record = routed(Case(k=2))
    assert not record.valid.all()
    assert stats.bad_tokens(replace(record, logits=record.logits * float("nan"))) == record.valid.sum()


def test_an_expert_that_is_closed_to_a_token_makes_it_no_bad_one() -> None:
    routing = run(Case().layer(), *Case().inputs())[1]
    logits = routing.logits.detach().clone()
    logits[0, :, 1:] = -torch.inf
    assert stats.bad_tokens(replace(routing, logits=logits)) == 0
    logits[0, 0] = -torch.inf
    assert stats.bad_tokens(replace(routing, logits=logits)) == 1


def test_tokens_counts_the_real_ones() -> None:
    _, valid, _ = Case().inputs()
    assert stats.tokens(routed(Case())) == sum(valid.flatten().tolist()) < valid.numel()


def test_scores_of_certainty_and_of_none() -> None:
    """Six certain tokens; then six of probability 1/2 on two of four experts, which is ln 2 each."""
    entropy, confidence = stats.scores(collapsed(1))
    assert (entropy.item(), confidence.item()) == (0, 6)
    entropy, confidence = stats.scores(collapsed(1, k=2))
    assert entropy.item() == pytest.approx(6 * math.log(2))
    assert confidence.item() == pytest.approx(3)


def test_scores_of_gates_are_those_of_their_shares() -> None:
    """Probabilities that add up to anything, or to nothing for one token, which then counts for none."""
    record = routed(Case(k=2))
    times = torch.rand(*record.valid.shape, 1, dtype=torch.float64) + 0.1
    times[0, 0] = 0
    found = stats.scores(replace(record, probs=times * record.probs))
    real = [p for g, p in enumerate(record.probs) for p in p[record.valid[g] & (times[g, :, 0] > 0)].tolist()]
    assert len(real) == record.valid.sum() - 1
    assert found[0].item() == pytest.approx(-sum(p * math.log(p) for row in real for p in row))
    assert found[1].item() == pytest.approx(sum(max(row) for row in real))


def test_scores_of_padding_alone_are_zero() -> None:
    routing = replace(collapsed(1, k=2), valid=torch.zeros(1, 6, dtype=torch.bool))
    assert [value.item() for value in stats.scores(routing)] == [0, 0]


@pytest.mark.parametrize("group", ["sequence", "batch", 4])
def test_position_counts_within_the_sequence(group: str | int) -> None:
    routing = routed(Case(group=group))
    places = stats.position(routing, 7).flatten().tolist()
    assert places[:21] == [*range(7)] * 3
    assert stats.sequence_length(routing) == 7
    routing = replace(routing, length=None)
    if group == 4:
        with pytest.raises(ValueError, match="3 sequences are routed in 6 groups of 4 tokens"):
            stats.sequence_length(routing)
    else:
        assert stats.sequence_length(routing) == 7


def test_experts_of_a_token_are_its_chosen_ones() -> None:
    routing = routed(Case(k=2))
    expected = torch.zeros(3, 7, 4, dtype=torch.bool)
    for g in range(3):
        for n in range(14):
            if routing.chosen[g, n]:
                expected[g, routing.token[g, n], routing.expert[g, n]] = True
    assert torch.equal(stats.experts_of(routing), expected)
    assert stats.is_dropped(routing).sum() == stats.dropped(routing)


def test_joint_counts_leave_out_negative_labels() -> None:
    """Six tokens on experts 1 and 2 each: labels 0 0 1 1 1 and none."""
    found = stats.joint_counts(collapsed(1, k=2), torch.tensor([[0, 0, 1, 1, 1, -1]]), 3)
    assert found.tolist() == [[0, 0, 0], [2, 3, 0], [2, 3, 0], [0, 0, 0]]


def test_joint_counts_of_one_label_are_the_load() -> None:
    """Of the router's choice, where overflow went elsewhere too."""
    routing = routed(Case(router="switch", capacity="no_token_left_behind", capacity_options=(("eval", 1.0),)))
    assert (routing.expert != routing.asked).any()
    found = stats.joint_counts(routing, torch.zeros(3, 7, dtype=torch.long), 1)
    assert torch.equal(found.squeeze(1), stats.load(routing))
