"""The properties that are asked of each kind of part, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from switchkit.capacity.base import CapacityPolicy
from switchkit.dispatch.base import Dispatcher
from switchkit.dispatch.einsum import Einsum
from switchkit.experts.base import Experts
from switchkit.losses.balance import Balance
from switchkit.losses.base import Loss
from switchkit.losses.router_z import RouterZ
from switchkit.registry import name_of, named
from switchkit.routing.base import Router
from switchkit.routing.token_choice import Switch, TopK
from switchkit.testing import properties as p
from switchkit.testing.cases import TIGHT, Case, make_equal, run, takes
from switchkit.testing.oracle import one_expert
from switchkit.testing.question import Question, Result, ask, when
from switchkit.testing.traits import traits_of

__all__ = ["ASKED", "Result", "ask_capacity", "ask_dispatcher", "ask_experts", "ask_loss", "ask_router", "results_of"]

Around = Callable[[], AbstractContextManager[Any]]


def _both(case: Case) -> list[Case]:
    """With a capacity that drops, and without."""
    return [case, replace(case, capacity="dropless", capacity_options=None)]


def _modes(cases: Sequence[Case]) -> list[Case]:
    """In evaluation, and in training, where a part may do something of its own."""
    return [*cases, *(replace(case, training=True) for case in cases)]


def _pairs(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(options.items()))


def ask_router(cls: type[Router], options: Mapping[str, Any], around: Around) -> Iterator[Question]:
    """What is asked of a router, with `options` of its constructor."""
    given = dict(options)
    k = given.pop("k", None)
    if k is None and takes(cls, "k"):
        k = 2
    case = Case(router=cls, k=k, options=_pairs(given), subject=cls.__name__)
    traits = traits_of(case)
    both = _both(case)
    modes, steady = _modes(both), not traits.draws
    placing = when(traits.places, "it places tokens itself")
    mixing = when(traits.mixes, "its slots are mixtures of tokens")
    published = cls in (Switch, TopK) and not set(given) - {"jitter", "input_dropout", "sample", "temperature"}
    exact = not traits.optional
    yield ask(p.accounts_balance, *modes, exact=exact, steady=steady and not case.layer().router.uneven)
    yield ask(p.probabilities_add_up, *_modes([case]))
    yield ask(p.capacity_is_filled, *modes, unless=placing)
    yield ask(p.first_come_first_served, *modes, unless=placing)
    yield ask(p.equals_the_loop, *modes)
    yield ask(p.equals_the_paper, *both, unless=when(not published, "the kit has no loop for its formulas"))
    yield ask(p.dispatchers_agree, *(replace(c, dispatcher=d) for c in modes for d in ("sorted", "padded")))
    yield ask(p.finite_differences_agree, case)
    alone = when(not traits.single, "it needs more than one expert")
    yield ask(p.one_expert_is_dense, case, unless=mixing or alone, whole=traits.whole)
    yield ask(p.equal_experts_are_dense, case, unless=mixing)
    yield ask(p.task_gradient_reaches_the_router, case, unless=when(not traits.learned, "it learns nothing"))
    yield ask(p.nothing_at_all_is_fine, *both)
    yield ask(p.padding_changes_nothing, *modes, steady=steady)
    yield ask(p.sequences_do_not_meet, *modes, steady=steady)
    leaks = traits.leaks
    yield ask(p.the_future_changes_nothing, *both, unless=leaks and f"it declares that it leaks: {leaks}")
    yield ask(p.leaks_as_declared, case, unless=when(not leaks, "it declares no leak"))
    placed = when(traits.by_position or cls.by_position, "it decides by the place of a token")
    yield ask(p.order_goes_with_the_tokens, case, unless=placed)
    uneven = when(not traits.uniform, "parameters of zero do not make it uniform")
    yield ask(p.balance_is_one_when_uniform, case, unless=uneven)
    yield ask(p.evaluation_is_certain, *both)
    yield ask(p.forward_changes_nothing, case, replace(case, dtype=torch.bfloat16))
    calm = when(not traits.draws, "it draws no random numbers in training")
    yield ask(p.exploration_stays_in_the_router, case, unless=calm or mixing)
    yield ask(p.routing_is_float32, case)
    yield ask(p.checkpointing_changes_nothing, case)
    yield ask(p.compiles, case, around=around)


def ask_capacity(cls: type[CapacityPolicy], options: Mapping[str, Any], around: Around) -> Iterator[Question]:
    """What is asked of a capacity policy; without options, in a size that drops some tokens, where that is known."""
    tight = dict(options) or TIGHT.get(name_of(cls), {})
    base = Case(router="switch", capacity=cls, capacity_options=_pairs(tight), subject=cls.__name__)
    cases = [base, replace(base, router="top_k", k=2)]
    small = []
    if takes(cls, "eval") and not options and "rounds" not in tight:
        # A share of the even one that would round to nothing.
        tiny = {"eval": 0.1} if isinstance(tight.get("eval"), float) else {"eval": 1}
        small = [replace(base, capacity_options=_pairs({**tight, **tiny}))]
    leaks = [(case, case.layer().leaks) for case in cases]
    honest, leaky = [c for c, reason in leaks if not reason], [c for c, reason in leaks if reason]
    moves = any(run(c.layer(), *c.inputs())[1].asked is not None for c in cases)
    moving = when(moves, "it sends overflow to other experts")
    served = when(not honest, f"it declares that it leaks: {leaks[-1][1]}")
    modes = _modes(cases)
    yield ask(p.accounts_balance, *modes)
    yield ask(p.capacity_is_filled, *modes, *small, unless=moving)
    yield ask(p.first_come_first_served, *_modes(honest), unless=moving or served)
    yield ask(p.counts_are_exact, base)
    yield ask(p.equals_the_loop, *modes)
    yield ask(p.equals_the_paper, *honest, unless=moving or served)
    yield ask(p.dispatchers_agree, *(replace(c, dispatcher=d) for c in modes for d in ("sorted", "padded")))
    yield ask(p.finite_differences_agree, *cases)
    yield ask(p.nothing_at_all_is_fine, *cases)
    yield ask(p.padding_changes_nothing, *cases)
    yield ask(p.sequences_do_not_meet, *(replace(c, dispatcher=d) for c in cases for d in ("sorted", "padded")))
    yield ask(p.the_future_changes_nothing, *honest, unless=served)
    yield ask(p.leaks_as_declared, *leaky, unless=when(not leaky, "it declares no leak"))
    yield ask(p.groups_are_layers_of_their_own, *(replace(c, group=g) for c in cases for g in ("batch", 4)))
    yield ask(p.evaluation_is_certain, *cases)
    yield ask(p.forward_changes_nothing, *cases)
    yield ask(p.checkpointing_changes_nothing, *cases)
    yield ask(p.compiles, cases[1], around=around)


def ask_experts(cls: type[Experts], options: Mapping[str, Any], around: Around) -> Iterator[Question]:
    """What is asked of experts, in both layouts of the rows."""
    base = Case(k=2, experts=cls, expert_options=_pairs(options), subject=cls.__name__)
    layouts = [replace(base, dispatcher=d) for d in ("sorted", "padded", "einsum")]
    small = [replace(c, dtype=torch.float32, d_model=8, d_ff=12) for c in layouts]
    # As wide as the tokens, so that a transposed matrix would fit.
    square = [replace(base, d_ff=base.d_model), *_both(base)]
    yield ask(p.experts_start_different, base)
    # What draws, such as dropout, gives a loop other numbers, and a row those of its place among the rows.
    draws = _draw(base)
    trained = [] if draws else [replace(c, training=True) for c in layouts]
    yield ask(p.equals_the_loop, *layouts, *square, replace(base, router="switch", k=None), *trained)
    dropless = [replace(c, capacity="dropless") for c in layouts[:2]]
    yield ask(p.dispatchers_agree, *dropless, *layouts[:2], *trained[:2])
    yield ask(p.finite_differences_agree, *layouts)
    yield ask(p.one_expert_is_dense, *layouts)
    differ = when(not _alike(base), "its experts differ in more than their weights")
    yield ask(p.equal_experts_are_dense, *layouts, unless=differ)
    yield ask(p.idle_experts_get_zero_gradients, *layouts, *small, replace(base, router="switch", k=None))
    yield ask(p.rows_of_no_expert_are_zero, *_modes([base]))
    yield ask(p.nothing_at_all_is_fine, *layouts, replace(base, router="switch", k=None))
    yield ask(p.padding_changes_nothing, *layouts)
    yield ask(p.sequences_do_not_meet, *layouts)
    yield ask(p.the_future_changes_nothing, base, modes=(False,) if draws else (False, True))
    yield ask(p.evaluation_is_certain, *layouts)
    yield ask(p.forward_changes_nothing, base, replace(base, dtype=torch.bfloat16))
    yield ask(p.routing_is_float32, *layouts)
    yield ask(p.checkpointing_changes_nothing, *layouts)
    yield ask(p.compiles, base, around=around)


def _alike(case: Case) -> bool:
    """Whether all experts do the same to a token once they have the same weights."""
    layer = case.layer()
    make_equal(layer.experts)
    token = case.inputs()[0][0, 0]
    first, *others = (one_expert(layer.experts, e, token) for e in range(case.num_experts))
    return all(torch.allclose(first, other) for other in others)


def _draw(case: Case) -> bool:
    """Whether the experts draw random numbers in training."""
    layer, inputs = case.layer(training=True), case.inputs()
    before = torch.get_rng_state()
    layer(*inputs)
    return not torch.equal(before, torch.get_rng_state())


def ask_dispatcher(cls: type[Dispatcher], options: Mapping[str, Any], around: Around) -> Iterator[Question]:
    """What is asked of a dispatcher: it in a whole layer with every router, policy and kind of experts of switchkit."""
    make: Any = partial(cls, **options) if options else cls
    base = Case(k=2, dispatcher=make, subject=cls.__name__)
    routers = [
        replace(base, router=name, k=2 if takes(router, "k") else None)
        for name, router in named(Router).items()
        if _ours(router)
    ]
    layers = [c for case in routers for c in _both(case)]
    layers += [replace(base, capacity=name) for name, policy in named(CapacityPolicy).items() if _ours(policy)]
    layers += [replace(base, experts=name) for name, experts in named(Experts).items() if _ours(experts)]
    grouped = [replace(base, group=group) for group in ("batch", 1, 3, 4, 50)]
    dropped = [replace(base, k=k, dropped=option) for k in (1, 2) for option in ("zero", "input", "weighted_input")]
    one = replace(base, router="switch", k=None)
    oracle = when(issubclass(cls, Einsum), "it is the one that others are held to, and computes every slot")
    yield ask(p.forward_changes_nothing, base, one)
    yield ask(p.equals_the_paper, *_both(one), *_both(base))
    yield ask(p.dropped_tokens_get, *dropped, one)
    yield ask(p.experts_see_kept_rows_only, *layers, unless=oracle)
    yield ask(p.counts_are_exact, base, unless=oracle)
    yield ask(p.idle_experts_get_zero_gradients, base, one)
    yield ask(p.nothing_at_all_is_fine, *routers)
    yield ask(p.padding_changes_nothing, *_both(base), *_both(one))
    yield ask(p.sequences_do_not_meet, *_both(base), *_both(one))
    yield ask(p.the_future_changes_nothing, *_both(base), *_both(one))
    yield ask(p.groups_are_layers_of_their_own, *grouped, replace(one, group=4))
    yield ask(p.evaluation_is_certain, base)
    yield ask(p.routing_is_float32, base)
    yield ask(p.checkpointing_changes_nothing, base)
    # What takes seconds comes last.
    yield ask(p.dispatchers_agree, *layers, *grouped, unless=oracle)
    yield ask(p.equals_the_loop, *layers, *grouped, *dropped)
    yield ask(p.finite_differences_agree, *routers)
    yield ask(p.compiles, replace(base, capacity="dropless"), base, around=around)


def _ours(cls: type) -> bool:
    return cls.__module__.startswith("switchkit.")


# Routers in the order in which a loss is tried on their records: some losses read what one router alone provides.
READABLE = ("top_k", "noisy_top_k", "relu", "soft")


def ask_loss(cls: type[Loss], options: Mapping[str, Any], around: Around) -> Iterator[Question]:
    """What is asked of a loss, on records of the first router whose records it reads (option `router`: of that one)."""
    given = dict(options)
    router = given.pop("router", None)
    make: Callable[..., Loss] = partial(cls, **given)
    cases = [p.LossCase(make, _record_of(name), cls.__name__) for name in ([router] if router else READABLE)]
    case = next((c for c in cases if _reads(c)), cases[0])
    pooled = given.get("layers") == "pooled"
    yield ask(p.loss_of_nothing_is_zero, case)
    yield ask(p.loss_ignores_padding, case)
    yield ask(p.layers_do_not_cancel, case, unless=when(pooled, "layers='pooled' was asked for"))
    yield ask(p.loss_changes_nothing, case)
    yield ask(p.loss_reaches_the_router, case)
    yield ask(p.loss_gradient_agrees, case)
    if cls is Balance and not given:
        yield ask(p.balance_is_one_when_uniform, replace(case.case, subject=cls.__name__))
        yield ask(p.balance_sees_collapse, cls)
        yield ask(p.equals_the_paper, *_both(case.case))
    if cls is RouterZ and not given:
        yield ask(p.z_loss_has_its_closed_form, cls)
        yield ask(p.equals_the_paper, *_both(case.case))


def _record_of(router: str | type[Router]) -> Case:
    cls = named(Router)[router] if isinstance(router, str) else router
    return Case(router=router, k=2 if takes(cls, "k") else None)


def _reads(case: p.LossCase) -> bool:
    try:
        value = case.loss()([case.record()])
    except ValueError:
        return False
    return value.requires_grad


ASKED: dict[type, Callable[[Any, Mapping[str, Any], Around], Iterator[Question]]] = {
    Router: ask_router,
    CapacityPolicy: ask_capacity,
    Experts: ask_experts,
    Loss: ask_loss,
    Dispatcher: ask_dispatcher,
}
"""Base class of a kind of part -> what is asked of one."""


def results_of(
    base: type, cls: type, options: Mapping[str, Any], skip: Sequence[str], around: Around = nullcontext
) -> Iterator[Result]:
    """The properties of a part one by one, each when it is asked for."""
    unknown = set(skip) - set(p.PROPERTIES)
    if unknown:
        raise ValueError(f"skip names no property: {', '.join(sorted(unknown))}; there are {', '.join(p.PROPERTIES)}")
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"expected a subclass of {base.__name__}; got {cls!r}")
    start = time.perf_counter()
    try:
        for question in ASKED[base](cls, options, around):
            with _calm():
                result = question.answer(cls.__name__, skip)
            yield result
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        told = f"{cls.__name__}: raised {what}: it cannot be built, or stops at its first batch"
        yield Result("builds_and_runs", "failed", told, time.perf_counter() - start)


def _calm() -> AbstractContextManager[Any]:
    """The caller's random numbers and gradients stay as they are."""
    return torch.random.fork_rng(devices=[])
