"""Capacity policies: numbers against fractions, places against a queue."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import Case, collapsed, compiles, dispatchers_agree, equals_the_loop, run
from shapes import unchecked

import switchkit.capacity.base
from switchkit import CapacityPolicy, Dropless, Factor, Fixed, NoTokenLeftBehind, Routing, named, token_choice
from switchkit.records import sum_weights

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


@pytest.mark.parametrize("few", [0, 2**14], ids=["sorted", "counted"])
@pytest.mark.parametrize("name", [name for name in named(CapacityPolicy) if name != "no_token_left_behind"])
@settings(max_examples=60, deadline=None)
@given(lists())
def test_places_are_those_of_a_queue(name: str, few: int, drawn: tuple[Routing, int | None]) -> None:
    """Each expert has a queue per group; who was not chosen does not stand in it."""
    routing, limit = drawn
    with patch.object(switchkit.capacity.base, "FEW", few):
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


@pytest.mark.parametrize("name", list(named(CapacityPolicy)))
def test_a_routing_that_was_placed_is_left_alone(name: str) -> None:
    placed = collapsed(1)
    assert named(CapacityPolicy)[name]().place(placed, 1, training=True) is placed


@st.composite
def choices(draw: st.DrawFn) -> tuple[Routing, int]:
    """Tokens that choose their k best experts, some of them padding, for a small capacity."""
    groups, size, experts = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(2, 5))
    k = draw(st.integers(1, min(3, experts)))
    torch.manual_seed(draw(st.integers(0, 1000)))
    probs = torch.randn(groups, size, experts, dtype=torch.float64).softmax(-1)
    weight, expert = probs.topk(k, dim=-1)
    chosen = torch.rand(groups, size, k) < draw(st.sampled_from([0.6, 1.0]))
    routing = token_choice(probs.log(), probs, expert, weight, torch.rand(groups, size) < 0.8, chosen)
    return routing, draw(st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(choices(), st.sampled_from(["first_choices", "probability"]))
def test_orders_of_service(drawn: tuple[Routing, int], order: str) -> None:
    """Queues in the order that the name says, equals by arrival."""
    routing, limit = drawn
    policy = Factor(order=order)
    placed = policy.place(routing, limit, training=True)
    k = routing.k
    for g in range(routing.expert.shape[0]):
        rank = {
            "first_choices": lambda n, k=k: (n % k, n),
            "probability": lambda n, g=g: (-float(routing.weight[g, n]), n),
        }[order]
        queue = [0] * routing.logits.shape[-1]
        for n in sorted(range(routing.expert.shape[1]), key=rank):
            if routing.chosen[g, n]:
                e = int(routing.expert[g, n])
                assert placed.slot[g, n] == queue[e]
                assert bool(placed.kept[g, n]) == (queue[e] < limit)
                queue[e] += 1
        assert placed.load[g].tolist() == queue


def test_random_service_is_fair_in_training_and_by_arrival_in_evaluation() -> None:
    """8 tokens for 2 places: each gets one in a quarter of 4000 groups."""
    groups = 4000
    routing = Routing(
        logits=torch.zeros(groups, 8, 2),
        probs=torch.full((groups, 8, 2), 0.5),
        token=torch.arange(8).expand(groups, 8),
        expert=torch.zeros(groups, 8, dtype=torch.long),
        weight=torch.ones(groups, 8),
        chosen=torch.ones(groups, 8, dtype=torch.bool),
        valid=torch.ones(groups, 8, dtype=torch.bool),
        k=1,
    )
    policy = Fixed(2, 2, order="random")
    share = policy.place(routing, 2, training=True).kept.double().mean(0)
    assert ((share - 0.25).abs() <= 5 * (0.25 * 0.75 / groups) ** 0.5).all()
    assert policy.place(routing, 2, training=False).kept[0].tolist() == [True] * 2 + [False] * 6


@settings(max_examples=80, deadline=None)
@given(choices(), st.integers(1, 4))
def test_no_token_left_behind_in_rounds(drawn: tuple[Routing, int], rounds: int) -> None:
    """Appendix B as a loop: who does not fit asks the best expert not asked before, round by round."""
    routing, limit = drawn
    placed = NoTokenLeftBehind(rounds=rounds).place(routing, limit, training=True)
    k = routing.k
    for g in range(routing.expert.shape[0]):
        taken = [0] * routing.logits.shape[-1]
        chosen = [n for n in range(routing.expert.shape[1]) if routing.chosen[g, n]]
        asked = {s: {int(routing.expert[g, n]) for n in chosen if n // k == s} for s in range(routing.logits.shape[1])}
        seat: dict[int, int] = {}
        wish = {n: int(routing.expert[g, n]) for n in chosen}
        for _ in range(rounds):
            for n in chosen:
                if n not in seat and n in wish and taken[wish[n]] < limit:
                    seat[n] = wish[n]
                    assert placed.slot[g, n] == taken[wish[n]]
                    taken[wish[n]] += 1
            wish = {}
            for n in chosen:
                left = [e for e in range(len(taken)) if e not in asked[n // k]]
                if n not in seat and left:
                    wish[n] = max(left, key=lambda e, g=g, n=n: float(routing.probs[g, n // k, e]))
                    asked[n // k].add(wish[n])
        for n in range(routing.expert.shape[1]):
            assert bool(placed.kept[g, n]) == (n in seat)
            assert placed.asked is None or placed.asked[g, n] == routing.expert[g, n]
            if n in seat:
                assert placed.expert[g, n] == seat[n]
                assert abs(placed.weight[g, n] - routing.probs[g, n // k, seat[n]]) < 1e-12
            else:
                assert placed.expert[g, n] == routing.expert[g, n]
                assert placed.weight[g, n] == routing.weight[g, n]
        assert placed.taken is None or placed.taken[g].tolist() == taken
        assert placed.load[g].tolist() == [
            sum(int(routing.expert[g, n]) == e for n in chosen) for e in range(len(taken))
        ]


def test_overflow_may_go_where_the_router_sent_nothing() -> None:
    """Six tokens for expert 0, two places each: the second-best expert, below the router's threshold, takes two."""
    probs = torch.tensor([0.7, 0.2, 0.1]).expand(1, 6, 3)
    weight, expert = probs.topk(2, dim=-1)
    chosen = torch.tensor([True, False]).expand(1, 6, 2)
    routing = token_choice(probs.log(), probs, expert, weight, torch.ones(1, 6, dtype=torch.bool), chosen)
    placed = NoTokenLeftBehind().place(routing, 2, training=True)
    assert placed.taken.tolist() == [[2, 2, 2]]
    assert placed.expert[0, ::2].tolist() == [0, 0, 1, 1, 2, 2]
    assert placed.kept[0].tolist() == [True, False] * 6


