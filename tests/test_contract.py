"""The contract of every part, over everything that is registered. A new part is tested by its registration alone.

What a property means is written beside it in `properties.py`.
"""

from __future__ import annotations

import properties
import pytest
import shapes
import torch
from properties import Case, takes

from switchkit import CapacityPolicy, Dispatcher, Experts, MoELayer, Router, Routing, named

# What a router may do that others may not; everything else is expected of all. `switchkit.testing.traits` finds the
# same by looking at the part, to which `test_traits_are_found` holds this table.
TRAITS = {
    "base": {"leaks", "own_weights"},  # weights are affinities of their own
    "expert_choice": {"irregular", "leaks", "places"},
    "gshard": {"draws", "several"},  # a token's second choice needs a second expert
    "noisy_top_k": {"draws"},
    "random": {"by_position", "draws"},  # decides by the place of a token, not by the token
    "relu": {"optional", "own_weights"},  # any number of experts; weights are logits
    "round_robin": {"by_position"},
    "sigmoid": {"own_weights"},
    "sinkhorn": {"leaks", "own_weights"},
    "soft": {"leaks", "mixes", "own_weights", "places"},  # slots are mixtures of tokens
}
BY_SOFTMAX = {"switch", "top_k"}  # what `oracle.paper` describes

ROUTERS = [
    (name, k)
    for name, cls in named(Router).items()
    for k in ((1, 2, 3) if name == "top_k" else (2,) if takes(cls, "k") else (None,))
]
LEARNED = [(name, k) for name, k in ROUTERS if list(named(Router)[name](4, 4).parameters())]
POLICIES = list(named(CapacityPolicy))
QUEUES = [name for name in POLICIES if name != "no_token_left_behind"]  # one try per choice
DISPATCHERS = list(named(Dispatcher))
OTHERS = [name for name in DISPATCHERS if name != "sorted"]
EXPERTS = list(named(Experts))
OPTIONS = {"bias": True, "activation": "gelu", "mix": "learned"}
ALIKE = {"gated_mlp", "linear", "mlp", "shared"}  # every routed expert does the same with the same weights
FEW = [("switch", None), ("top_k", 2)]
# One router for each shape of the list that a dispatcher meets.
LISTS = [*FEW, ("relu", 2), ("expert_choice", None), ("soft", None)]


def has(case: Case, *traits: str) -> bool:
    """Whether the router of a case has one of these traits."""
    return bool(TRAITS.get(str(case.router), set()) & set(traits))


