"""The conformance kit: what it says of a user's part, and that it notices every fault planted in `test_faults.py`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import shapes
import test_faults
import torch
from torch import Tensor, nn

from switchkit import (
    Balance,
    CapacityPolicy,
    Dispatcher,
    ExpertChoice,
    Experts,
    Factor,
    GShard,
    Linear,
    LinearRouter,
    Loss,
    Mlp,
    Padded,
    Random,
    Router,
    RouterZ,
    Routing,
    Rows,
    Sinkhorn,
    Sorted,
    Switch,
    TopK,
    mean_probs,
    named,
    token_choice,
)
from switchkit.testing import (
    Broken,
    check_capacity,
    check_experts,
    check_loss,
    check_router,
    properties,
    run_router,
)
from switchkit.testing.cases import Case
from switchkit.testing.kit import ASKED, Result, results_of
from switchkit.testing.properties import PROPERTIES

JITTER = (Router, Switch, {"jitter": 0.3})
SWITCH, TOP_K = (Router, Switch, {}), (Router, TopK, {})
POLICY, QUEUE = (CapacityPolicy, Factor, {}), (Dispatcher, Padded, {})
EXPERTS, LAYER = (Experts, Mlp, {}), (Dispatcher, Sorted, {})
BALANCE, Z = (Loss, Balance, {}), (Loss, RouterZ, {})

# Planted fault -> the part that a user would check, with its options. `LAYER` faults are in what is around the parts,
# which is checked with the dispatcher.
CHECKED: dict[str, tuple[type, type, dict[str, Any]]] = {
    "jitter_is_in_place": JITTER,
    "jitter_in_evaluation": JITTER,
    "random_choice_in_evaluation": (Router, Random, {}),
    "router_follows_autocast": SWITCH,
    "router_converts_its_own_weight": SWITCH,
    "weights_straight_through": TOP_K,
    "weights_straight_through_too": TOP_K,
    "weights_detached": SWITCH,
    "single_weight_normalised": SWITCH,
    "weights_not_normalised": TOP_K,
    "weights_do_not_add_up_to_one": TOP_K,
    "weights_off_by_a_millionth": TOP_K,
    "softmax_over_tokens": SWITCH,
    "softmax_over_tokens_too": SWITCH,
    "leak_not_declared": (Router, ExpertChoice, {}),
    "leak_in_training_not_declared": (Router, Sinkhorn, {}),
    "leak_declared_in_vain": TOP_K,
    "padding_is_routed": TOP_K,
    "padding_takes_room": TOP_K,
    "padding_keeps_its_nan": SWITCH,
    "first_choices_before_second": POLICY,
    "probable_ones_first": POLICY,
    "last_ones_first": POLICY,
    "places_counted_over_the_batch": POLICY,
    "one_place_too_few": POLICY,
    "one_place_too_many": POLICY,
    "capacity_rounded_to_nothing": POLICY,
    "no_capacity_means_dropless": POLICY,
    "capacity_forgets_the_choices": POLICY,
    "weights_normalised_after_the_drop": POLICY,
    "load_counted_after_the_drop": POLICY,
    "counts_in_16_bits": POLICY,
    "experts_are_copies": EXPERTS,
    "expert_weights_transposed": EXPERTS,
    "rows_of_no_expert_hold_garbage": EXPERTS,
    "idle_experts_get_garbage": EXPERTS,
    "experts_skipped_without_rows": EXPERTS,
    "every_expert_computes_every_token": LAYER,
    "dropped_tokens_pass_through": LAYER,
    "second_choice_loses_its_gradient": LAYER,
    "tokens_of_the_first_sequence_for_all": QUEUE,
    "weights_forgotten": QUEUE,
    "layer_counts_in_forward": LAYER,
    "last_group_is_cut_off_from_the_start": LAYER,
    "balance_without_the_number_of_experts": BALANCE,
    "balance_pooled_over_layers": BALANCE,
    "balance_counts_padding": BALANCE,
    "z_counts_padding": Z,
    "balance_of_nothing_is_nan": BALANCE,
    "z_of_probabilities": Z,
}
FAULTS = {name.partition(",")[0]: plant for name, (plant, _) in test_faults.FAULTS.items()}


@pytest.fixture(autouse=True, scope="module")
def fast() -> Iterator[None]:
    """Shapes are checked where the parts are tested; here that takes most of the time."""
    with shapes.unchecked():
        yield


def test_every_fault_is_given_to_the_kit() -> None:
    assert set(CHECKED) == set(FAULTS)


def failures(name: str) -> Iterator[Result]:
    base, cls, options = CHECKED[name]
    # Compiling takes longer than all the rest, and shows none of these.
    return (r for r in results_of(base, cls, options, ("compiles",)) if r.status == "failed")


@pytest.mark.parametrize("name", CHECKED)
def test_kit_notices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[name](monkeypatch)
    first = next(failures(name), None)
    assert first is not None
    subject, seen, consequence = first.detail.split(": ", 2)
    assert subject == CHECKED[name][1].__name__
    assert seen
    assert consequence


def smoke(case: Case) -> None:
    """What a quick test of a layer asserts: the shape, finite numbers, something above zero, a backward pass."""
    layer = case.layer(training=True)
    x = case.inputs()[0]
    y, routing = layer(x, None, torch.zeros(x.shape[:2], dtype=torch.long))
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert (y > 0).any()
    (y.sum() + Balance()([routing]) + RouterZ()([routing])).backward()


def test_smoke_notices_few(monkeypatch: pytest.MonkeyPatch) -> None:
    noticed = []
    for name, plant in FAULTS.items():
        base, cls, options = CHECKED[name]
        part: dict[str, Any] = {"router": "switch"}
        if base is Router:
            part = {"router": cls, "options": tuple(options.items())}
        with monkeypatch.context() as patch:
            plant(patch)
            try:
                smoke(Case(capacity_options=(("train", 1.25), ("eval", 1.25)), d_ff=6, **part))
            except Exception:
                noticed.append(name)
    # Of 50, all of which the kit notices: two that index past the rows, and one whose NaN reaches an output.
    assert len(FAULTS) == 50
    assert set(noticed) == {"places_counted_over_the_batch", "one_place_too_few", "rows_of_no_expert_hold_garbage"}


# Parts of a user


class Best(LinearRouter):
    """Right, but for what a subclass gets wrong."""

    k = 1

    def forward(self, tokens: Tensor, limit: int | None, valid: Tensor, ids: Tensor | None = None) -> Routing:
        logits = self.logits(tokens)
        probs = self.probabilities(logits)
        weight, expert = probs.topk(1, dim=-1)
        return token_choice(logits, probs, expert, weight, self.real(valid))

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def real(self, valid: Tensor) -> Tensor:
        return valid


class WrongDimension(Best):
    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(1)


class CountsPadding(Best):
    def real(self, valid: Tensor) -> Tensor:
        return torch.ones_like(valid)


class RandomInEvaluation(Best):
    def probabilities(self, logits: Tensor) -> Tensor:
        return (logits + 0.1 * torch.randn_like(logits)).softmax(-1)


def test_a_right_router_passes() -> None:
    results = run_router(Best, around=shapes.unchecked)
    assert [r.detail for r in results if r.status == "failed"] == []
    assert {r.property for r in results if r.status == "skipped"} == {
        "equals_the_paper",
        "leaks_as_declared",
        "exploration_stays_in_the_router",
    }


@pytest.mark.parametrize(
    ("router", "sentence"),
    [
        (
            WrongDimension,
            r"WrongDimension: the probabilities of a token add up to [\d.]+ over the experts, 1 expected \(is the "
            r"softmax over another dimension\?\): the balance loss compares them with shares that add up to 1",
        ),
        (CountsPadding, "CountsPadding: 5 assignments were chosen for padding, none expected: tokens are lost"),
        (
            RandomInEvaluation,
            "RandomInEvaluation: evaluation draws random numbers, none expected: validation losses cannot be compared",
        ),
    ],
)
def test_a_slip_gives_its_sentence(router: type[Router], sentence: str) -> None:
    with pytest.raises(Broken, match=sentence) as broken:
        check_router(router, skip=("compiles",))
    for line in str(broken.value).splitlines():
        assert line.startswith(f"{router.__name__}: ")
        assert line.count(": ") >= 2


PADDING = (
    r"Prefers: padding changed the output of real tokens \(relative error [\d.]+, at most 1e-10 expected\): sequences "
    "of different lengths in a batch will disturb each other"
)


class Prefers(Best):
    """Counts the places of padding when it numbers the tokens."""

    def probabilities(self, logits: Tensor) -> Tensor:
        place = torch.arange(logits.shape[1], device=logits.device, dtype=logits.dtype)
        return (logits + place.view(1, -1, 1) * logits.new_tensor([0.0, 0.3, -0.3, 0.1]).view(1, 1, -1)).softmax(-1)


class Forgets(LinearRouter):
    """The two best of a token; nobody told the base class."""

    def forward(self, tokens: Tensor, limit: int | None, valid: Tensor, ids: Tensor | None = None) -> Routing:
        logits = self.logits(tokens)
        weight, expert = logits.softmax(-1).topk(min(2, self.num_experts), dim=-1)
        return token_choice(logits, logits.softmax(-1), expert, weight, valid)


class Fewer(Forgets):
    """The second one only where it is worth it."""

    def forward(self, tokens: Tensor, limit: int | None, valid: Tensor, ids: Tensor | None = None) -> Routing:
        r = super().forward(tokens, limit, valid, ids)
        second = torch.arange(r.chosen.shape[1]) % 2 == 1
        return replace(r, chosen=r.chosen & ~(second & (r.weight < 0.2)))


@pytest.mark.slow
def test_a_router_that_forgets_its_k_is_told() -> None:
    """Its capacity would be half of what it should be."""
    for router in (Forgets, Fewer):
        with pytest.raises(Broken, match=f"{router.__name__}: the router's `k` is 1, its record has k=2: capacities"):
            check_router(router, skip=("compiles",))
    for router in (Forgets, Fewer):
        told = type("Told", (router,), {"k": 2})
        check_router(told, skip=("compiles",))
    # As for relu, k may then be a mean that the router aims at.
    mean = type("Mean", (Fewer,), {"uneven": "a token may choose one expert"})
    check_router(mean, skip=("compiles",))


def test_padding_gives_its_sentence() -> None:
    with pytest.raises(Broken, match=PADDING):
        check_router(Prefers, skip=("compiles", "one_expert_is_dense"))


def test_a_part_that_raises_is_told_as_a_failure() -> None:
    class Raises(Best):
        def probabilities(self, logits: Tensor) -> Tensor:
            raise RuntimeError("no such thing")

    with pytest.raises(Broken, match="Raises: raised RuntimeError: no such thing: it cannot be built"):
        check_router(Raises)


def test_a_policy_that_moves_tokens_says_what_was_asked() -> None:
    class Next(CapacityPolicy):
        """Everything to the neighbour of the expert that the router chose."""

        def limit(self, S: int, E: int, K: int, *, training: bool) -> int | None:
            return None

        def place(self, routing: Routing, limit: int | None, *, training: bool) -> Routing:
            placed = super().place(routing, limit, training=training)
            return replace(placed, expert=(placed.expert + 1) % placed.logits.shape[-1], asked=placed.expert)

    class Hidden(Next):
        def place(self, routing: Routing, limit: int | None, *, training: bool) -> Routing:
            return replace(super().place(routing, limit, training=training), asked=None)

    check_capacity(Next, skip=("compiles",))
    with pytest.raises(Broken, match="Hidden: load counts .* where .* assignments were chosen"):
        check_capacity(Hidden, skip=("compiles",))


@pytest.mark.slow
def test_other_kinds_of_a_user() -> None:
    class Half(CapacityPolicy):
        def limit(self, S: int, E: int, K: int, *, training: bool) -> int | None:
            return max(1, K * S // (2 * E))

    class Never(Half):
        def limit(self, S: int, E: int, K: int, *, training: bool) -> int | None:
            return 0

    class Weights(Loss):
        def __init__(self) -> None:
            super().__init__(0.1)

        def __call__(self, routings: Any) -> Tensor:
            return sum(
                (r.probs.square().masked_fill(~r.valid.unsqueeze(-1), 0).sum() for r in routings), torch.zeros(())
            )

    class Padding(Weights):
        def __call__(self, routings: Any) -> Tensor:
            return sum((r.probs.square().sum() for r in routings), torch.zeros(()))

    class PaddingsExperts(Weights):
        def __call__(self, routings: Any) -> Tensor:
            terms = (nn.functional.one_hot(r.expert, 4).double().mean((0, 1)) @ mean_probs(r) for r in routings)
            return sum((term * r.valid.any() for term, r in zip(terms, routings, strict=True)), torch.zeros(()))

    class Tokens(Sorted):
        def combine(self, out: Tensor, rows: Any, routing: Routing) -> Tensor:
            return super().combine(out, rows, routing).flip(0)

    class Alone(Mlp):
        def forward(self, rows: Any) -> Tensor:
            return super().forward(rows) + 1

    check_capacity(Half, skip=("compiles",))
    with pytest.raises(Broken, match="Never: an expert has room for 0 tokens, at least 1 expected: tokens are dropped"):
        check_capacity(Never, skip=("compiles",))
    check_loss(Weights)
    with pytest.raises(Broken, match="Padding: padding that holds 100 changed the value .*: the length of the padding"):
        check_loss(Padding)
    with pytest.raises(Broken, match="PaddingsExperts: padding that holds 100 changed the value, gradient of probs"):
        check_loss(PaddingsExperts)
    first = next(r for r in results_of(Dispatcher, Tokens, {}, ("compiles",)) if r.status == "failed")
    assert first.detail.startswith(
        "Tokens: the paper's formulas give another y, gradient of x, gradient of router.weight"
    )
    first = next(r for r in results_of(Experts, Alone, {}, ("compiles",)) if r.property.startswith("rows"))
    assert first.detail.startswith("Alone: rows that belong to no expert have an output, zeros expected: ")


def asked(base: type, cls: type, *names: str, **options: Any) -> dict[str, str]:
    """What came of some properties alone."""
    others = [name for name in properties.PROPERTIES if name not in names]
    return {r.property: r.status for r in results_of(base, cls, options, others) if r.property in names}


class Late(Factor):
    """Counts the load after the drop, in training alone."""

    def __init__(self, train: float = 0.5, eval: float = 0.5) -> None:
        super().__init__(train, eval)

    def place(self, routing: Routing, limit: int | None, *, training: bool) -> Routing:
        placed = super().place(routing, limit, training=training)
        return self.trained(placed, limit) if training and limit else placed

    def trained(self, placed: Routing, limit: int) -> Routing:
        assert placed.load is not None
        return replace(placed, load=placed.load.clamp(max=limit))


class KeepsAll(Late):
    """Drops nothing in training, whatever the capacity."""

    def trained(self, placed: Routing, limit: int) -> Routing:
        return replace(super().place(placed, None, training=False), capacity=limit, kept=placed.chosen)


class Twice(Best):
    """In training a token is sent to its expert a second time; the tokens are jittered."""

    k = 2

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts, jitter=0.01)

    def forward(self, tokens: Tensor, limit: int | None, valid: Tensor, ids: Tensor | None = None) -> Routing:
        probs = (logits := self.logits(tokens)).softmax(-1)
        weight, expert = probs.topk(2, -1)
        if self.training:
            weight, expert = (value[..., :1].expand_as(value) for value in (weight, expert))
        return token_choice(logits, probs, expert, weight, valid)


class Neighbours(Mlp):
    """In training rows get the output of the expert before theirs, and rows of none get one too."""

    def forward(self, rows: Rows) -> Tensor:
        y = super().forward(rows)
        return y.roll(1, 0) + 0.1 if self.training else y


def test_what_a_part_does_in_training_alone_is_looked_at() -> None:
    assert asked(CapacityPolicy, Late, "accounts_balance") == {"accounts_balance": "failed"}
    assert asked(CapacityPolicy, KeepsAll, "capacity_is_filled") == {"capacity_is_filled": "failed"}
    assert asked(Router, Twice, "accounts_balance") == {"accounts_balance": "failed"}
    names = ("equals_the_loop", "rows_of_no_expert_are_zero")
    assert asked(Experts, Neighbours, *names) == dict.fromkeys(names, "failed")


class Centred(Best):
    """In training, with jitter, the logits of a token are told from those of the other sequences."""

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts, jitter=0.01)

    def logits(self, tokens: Tensor) -> Tensor:
        found = super().logits(tokens)
        return found - found.mean(0, keepdim=True) if self.training and len(found) else found


def test_sequences_that_meet_in_training_alone_are_seen_beside_noise() -> None:
    for router, status in ((Centred, "failed"), (Switch, "held")):
        options = {"jitter": 0.3} if router is Switch else {}
        assert asked(Router, router, "sequences_do_not_meet", **options) == {"sequences_do_not_meet": status}


class Placed(Best):
    """Decides by the token and by its place."""

    by_position = True

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts)
        self.place = nn.Parameter(torch.randn(16, num_experts))

    def forward(self, tokens: Tensor, limit: int | None, valid: Tensor, ids: Tensor | None = None) -> Routing:
        logits = self.logits(tokens) + self.place.to(tokens.dtype)[(valid.cumsum(-1) - 1).clamp(0, 15)]
        weight, expert = logits.softmax(-1).topk(1, dim=-1)
        return token_choice(logits, logits.softmax(-1), expert, weight, valid)


def test_a_router_that_says_that_it_looks_at_the_place_may() -> None:
    name = "order_goes_with_the_tokens"
    assert asked(Router, Placed, name) == {name: "skipped"}
    silent = type("Silent", (Placed,), {"by_position": False})
    assert asked(Router, silent, name) == {name: "failed"}


class UnitLength(Best):
    """An option that is named as one of others, and means the length of the tokens."""

    k = 2

    def __init__(self, d_model: int, num_experts: int, *, normalize: bool = True) -> None:
        super().__init__(d_model, num_experts)
        self.normalize = normalize

    def forward(self, tokens: Tensor, limit: int | None, valid: Tensor, ids: Tensor | None = None) -> Routing:
        logits = self.logits(nn.functional.normalize(tokens, dim=-1) if self.normalize else tokens)
        weight, expert = logits.softmax(-1).topk(min(2, self.num_experts), dim=-1)
        return token_choice(logits, logits.softmax(-1), expert, weight, valid)


def test_an_option_named_normalize_may_mean_something_else() -> None:
    assert asked(Router, UnitLength, "equal_experts_are_dense") == {"equal_experts_are_dense": "held"}


class Seldom(Best):
    """Takes any expert for one token in three hundred."""

    def forward(self, tokens: Tensor, limit: int | None, valid: Tensor, ids: Tensor | None = None) -> Routing:
        probs = (logits := self.logits(tokens)).softmax(-1)
        expert = probs.argmax(-1)
        if self.training:
            any_one = torch.randint_like(expert, self.num_experts)
            expert = torch.where(torch.rand_like(probs[..., 0]) < 0.003, any_one, expert)
        expert = expert.unsqueeze(-1)
        return token_choice(logits, probs, expert, probs.gather(-1, expert), valid)


class Overload(Loss):
    """What the mean probabilities have above twice an even share."""

    def __init__(self) -> None:
        super().__init__(0.1)

    def __call__(self, routings: Any) -> Tensor:
        return sum(((mean_probs(r) - 0.5).relu().sum() for r in routings), torch.zeros(()))


def test_what_shows_seldom_is_looked_for() -> None:
    name = "exploration_stays_in_the_router"
    assert asked(Router, Seldom, name) == {name: "held"}
    name = "loss_reaches_the_router"
    assert asked(Loss, Overload, name) == {name: "held"}


# Those that are special in some way; `test_contract.py` holds all parts to the same properties one by one.
SPECIAL = [
    *((Router, name) for name in ("expert_choice", "gshard", "soft")),
    (CapacityPolicy, "no_token_left_behind"),
    (Experts, "null"),
    *((Loss, name) for name in named(Loss)),
]


@pytest.mark.parametrize(("base", "name"), SPECIAL, ids=lambda part: getattr(part, "__name__", part))
def test_own_parts_pass(base: type, name: str) -> None:
    results = list(results_of(base, named(base)[name], {}, ("compiles",)))
    assert [r.detail for r in results if r.status == "failed"] == []
    assert sum(r.status == "held" for r in results) >= len(results) / 2


def test_what_cannot_be_asked() -> None:
    with pytest.raises(ValueError, match="expected a subclass of Router; got"):
        check_router(Mlp)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="skip names no property: no_such"):
        check_router(Switch, skip=("no_such",))
    for name in ("LossCase", "layers_start_different"):
        with pytest.raises(ValueError, match=f"skip names no property: {name}; there are accounts_balance, "):
            check_loss(Balance, skip=(name,))


def test_every_property_is_asked_of_some_part() -> None:
    parts = [Router, CapacityPolicy, Experts, Dispatcher], [Switch, Factor, Mlp, Sorted]
    kinds = [*zip(*parts, strict=True), (Loss, Balance), (Loss, RouterZ)]
    asked = {question.name for base, cls in kinds for question in ASKED[base](cls, {}, nullcontext)}
    assert asked == set(PROPERTIES)


def test_the_callers_random_numbers_stay() -> None:
    before = torch.get_rng_state()
    check_loss(RouterZ)
    assert torch.equal(before, torch.get_rng_state())


class OneEach(Experts):
    """One module for each expert, in a loop that reads the load, as in most first versions."""

    def __init__(self, d_model: int, d_ff: int, num_experts: int, *, copies: bool = False) -> None:
        super().__init__(d_model, d_ff, num_experts)
        self.each = nn.ModuleList(
            nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model)) for _ in range(num_experts)
        )
        # As long as there are experts, and as long as a token: neither is a stack of experts.
        self.gain = nn.Parameter(torch.ones(num_experts))
        self.shift = nn.Parameter(torch.full((d_model,), 0.1))
        if copies:
            for expert in self.each:
                expert.load_state_dict(self.each[0].state_dict())

    def forward(self, rows: Rows) -> Tensor:
        if rows.x.dim() == 3:
            mine = torch.arange(rows.x.shape[1]) < rows.load.unsqueeze(1)
            every = zip(self.each, self.gain, rows.x, strict=True)
            return torch.stack([e(x + self.shift) * g for e, g, x in every]) * mine.unsqueeze(-1)
        sizes = rows.load.tolist()
        *parts, rest = rows.x.split([*sizes, len(rows.x) - sum(sizes)])
        every = zip(self.each, self.gain, parts, strict=True)
        return torch.cat([*(e(x + self.shift) * g for e, g, x in every), torch.zeros_like(rest)])


@pytest.mark.slow
def test_experts_of_one_module_each_pass() -> None:
    with shapes.unchecked():
        check_experts(OneEach)


def test_experts_of_one_module_each_that_are_copies_give_their_sentence() -> None:
    with pytest.raises(
        Broken, match=r"OneEach: each\[e\]\.0\.weight of experts 1 and 0 are alike \(relative difference 0\)"
    ):
        check_experts(OneEach, skip=("compiles",), copies=True)


class Adapters(Experts):
    """One frozen base that all experts share, an adapter for each, and one learned strength of these."""

    def __init__(self, d_model: int, d_ff: int, num_experts: int) -> None:
        super().__init__(d_model, d_ff, num_experts)
        self.base = nn.Linear(d_model, d_model, bias=False).requires_grad_(False)
        self.adapters = Linear(d_model, d_ff, num_experts)
        self.strength = nn.Parameter(torch.tensor(0.5))

    def forward(self, rows: Rows) -> Tensor:
        y = self.base(rows.x) + self.strength * self.adapters(rows)
        mine = torch.arange(y.shape[-2]) < (rows.load.unsqueeze(-1) if y.dim() == 3 else rows.load.sum())
        return y * mine.unsqueeze(-1)


class Fixed(Switch):
    """Random weights that stay what they are, and a temperature that is learned."""

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts)
        self.weight.requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def logits(self, tokens: Tensor) -> Tensor:
        return super().logits(tokens) * self.log_temperature.to(torch.promote_types(tokens.dtype, torch.float32)).exp()


@pytest.mark.parametrize(
    ("check", "part", "options"),
    [
        (check_experts, Mlp, {"dropout": 0.5}),
        (check_router, GShard, {"eval_second": "threshold"}),
        (check_router, GShard, {"eval_second": "threshold", "normalize": "after"}),
    ],
    ids=["dropout", "unsent_seconds", "unsent_seconds_after"],
)
def test_what_draws_or_leaves_choices_out_passes(check: Any, part: Any, options: dict[str, Any]) -> None:
    """Dropout falls on rows, whose places later tokens move; weights of choices that are not sent are missing."""
    check(part, skip=("compiles",), **options)


def test_weights_that_do_not_add_up_are_still_seen() -> None:
    class Half(GShard):
        def forward(self, *inputs: Any) -> Routing:
            found = super().forward(*inputs)
            return replace(found, weight=found.weight / 2)

    (told,) = (r for r in run_router(Half, {"eval_second": "threshold"}) if r.property == "equal_experts_are_dense")
    assert "do not add up to 1" in told.detail


def test_numbers_that_all_experts_share_and_frozen_weights_pass() -> None:
    with shapes.unchecked():
        check_experts(Adapters, skip=("compiles",))
        check_router(Fixed, skip=("compiles",))


class OverTheStep(Loss):
    """The balance loss with the counts that the module hands over, and no default for them."""

    scope = "rank"

    def __init__(self, weight: float = 0.01) -> None:
        super().__init__(weight)

    def __call__(self, routings: Any, counts: Tensor) -> Tensor:
        return Balance(scope="rank")(routings, counts)


def test_a_loss_that_reads_the_counts_of_the_step_passes() -> None:
    check_loss(OverTheStep)


def test_a_router_that_closes_experts_passes() -> None:
    class Closing(Switch):
        """The last of several experts takes no token."""

        def logits(self, tokens: Tensor) -> Tensor:
            last = torch.arange(self.num_experts) == max(self.num_experts - 1, 1)
            return super().logits(tokens).masked_fill(last, -torch.inf)

    with shapes.unchecked():
        check_router(Closing, skip=("compiles",))


def test_routers_of_an_even_number_of_experts_pass() -> None:
    with shapes.unchecked():
        check_router(TopK, groups=2, top_groups=1, skip=("compiles",))


@pytest.mark.slow
def test_optimised_python_checks_as_much() -> None:
    code = "from switchkit.testing import check_loss\nfrom switchkit.losses.balance import Balance\n"
    code += "class Bad(Balance):\n    def __call__(self, r): return super().__call__(r) + 1\n"
    code += "check_loss(Bad)"
    done = subprocess.run(
        [sys.executable, "-O", "-c", code], capture_output=True, text=True, cwd=shapes.PACKAGE.parent, timeout=60
    )
    assert "Bad: with no sparse layer it is 1, 0 expected" in done.stderr