def test_a_full_expert_takes_up_a_round() -> None:
    """Four tokens want expert 0 and two expert 1: the two left find 1 full in the second round, and 2 in the third."""
    probs = torch.tensor([[0.6, 0.3, 0.1]] * 4 + [[0.1, 0.6, 0.3]] * 2).unsqueeze(0)
    weight, expert = probs.topk(1, dim=-1)
    routing = token_choice(probs.log(), probs, expert, weight, torch.ones(1, 6, dtype=torch.bool))
    for rounds, taken in ((1, [2, 2, 0]), (2, [2, 2, 0]), (3, [2, 2, 2])):
        assert NoTokenLeftBehind(rounds=rounds).place(routing, 2, training=True).taken.tolist() == [taken]


def test_overflow_does_not_go_to_experts_that_are_closed_to_the_token() -> None:
    probs = torch.tensor([1.0, 0.0, 0.0]).expand(1, 6, 3)
    weight, expert = probs.topk(1, dim=-1)
    routing = token_choice(probs.log(), probs, expert, weight, torch.ones(1, 6, dtype=torch.bool))
    placed = NoTokenLeftBehind().place(routing, 2, training=True)
    assert placed.kept.tolist() == [[True] * 2 + [False] * 4]
    assert placed.taken.tolist() == [[2, 0, 0]]