def cases(*made: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", made, ids=str)


def everything(
    routers: list | None = None, policies: list | None = None, dispatchers: list | None = None
) -> list[Case]:
    """Every router with two policies and every policy with two routers on `sorted`, or what is given."""
    pairs = [(r, c) for r in routers or ROUTERS for c in policies or ["factor", "dropless"]]
    if routers is None and policies is None:
        pairs += [(r, c) for r in FEW for c in POLICIES if (r, c) not in pairs]
    return [Case(router=r, k=k, capacity=c, dispatcher=d) for (r, k), c in pairs for d in dispatchers or ["sorted"]]


def without(made: list[Case], *traits: str) -> list[Case]:
    """The cases whose router has none of these traits."""
    return [case for case in made if not has(case, *traits)]


def with_experts(capacity: str = "factor") -> list[Case]:
    """Every kind of experts, plain and with each of its options, over every dispatcher."""
    made = []
    for name in EXPERTS:
        given = tuple((option, value) for option, value in OPTIONS.items() if takes(named(Experts)[name], option))
        for options in dict.fromkeys([(), given]):
            for dispatcher in DISPATCHERS:
                made.append(Case(experts=name, expert_options=options, dispatcher=dispatcher, k=2, capacity=capacity))
    return made


def with_constants() -> list[Case]:
    """Null experts that return a learned vector, beside others."""
    options = (("zero", 0), ("copy", 1), ("constant", 1))
    return [Case(k=2, experts="null", expert_options=options, dispatcher=d) for d in DISPATCHERS]


def with_orders() -> list[Case]:
    """Who is served first, where half of the assignments do not fit."""
    return [
        Case(k=2, capacity_options=(("train", 0.5), ("eval", 0.5), ("order", order)), dispatcher=d)
        for order in ("first_choices", "probability", "random")
        for d in DISPATCHERS
    ]


def with_groups() -> list[Case]:
    """Capacity over the batch, and over runs of tokens that do and do not divide the 21 of the batch."""
    return [Case(k=2, group=group, dispatcher=d) for group in ("batch", 1, 3, 4, 50) for d in DISPATCHERS]


ALL = everything()
EACH = [*ALL, *everything(LISTS, ["factor", "dropless"], OTHERS), *everything(FEW, POLICIES, OTHERS)]
EACH = list(dict.fromkeys(EACH))
SERVED = [case for case in without(ALL, "places") if case.capacity in QUEUES]
PER_ROUTER = everything(policies=["factor"])
PER_DISPATCHER = everything(LISTS, ["factor"], OTHERS)
CAUSAL = [case for case in ALL if not case.layer().leaks]
LEAKING = [case for case in ALL if case.layer().leaks]
DROPPED = [
    Case(k=k, dropped=option, dispatcher=d)
    for k in (1, 2)
    for option in ("zero", "input", "weighted_input")
    for d in DISPATCHERS
]
EXPLORING = [
    Case(router="switch", options=(("jitter", 0.3),)),
    Case(router="switch", options=(("input_dropout", 0.5),)),
    Case(router="switch", options=(("sample", True), ("temperature", 2.0))),
    Case(router="top_k", k=2, options=(("jitter", 0.3),)),
    Case(router="noisy_top_k", k=1, options=(("noise", "gaussian"),)),
    *(case for case in PER_ROUTER if has(case, "draws")),
]


def in_training(made: list[Case]) -> list[Case]:
    """The cases that draw nothing, in training too: some routers decide in another way there."""
    return [*made, *(properties.replace(case, training=True) for case in without(made, "draws"))]


def on(case: Case, device: str) -> Case:
    return properties.replace(case, device=device)


class TestDecisions:
    @cases(*ALL, *with_groups(), *with_orders())
    def test_accounts_balance(self, case: Case, device: str) -> None:
        properties.accounts_balance(on(case, device), exact=not has(case, "optional"))

    @cases(*PER_ROUTER)
    def test_probabilities_add_up(self, case: Case, device: str) -> None:
        properties.probabilities_add_up(on(case, device))

    @cases(*SERVED, *with_groups(), *with_orders(), Case(capacity_options=(("eval", 0.01),)))
    def test_capacity_is_filled(self, case: Case, device: str) -> None:
        properties.capacity_is_filled(on(case, device))

    @cases(*SERVED, *with_groups())
    def test_first_come_first_served(self, case: Case, device: str) -> None:
        properties.first_come_first_served(on(case, device))

    @cases(*(Case(router="switch", dispatcher=d) for d in DISPATCHERS if d != "einsum"))
    def test_counts_are_exact(self, case: Case, device: str) -> None:
        properties.counts_are_exact(on(case, device))


class TestOutputsAndGradients:
    @cases(*EACH, *with_experts(), *with_constants(), *with_groups(), *with_orders(), *DROPPED)
    def test_equals_the_loop(self, case: Case, device: str) -> None:
        properties.equals_the_loop(on(case, device))

    @cases(*everything([(name, k) for name, k in ROUTERS if name in BY_SOFTMAX], QUEUES, DISPATCHERS))
    def test_equals_the_paper(self, case: Case, device: str) -> None:
        properties.equals_the_paper(on(case, device))

    @cases(
        *(case for case in [*EACH, *with_experts("dropless"), *with_constants()] if case.dispatcher != "einsum"),
        *(case for case in with_groups() if case.dispatcher != "einsum"),
    )
    def test_dispatchers_agree(self, case: Case, device: str) -> None:
        properties.dispatchers_agree(on(case, device))

    @cases(*PER_ROUTER, *PER_DISPATCHER, *with_experts(), *with_constants())
    def test_finite_differences_agree(self, case: Case) -> None:
        properties.finite_differences_agree(case)

    @pytest.mark.daily("switch-factor-sorted")
    @cases(Case(router="switch"), Case(k=2, capacity="dropless", dispatcher="padded"))
    def test_finite_differences_agree_entry_by_entry(self, case: Case) -> None:
        properties.finite_differences_agree(case, fast=False)

    @cases(*without([*PER_ROUTER, *PER_DISPATCHER, *with_experts()], "mixes", "several"))
    def test_one_expert_is_dense(self, case: Case, device: str) -> None:
        properties.one_expert_is_dense(on(case, device), whole=not has(case, "own_weights"))

    @cases(*without([*PER_ROUTER, *PER_DISPATCHER, *(c for c in with_experts() if c.experts in ALIKE)], "mixes"))
    def test_equal_experts_are_dense(self, case: Case, device: str) -> None:
        properties.equal_experts_are_dense(on(case, device))

    @cases(*DROPPED)
    def test_dropped_tokens_get(self, case: Case, device: str) -> None:
        properties.dropped_tokens_get(on(case, device))

    @cases(*(case for case in EACH if case.dispatcher != "einsum"))
    def test_experts_see_kept_rows_only(self, case: Case, device: str) -> None:
        properties.experts_see_kept_rows_only(on(case, device))

    @cases(*everything(LEARNED, ["factor"]), *everything(LISTS, ["factor"], OTHERS))
    def test_task_gradient_reaches_the_router(self, case: Case, device: str) -> None:
        properties.task_gradient_reaches_the_router(on(case, device))

    @cases(*everything(FEW, ["factor"], DISPATCHERS), *with_experts())
    def test_idle_experts_get_zero_gradients(self, case: Case, device: str) -> None:
        properties.idle_experts_get_zero_gradients(on(case, device))

    @cases(*(properties.replace(case, dtype=torch.float32) for case in everything(FEW, ["factor"], DISPATCHERS)))
    def test_idle_experts_get_zero_gradients_in_float32(self, case: Case, device: str) -> None:
        # float32 rows of few tokens take another path than float64 ones; widths that are multiples of 16 bytes.
        properties.idle_experts_get_zero_gradients(properties.replace(case, d_model=8, d_ff=12, device=device))

    @cases(*(case for case in with_experts() if case.dispatcher == "sorted"))
    def test_rows_of_no_expert_are_zero(self, case: Case, device: str) -> None:
        properties.rows_of_no_expert_are_zero(on(case, device))

    @cases(*PER_ROUTER, *PER_DISPATCHER, *everything([("top_k", 2)], ["dropless"], DISPATCHERS), *with_groups())
    def test_nothing_at_all_is_fine(self, case: Case, device: str) -> None:
        properties.nothing_at_all_is_fine(on(case, device))


class TestInvariance:
    @cases(*in_training(ALL), *PER_DISPATCHER, *with_groups())
    def test_padding_changes_nothing(self, case: Case, device: str) -> None:
        properties.padding_changes_nothing(on(case, device))

    @cases(*in_training(ALL), *PER_DISPATCHER)
    def test_sequences_do_not_meet(self, case: Case, device: str) -> None:
        properties.sequences_do_not_meet(on(case, device))

    @cases(*CAUSAL)
    def test_the_future_changes_nothing(self, case: Case, device: str) -> None:
        properties.the_future_changes_nothing(on(case, device))

    @cases(*LEAKING, *(case for case in with_orders() if case.dispatcher == "sorted"))
    def test_leaks_as_declared(self, case: Case, device: str) -> None:
        properties.leaks_as_declared(on(case, device))

    @cases(*without([*PER_ROUTER, *PER_DISPATCHER], "by_position"))
    def test_order_goes_with_the_tokens(self, case: Case, device: str) -> None:
        properties.order_goes_with_the_tokens(on(case, device))

    @cases(
        *with_groups(),
        *(Case(router="switch", group=4, capacity=c) for c in POLICIES),
        *(Case(router=r, k=k, group=4) for r, k in LISTS[2:]),
    )
    def test_groups_are_layers_of_their_own(self, case: Case, device: str) -> None:
        properties.groups_are_layers_of_their_own(on(case, device))


class TestLosses:
    @cases(*PER_ROUTER)
    def test_balance_is_one_when_uniform(self, case: Case, device: str) -> None:
        properties.balance_is_one_when_uniform(on(case, device))

    def test_balance_sees_collapse(self) -> None:
        properties.balance_sees_collapse()

    def test_z_loss_has_its_closed_form(self) -> None:
        properties.z_loss_has_its_closed_form()


class TestState:
    @cases(*PER_ROUTER, *PER_DISPATCHER, *EXPLORING, *with_experts(), Case(expert_options=(("dropout", 0.5),)))
    def test_evaluation_is_certain(self, case: Case, device: str) -> None:
        properties.evaluation_is_certain(on(case, device))

    @cases(*PER_ROUTER, *PER_DISPATCHER, *EXPLORING, *with_experts())
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
    def test_forward_changes_nothing(self, case: Case, dtype: torch.dtype, device: str) -> None:
        properties.forward_changes_nothing(properties.replace(case, dtype=dtype, device=device))

    @cases(*EXPLORING)
    def test_exploration_stays_in_the_router(self, case: Case, device: str) -> None:
        properties.exploration_stays_in_the_router(on(case, device))

    @cases(*PER_ROUTER, *PER_DISPATCHER, *with_experts())
    def test_routing_is_float32(self, case: Case, device: str) -> None:
        properties.routing_is_float32(on(case, device))

    @cases(*PER_ROUTER, *PER_DISPATCHER, *with_experts("dropless"))
    def test_checkpointing_changes_nothing(self, case: Case, device: str) -> None:
        properties.checkpointing_changes_nothing(on(case, device))

    # Every router, policy, dispatcher and kind of experts at least once.
    @pytest.mark.daily(
        "switch-factor-sorted",
        "top_k2-dropless-padded",
        "hash2-factor-sorted",
        "top_k2-factor-sorted-null",
    )
    @cases(
        *(case for case in PER_ROUTER if case.k in (2, None)),
        *(properties.replace(Case(router=name), training=True) for name in ("base", "sinkhorn")),
        *(Case(router="switch", capacity=c, dispatcher="padded") for c in POLICIES if c != "fixed"),
        *(Case(k=2, capacity="dropless", dispatcher=d) for d in DISPATCHERS),
        *(Case(k=2, experts=e) for e in EXPERTS if e != "mlp"),
        Case(k=2, group=4, dropped="input"),
    )
    def test_compiles(self, case: Case) -> None:
        properties.compiles(case, around=shapes.unchecked)

    @cases(*(Case(experts=name) for name in EXPERTS))
    def test_experts_start_different(self, case: Case) -> None:
        properties.experts_start_different(case)

    def test_layers_start_different(self) -> None:
        properties.layers_start_different()


@pytest.mark.parametrize(("name", "k"), ROUTERS)
def test_traits_are_found(name: str, k: int | None) -> None:
    found = properties.traits_of(Case(router=name, k=k))
    declared = TRAITS.get(name, set())
    assert declared == {
        *(
            trait
            for trait in ("by_position", "draws", "irregular", "mixes", "optional", "places")
            if getattr(found, trait)
        ),
        *({"leaks"} if found.leaks else set()),
        *(set() if found.single else {"several"}),
        *(set() if found.whole else {"own_weights"}),
    }
    assert found.uniform
    assert found.learned == ((name, k) in LEARNED)


def test_router_and_policy_work_through_their_own_doors() -> None:
    """What a user's own layer would do: limit, route, place, dispatch, combine, by hand."""
    layer = Case(k=2).layer()
    x, valid, ids = Case().inputs()
    limit = layer.capacity.limit(x.shape[1], 4, layer.router.k, training=False)
    routing: Routing = layer.router(x, limit, valid, ids)
    assert routing.slot is None
    assert routing.kept is None
    placed = layer.capacity.place(routing, limit, training=False)
    assert layer.capacity.place(placed, None, training=False) is placed
    rows = layer.dispatcher.dispatch(x, placed)
    y = layer.dispatcher.combine(layer.experts(rows), rows, placed)
    assert torch.equal(y, layer(x, valid, ids)[0])


# The layout of keys is what checkpoints are made of: adding is fine, renaming is a new format version.
KEYS = {
    **{name: ["router.weight"] for name in ("base", "expert_choice", "gshard", "local_experts", "relu", "sinkhorn")},
    **{name: ["router.weight"] for name in ("switch", "top_k")},
    **{name: [] for name in ("hash", "random", "round_robin")},
    "cosine": ["router.projection", "router.embedding", "router.log_temperature"],
    "noisy_top_k": ["router.weight", "router.noise_weight"],
    "sigmoid": ["router.weight", "router.bias"],
    "soft": ["router.phi", "router.scale"],
    "mlp": ["experts.w1", "experts.w2"],
    "gated_mlp": ["experts.w1", "experts.w2"],
    "shared": [f"experts.{part}.{key}" for part in ("routed", "shared") for key in ("w1", "w2")],
    "null": ["experts.routed.w1", "experts.routed.w2"],
    "linear": ["experts.weight"],
    "mixed": [f"experts.stacks.{stack}.{key}" for stack in (0, 1, 2) for key in ("w1", "w2")],
}


def test_every_part_has_its_keys_written_down() -> None:
    assert set(KEYS) == {*named(Router), *named(Experts)}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_the_state_are_frozen(name: str) -> None:
    kind, of = ("router", Router) if name in named(Router) else ("experts", Experts)
    layer = MoELayer(4, 3, d_ff=5, **{kind: named(of)[name]})
    assert [key for key in layer.state_dict() if key.startswith(kind)] == KEYS[name]


@pytest.mark.parametrize("name", ["mlp", "gated_mlp"])
def test_keys_of_biases_are_frozen(name: str) -> None:
    layer = Case(experts=name, expert_options=(("bias", True),)).layer()
    assert list(layer.state_dict()) == ["router.weight", *(f"experts.{key}" for key in ("w1", "w2", "b1", "b2"))]