def test_overflow_of_certain_tokens_has_a_finite_gradient() -> None:
    """In float32 the second choice, and every expert that it could move to, has a probability of exactly 0."""
    logits = torch.tensor([200.0, 0.0, 0.0]).repeat(1, 6, 1).requires_grad_()
    probs = logits.softmax(-1)
    weight, expert = probs.topk(2, dim=-1)
    routing = token_choice(logits, probs, expert, weight, torch.ones(1, 6, dtype=torch.bool))
    placed = NoTokenLeftBehind().place(routing, 2, training=True)
    assert placed.kept[0].tolist() == [True] * 4 + [False] * 8
    (grad,) = torch.autograd.grad(placed.weight.square().sum(), logits)
    assert grad.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_what_moves_has_the_gradient_of_where_it_went(scale: float) -> None:
    """The weight is as if the router had chosen the expert that took the token, in value and gradient."""
    logits = torch.tensor([1.0, 0.5, -0.3], dtype=torch.float64).repeat(1, 6, 1).requires_grad_()
    probs = logits.softmax(-1)
    weight, expert = probs.topk(1, dim=-1)
    routing = token_choice(logits, probs, expert, scale * weight, torch.ones(1, 6, dtype=torch.bool))
    placed = NoTokenLeftBehind().place(routing, 2, training=True)
    assert placed.expert[0].tolist() == [0, 0, 1, 1, 2, 2]
    # Losses on weights see what the router asked for.
    torch.testing.assert_close(sum_weights(placed), torch.stack([6 * scale * probs[0, 0, 0], *probs.new_zeros(2)]))
    probe = torch.randn(1, 6, dtype=torch.float64)
    wanted = scale * probs.gather(-1, placed.expert.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(placed.weight, wanted)
    both = (placed.weight, wanted)
    found, right = (torch.autograd.grad((w * probe).sum(), logits, retain_graph=True)[0] for w in both)
    torch.testing.assert_close(found, right)


def test_without_a_capacity_nothing_overflows() -> None:
    """As in evaluation by default: the record is that of a dropless layer."""
    probs = torch.tensor([[0.7, 0.2, 0.1]] * 5 + [[0.1, 0.2, 0.7]]).unsqueeze(0)
    weight, expert = probs.topk(1, dim=-1)
    routing = token_choice(probs.log(), probs, expert, weight, torch.ones(1, 6, dtype=torch.bool))
    policy = NoTokenLeftBehind()
    assert policy.limit(6, 3, 1, training=False) is None
    options = {"rounding": "floor", "minimum": 3, "multiple": 4}
    for size in (1, 9, 40):
        both = [p(1.1, 0.9, **options).limit(size, 3, 2, training=False) for p in (NoTokenLeftBehind, Factor)]
        assert both[0] == both[1]
    found, plain = (p.place(routing, None, training=False) for p in (policy, Dropless()))
    for name in ("slot", "kept", "load", "expert", "weight"):
        assert torch.equal(getattr(found, name), getattr(plain, name))
    assert found.capacity is None


def test_overflow_needs_tokens_that_choose() -> None:
    placed = collapsed(1)
    with pytest.raises(ValueError, match="needs a router whose tokens choose; take `factor`"):
        NoTokenLeftBehind().place(replace(placed, slot=None, k=None), 1, training=True)


@settings(max_examples=40, deadline=None)
@given(choices(), st.sampled_from(["arrival", "probability"]))
def test_weights_after_the_drop_sum_to_one(drawn: tuple[Routing, int], order: str) -> None:
    routing, limit = drawn
    placed = Factor(order=order).place(replace(routing, renormalize=True), limit, training=True)
    k = routing.k
    total = (placed.weight * placed.kept).unflatten(-1, (-1, k)).sum(-1)
    some = placed.kept.unflatten(-1, (-1, k)).any(-1)
    torch.testing.assert_close(total, some.double())
    plain = Factor(order=order).place(routing, limit, training=True)
    ratio = (plain.weight / placed.weight).masked_fill(~plain.kept, 0).unflatten(-1, (-1, k))
    for values in ratio.flatten(0, 1):
        assert len({round(float(v), 9) for v in values if v}) <= 1, "one factor for all choices of a token"


def test_orders_that_leak_say_so() -> None:
    for order, k, leaks in (
        ("arrival", 2, False),
        ("first_choices", 1, False),
        ("first_choices", 2, True),
        ("probability", 1, True),
        ("random", 1, True),
    ):
        assert (Factor(order=order).leaks(k) is not None) == leaks, (order, k)
        assert (Fixed(order=order).leaks(k) is not None) == leaks
        assert Factor(None, None, order=order).leaks(k) is None, "nothing is dropped"
        assert Fixed(None, None, order=order).leaks(k) is None
        for policy in (Factor, Fixed):
            assert (policy(None, 1, order=order).leaks(k) is not None) == leaks, "in evaluation"
    assert NoTokenLeftBehind().leaks(1)
    assert NoTokenLeftBehind(rounds=1).leaks(1) is None
    assert NoTokenLeftBehind(None).leaks(1) is None
    assert NoTokenLeftBehind(None, 1.0).leaks(1)


def test_the_factors_may_be_set() -> None:
    policy = Factor(1.0)
    policy.eval = 2.5
    assert [policy.limit(6, 3, 1, training=training) for training in (True, False)] == [2, 5]
    policy.train = 1.5
    assert policy.limit(6, 3, 1, training=True) == 3
    policy.train = None
    assert policy.limit(6, 3, 1, training=True) is None
    with pytest.raises(ValueError, match="capacity factor train must be a finite number > 0"):
        policy.train = 0


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
        (
            lambda: Factor(order="best"),
            "order must be 'arrival', 'first_choices', 'probability' or 'random'; got 'best'",
        ),
        (lambda: Fixed(order=None), "order must be 'arrival', 'first_choices', 'probability' or 'random'; got None"),
        (lambda: NoTokenLeftBehind(rounds=0), "rounds must be at least 1; got 0"),
        (lambda: Factor(1e30), "factor train must be at most 2147483647; got 1e+30"),
        (lambda: Factor(multiple=2**40), f"multiple must be at most 2147483647; got {2**40}"),
        (lambda: Fixed(10**30), "train capacity must be at most 2147483647"),
        (lambda: Fixed(train=2.5), "train capacity must be an integer; got 2.5"),
        (lambda: Fixed(4, True), "eval capacity must be an integer; got True"),
        (lambda: Fixed("4"), "train capacity must be an integer; got '4'"),
        (lambda: Factor(multiple=1.5), "multiple must be an integer; got 1.5"),
        (lambda: Factor(minimum=2.0), "minimum must be an integer; got 2.0"),
        (lambda: NoTokenLeftBehind(rounds=1.5), "rounds must be an integer; got 1.5"),
        (lambda: Fixed(0), "train capacity must be at least 1, or null for dropless; got 0"),
        (lambda: Fixed(4, -5), "eval capacity must be at least 1, or null for dropless; got -5"),
    ],
)
def test_bad_numbers_are_refused(make, says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert says in str(caught.value)


class Worthy(CapacityPolicy):
    """As many places as told; below a weight of 0.3 an assignment is not worth its expert's time."""

    def __init__(self, room: int | None = None) -> None:
        self.room = room

    def limit(self, S: int, E: int, K: int, *, training: bool) -> int | None:
        return self.room

    def place(self, routing: Routing, limit: int | None, *, training: bool) -> Routing:
        placed = super().place(routing, limit, training=training)
        return replace(placed, kept=placed.kept & (placed.weight > 0.3))


@pytest.mark.parametrize("room", [None, 3])
@pytest.mark.parametrize("dispatcher", ["sorted", "padded", "einsum"])
@pytest.mark.parametrize("router", ["top_k", "expert_choice"])
def test_a_policy_may_drop_more_than_the_overflow(room: int | None, dispatcher: str, router: str) -> None:
    """Outputs and gradients are those of the loop over what was kept, and the counts are those of its own loop."""
    own = {"k": 2, "options": (("normalize", "never"),)} if router == "top_k" else {}
    case = Case(router=router, capacity=Worthy, capacity_options=(("room", room),), dispatcher=dispatcher, **own)
    x, valid, ids = case.inputs()
    r = run(case.layer(), x, valid, ids)[1]
    for g in range(3):
        mine = [n for n in range(r.expert.shape[1]) if r.kept[g, n]]
        assert 0 < len(mine) < r.chosen[g].sum() - (0 if room is None else 1)
        for e in range(4):
            here = [int(r.slot[g, n]) for n in mine if r.expert[g, n] == e]
            assert here == list(range(len(here)))
            assert r.taken[g, e] == len(here)
            assert r.load[g, e] == sum(bool(r.chosen[g, n]) for n in range(len(r.expert[g])) if r.expert[g, n] == e)
    equals_the_loop(case)
    dispatchers_agree(case)


@pytest.mark.slow
def test_a_policy_of_its_own_compiles() -> None:
    compiles(Case(k=2, capacity=Worthy, options=(("normalize", "never"),)), around=unchecked)


def test_a_policy_that_leaves_fields_out_is_told() -> None:
    class Blank(Worthy):
        def place(self, routing: Routing, limit: int | None, *, training: bool) -> Routing:
            return replace(routing, slot=torch.zeros_like(routing.expert), kept=routing.chosen)

    case = Case(capacity=Blank)
    with pytest.raises(ValueError, match="Blank.place returned a routing without kept or load: give both"):
        run(case.layer(), *case.inputs())
