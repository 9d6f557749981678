"""Planted faults, most of them found in published code, and the property that notices each.

A tolerance proves nothing until something fails it. Every test breaks one function and expects the property, which
`test_contract.py` holds every part to, to fail. (All of them pass before: `test_nothing_is_noticed_without_a_fault`.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import properties
import pytest
import torch
import torch.nn.functional as F
from properties import Broken, Case
from torch import Tensor

import switchkit.capacity.base
import switchkit.dispatch.padded
import switchkit.dispatch.sorted
import switchkit.experts.feed_forward
import switchkit.experts.grouped
import switchkit.layers
import switchkit.losses.balance
import switchkit.losses.router_z
import switchkit.routing.token_choice
import switchkit.routing.unlearned
from switchkit import (
    Balance,
    Einsum,
    ExpertChoice,
    Factor,
    Mlp,
    MoELayer,
    Padded,
    Router,
    Routing,
    Sinkhorn,
    Sorted,
    Switch,
    TopK,
    load,
    named,
)
from switchkit.routing.base import LinearRouter

place_by_arrival = switchkit.capacity.base.place_by_arrival
token_choice = switchkit.routing.token_choice.token_choice
Plant = Callable[[pytest.MonkeyPatch], None]
Check = Callable[[], None]

FAULTS: dict[str, tuple[Plant, Check]] = {}


def fault(check: Callable[..., None], *given: Any) -> Callable[[Plant], Plant]:
    """Register a planted fault, with the property that must notice it."""

    def add(plant: Plant) -> Plant:
        FAULTS[f"{plant.__name__}, by {check.__name__}"] = (plant, lambda: check(*given))
        return plant

    return add


SWITCH = Case(router="switch")
TOP2 = Case(k=2)


# Routers


@fault(properties.exploration_stays_in_the_router, Case(router="switch", options=(("jitter", 0.3),)))
def jitter_is_in_place(patch: pytest.MonkeyPatch) -> None:
    # Hugging Face: hidden_states *= noise, so that experts get the noise too.
    def logits(self: LinearRouter, tokens: Tensor) -> Tensor:
        if self.training:
            tokens *= torch.empty_like(tokens).uniform_(1 - self.jitter, 1 + self.jitter)
        return F.linear(tokens, self.weight)

    patch.setattr(LinearRouter, "logits", logits)


@fault(properties.evaluation_is_certain, Case(router="switch", options=(("jitter", 0.3),)))
def jitter_in_evaluation(patch: pytest.MonkeyPatch) -> None:
    def logits(self: LinearRouter, tokens: Tensor) -> Tensor:
        return F.linear(tokens * torch.empty_like(tokens).uniform_(1 - self.jitter, 1 + self.jitter), self.weight)

    patch.setattr(LinearRouter, "logits", logits)


@fault(properties.evaluation_is_certain, Case(router="random", k=2))
def random_choice_in_evaluation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(switchkit.routing.unlearned, "scramble", lambda x: torch.rand(x.shape))


@fault(properties.routing_is_float32, SWITCH)
def router_follows_autocast(patch: pytest.MonkeyPatch) -> None:
    # Hugging Face: router_dtype="float32" is not honoured under autocast.
    class Unprotected:
        """torch, but for a layer that leaves autocast on."""

        autocast = staticmethod(lambda *_, **__: nullcontext())
        __getattr__ = staticmethod(lambda name: getattr(torch, name))

    patch.setattr(switchkit.layers, "torch", Unprotected())
    patch.setattr(LinearRouter, "logits", lambda self, tokens: F.linear(tokens, self.weight).float())


@fault(properties.forward_changes_nothing, replace(SWITCH, dtype=torch.bfloat16))
def router_converts_its_own_weight(patch: pytest.MonkeyPatch) -> None:
    # Hugging Face: self.classifier = self.classifier.to(float32) inside forward.
    right = LinearRouter.logits

    def logits(self: LinearRouter, tokens: Tensor) -> Tensor:
        self.float()
        return right(self, tokens)

    patch.setattr(LinearRouter, "logits", logits)


def _with_weights(patch: pytest.MonkeyPatch, change: Callable[..., Tensor]) -> None:
    """Token choice with other weights: `change(weight, logits, probs, expert)`."""

    def changed(
        logits: Tensor, probs: Tensor, expert: Tensor, weight: Tensor, valid: Tensor, *rest: Any, **more: Any
    ) -> Routing:
        return token_choice(logits, probs, expert, change(weight, logits, probs, expert), valid, *rest, **more)

    patch.setattr(switchkit.routing.token_choice, "token_choice", changed)


@fault(properties.equals_the_paper, TOP2)
def weights_straight_through(patch: pytest.MonkeyPatch) -> None:
    # st-moe-pytorch: right values, but a gradient that finite differences do not confirm.
    _with_weights(patch, lambda w, logits, probs, expert: w.detach() + _no_value(probs.gather(-1, expert)))


@fault(properties.finite_differences_agree, TOP2)
def weights_straight_through_too(patch: pytest.MonkeyPatch) -> None:
    weights_straight_through(patch)


def _no_value(x: Tensor) -> Tensor:
    return x - x.detach()


@fault(properties.task_gradient_reaches_the_router, SWITCH)
def weights_detached(patch: pytest.MonkeyPatch) -> None:
    _with_weights(patch, lambda w, *_: w.detach())


@fault(properties.task_gradient_reaches_the_router, SWITCH)
def single_weight_normalised(patch: pytest.MonkeyPatch) -> None:
    # p / p = 1: the router of a single choice learns nothing from the task.
    _with_weights(patch, lambda w, *_: w / w.sum(-1, keepdim=True))


@fault(properties.equals_the_paper, TOP2)
def weights_not_normalised(patch: pytest.MonkeyPatch) -> None:
    _with_weights(patch, lambda w, logits, probs, expert: probs.gather(-1, expert))


@fault(properties.equal_experts_are_dense, TOP2)
def weights_do_not_add_up_to_one(patch: pytest.MonkeyPatch) -> None:
    weights_not_normalised(patch)


@fault(properties.equals_the_paper, TOP2)
def weights_off_by_a_millionth(patch: pytest.MonkeyPatch) -> None:
    _with_weights(patch, lambda w, *_: w * (1 + 1e-6))


@fault(properties.equals_the_paper, SWITCH)
def softmax_over_tokens(patch: pytest.MonkeyPatch) -> None:
    # The wrong axis: also found in Hugging Face, as a transposed routing.
    def forward(self: Switch, tokens: Tensor, limit: int | None, valid: Tensor, ids: Tensor | None = None) -> Any:
        logits = self.logits(tokens)
        probs = logits.softmax(1)
        expert = probs.argmax(-1, keepdim=True)
        return token_choice(logits, probs, expert, probs.gather(-1, expert), valid)

    patch.setattr(Switch, "forward", forward)


@fault(properties.probabilities_add_up, SWITCH)
def softmax_over_tokens_too(patch: pytest.MonkeyPatch) -> None:
    softmax_over_tokens(patch)


@fault(properties.the_future_changes_nothing, Case(router="expert_choice"))
def leak_not_declared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ExpertChoice, "leaks", None)


@fault(properties.the_future_changes_nothing, Case(router="sinkhorn", k=1))
def leak_in_training_not_declared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sinkhorn, "leaks", None)


@fault(properties.leaks_as_declared, TOP2)
def leak_declared_in_vain(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TopK, "leaks", "the best experts of a token depend on all others")


@fault(properties.accounts_balance, TOP2)
def padding_is_routed(patch: pytest.MonkeyPatch) -> None:
    # Hugging Face: router_ignore_padding_tokens is stored and never used.
    def ignorant(*args: Tensor, **more: Any) -> Any:
        routing = token_choice(*args, **more)
        return replace(routing, chosen=torch.ones_like(routing.chosen))

    patch.setattr(switchkit.routing.token_choice, "token_choice", ignorant)


@fault(properties.padding_changes_nothing, TOP2)
def padding_takes_room(patch: pytest.MonkeyPatch) -> None:
    padding_is_routed(patch)


@fault(properties.padding_changes_nothing, SWITCH)
def padding_keeps_its_nan(patch: pytest.MonkeyPatch) -> None:
    # 0 * NaN = NaN: one bad token makes a weight gradient NaN, though no loss is computed on it.
    right = LinearRouter.logits

    def logits(self: LinearRouter, tokens: Tensor) -> Tensor:
        hole = torch.where(tokens == 0, float("nan"), 0.0).detach()
        return right(self, tokens + hole)

    patch.setattr(LinearRouter, "logits", logits)


# Capacity


def _other_order(patch: pytest.MonkeyPatch, priority: Callable[[Routing], Tensor]) -> None:
    """Who comes first is decided by the largest `priority` [G, N]."""

    def place(routing: Routing, limit: int | None) -> Routing:
        order = priority(routing).argsort(dim=1, descending=True, stable=True)
        fields = ("token", "expert", "weight", "chosen")
        placed = place_by_arrival(replace(routing, **{f: getattr(routing, f).gather(1, order) for f in fields}), limit)
        back = order.argsort(1)
        fields += ("slot", "kept")
        return replace(placed, **{f: getattr(placed, f).gather(1, back) for f in fields})

    patch.setattr(switchkit.capacity.base, "place_by_arrival", place)


@fault(properties.the_future_changes_nothing, TOP2)
def first_choices_before_second(patch: pytest.MonkeyPatch) -> None:
    # GShard, Mesh TensorFlow, flaxformer: not causal for k >= 2.
    _other_order(patch, lambda r: -(torch.arange(r.token.shape[1]) % r.k).expand_as(r.token))


@fault(properties.the_future_changes_nothing, SWITCH)
def probable_ones_first(patch: pytest.MonkeyPatch) -> None:
    # Batch-prioritised routing, Megatron's default drop policy: not causal.
    _other_order(patch, lambda r: r.weight)


@fault(properties.first_come_first_served, SWITCH)
def last_ones_first(patch: pytest.MonkeyPatch) -> None:
    _other_order(patch, lambda r: r.token)


@fault(properties.sequences_do_not_meet, replace(SWITCH, dispatcher="padded"))
def places_counted_over_the_batch(patch: pytest.MonkeyPatch) -> None:
    def place(routing: Routing, limit: int | None) -> Routing:
        placed = place_by_arrival(routing, limit)
        slot = placed.slot + (placed.load.cumsum(0) - placed.load).gather(1, routing.expert)
        return replace(placed, kept=routing.chosen & (slot < limit))

    patch.setattr(switchkit.capacity.base, "place_by_arrival", place)


@fault(properties.capacity_is_filled, replace(SWITCH, dispatcher="padded"))
def one_place_too_few(patch: pytest.MonkeyPatch) -> None:
    def place(routing: Routing, limit: int | None) -> Routing:
        placed = place_by_arrival(routing, limit)
        return replace(placed, kept=placed.kept & (placed.slot < limit - 1))

    patch.setattr(switchkit.capacity.base, "place_by_arrival", place)


@fault(properties.capacity_is_filled, replace(TOP2, dispatcher="padded"))
def one_place_too_many(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        switchkit.capacity.base, "place_by_arrival", lambda r, c: replace(place_by_arrival(r, c + 1), capacity=c)
    )


def _limit(patch: pytest.MonkeyPatch, limit: Callable[[float], int | None]) -> None:
    patch.setattr(Factor, "limit", lambda self, S, E, K, *, training: limit(self.eval * K * S / E))


SMALL = replace(SWITCH, capacity_options=(("eval", 0.1),))


@fault(properties.capacity_is_filled, SMALL)
def capacity_rounded_to_nothing(patch: pytest.MonkeyPatch) -> None:
    # labml: int(factor * T / E) is 0 for a short sequence, and everything is dropped.
    _limit(patch, int)


@fault(properties.capacity_is_filled, SMALL)
def no_capacity_means_dropless(patch: pytest.MonkeyPatch) -> None:
    # megablocks: a capacity that computes to 0 keeps everything.
    _limit(patch, lambda exact: int(exact) or None)


@fault(properties.capacity_is_filled, TOP2)
def capacity_forgets_the_choices(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Factor, "limit", lambda self, S, E, K, *, training: max(1, math.ceil(self.eval * S / E)))


@fault(properties.equals_the_paper, TOP2)
def weights_normalised_after_the_drop(patch: pytest.MonkeyPatch) -> None:
    def place(routing: Routing, limit: int | None) -> Routing:
        placed = place_by_arrival(routing, limit)
        weight = (placed.weight * placed.kept).view(*placed.valid.shape, -1)
        return replace(placed, weight=(weight / weight.sum(-1, keepdim=True).clamp(min=1e-9)).flatten(1))

    patch.setattr(switchkit.capacity.base, "place_by_arrival", place)


@fault(properties.accounts_balance, SWITCH)
def load_counted_after_the_drop(patch: pytest.MonkeyPatch) -> None:
    def place(routing: Routing, limit: int | None) -> Routing:
        placed = place_by_arrival(routing, limit)
        return replace(placed, load=placed.load.clamp(max=limit))

    patch.setattr(switchkit.capacity.base, "place_by_arrival", place)


@fault(properties.counts_are_exact, SWITCH)
def counts_in_16_bits(patch: pytest.MonkeyPatch) -> None:
    # labml keeps counts in the dtype of the activations; a bfloat16 running sum stops at 256.
    def place(routing: Routing, limit: int | None) -> Routing:
        hot = F.one_hot(routing.expert, routing.logits.shape[-1]) * routing.chosen.unsqueeze(-1)
        slot = (hot.to(torch.bfloat16).cumsum(1) * hot).sum(-1).long() - 1
        placed = place_by_arrival(routing, limit)
        return replace(placed, slot=slot, kept=routing.chosen & (slot < limit))

    patch.setattr(switchkit.capacity.base, "place_by_arrival", place)


# Experts


@fault(properties.experts_start_different, SWITCH)
def experts_are_copies(patch: pytest.MonkeyPatch) -> None:
    right = Mlp.reset_parameters

    def reset_parameters(self: Mlp) -> None:
        right(self)
        for weight in (self.w1, self.w2):
            weight.data.copy_(weight.data[:1].expand_as(weight))

    patch.setattr(Mlp, "reset_parameters", reset_parameters)


@fault(properties.equals_the_loop, replace(SWITCH, d_ff=6))
def expert_weights_transposed(patch: pytest.MonkeyPatch) -> None:
    right = switchkit.experts.grouped._products
    patch.setattr(
        switchkit.experts.grouped, "_products", lambda x, weight, sizes: right(x, weight.transpose(1, 2), sizes)
    )


def _garbage(x: Tensor, sizes: tuple[int, ...], out: Tensor) -> Tensor:
    return torch.cat([out[: sum(sizes)], torch.full_like(out[sum(sizes) :], float("nan"))])


@fault(properties.equals_the_loop, SWITCH)
def rows_of_no_expert_hold_garbage(patch: pytest.MonkeyPatch) -> None:
    # torch._grouped_mm leaves them as the memory was, in outputs and in the gradient.
    right = switchkit.experts.grouped._products
    patch.setattr(
        switchkit.experts.grouped, "_products", lambda x, weight, sizes: _garbage(x, sizes, right(x, weight, sizes))
    )


@fault(properties.idle_experts_get_zero_gradients, SWITCH)
def idle_experts_get_garbage(patch: pytest.MonkeyPatch) -> None:
    right = switchkit.experts.grouped._weight_gradient

    def weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
        idle = torch.tensor(sizes) == 0
        return right(x, grad, weight, sizes).masked_fill(idle.view(-1, 1, 1), float("nan"))

    patch.setattr(switchkit.experts.grouped, "_weight_gradient", weight_gradient)


@fault(properties.nothing_at_all_is_fine, SWITCH)
def experts_skipped_without_rows(patch: pytest.MonkeyPatch) -> None:
    # No gradient instead of a zero one: DDP waits for it, or stops.
    right = Mlp.forward
    patch.setattr(Mlp, "forward", lambda self, rows: right(self, rows) if rows.load.any() else rows.x * 0)


@fault(properties.experts_see_kept_rows_only, SWITCH)
def every_expert_computes_every_token(patch: pytest.MonkeyPatch) -> None:
    for method in ("dispatch", "combine"):
        patch.setattr(Sorted, method, getattr(Einsum, method))


# Dispatch


@fault(properties.dropped_tokens_get, SWITCH)
def dropped_tokens_pass_through(patch: pytest.MonkeyPatch) -> None:
    # labml: p * x for a dropped token, to which the residual adds x again.
    right = MoELayer.__init__

    def init(self: MoELayer, *args: Any, **options: Any) -> None:
        right(self, *args, **{**options, "dropped": "weighted_input"})

    patch.setattr(MoELayer, "__init__", init)


@fault(properties.dispatchers_agree, TOP2)
def second_choice_loses_its_gradient(patch: pytest.MonkeyPatch) -> None:
    # Right outputs, wrong gradient of the tokens: only gradients show it.
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (row,) = ctx.saved_tensors
        return grad.index_select(0, row.view(-1, ctx.k)[:, 0]).view(ctx.size), None, None, None, None

    patch.setattr(switchkit.dispatch.sorted._Take, "backward", staticmethod(backward))


@fault(properties.equals_the_loop, replace(TOP2, dispatcher="padded"))
def tokens_of_the_first_sequence_for_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(switchkit.dispatch.padded, "flat_tokens", lambda routing: routing.token)


@fault(properties.equals_the_loop, replace(SWITCH, dispatcher="padded"))
def weights_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = Padded.combine
    patch.setattr(
        Padded,
        "combine",
        lambda self, out, rows, r: right(self, out, rows, replace(r, weight=torch.ones_like(r.weight))),
    )


@fault(properties.forward_changes_nothing, SWITCH)
def layer_counts_in_forward(patch: pytest.MonkeyPatch) -> None:
    right = MoELayer.forward

    def forward(self: MoELayer, *args: Any) -> Any:
        y, routing = right(self, *args)
        self.count = load(routing)
        return y, routing

    patch.setattr(MoELayer, "forward", forward)


@fault(properties.groups_are_layers_of_their_own, replace(SWITCH, group=4))
def last_group_is_cut_off_from_the_start(patch: pytest.MonkeyPatch) -> None:
    right = MoELayer._groups

    def groups(self: MoELayer, x: Tensor) -> Tensor:
        return right(self, x).flip(0)

    patch.setattr(MoELayer, "_groups", groups)


# Losses


@fault(properties.balance_is_one_when_uniform, SWITCH)
def balance_without_the_number_of_experts(patch: pytest.MonkeyPatch) -> None:
    right = switchkit.losses.balance.balance
    patch.setattr(switchkit.losses.balance, "balance", lambda r, **k: right(r, **k) / r.logits.shape[-1])


@fault(properties.balance_sees_collapse)
def balance_pooled_over_layers(patch: pytest.MonkeyPatch) -> None:
    # Hugging Face: four collapsed layers, each on another expert, look perfectly balanced.
    def pooled(self: Balance, routings: Any) -> Tensor:
        counts = torch.stack([load(r) for r in routings]).sum(0).double()
        probs = torch.stack([r.probs.flatten(0, 1).mean(0) for r in routings]).mean(0)
        return len(counts) * (counts / counts.sum() * probs).sum()

    patch.setattr(Balance, "__call__", pooled)


@fault(properties.padding_changes_nothing, replace(SWITCH, capacity="dropless"))
def balance_counts_padding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(switchkit.losses.balance, "sum_probs", lambda r, per: r.probs.nan_to_num().sum((0, 1)).unsqueeze(0))
    patch.setattr(switchkit.losses.balance, "count_tokens", lambda r, per: torch.tensor([r.valid.numel()]))


@fault(properties.equals_the_paper, TOP2)
def z_counts_padding(patch: pytest.MonkeyPatch) -> None:
    # flaxformer: padding adds log(E)^2 to the mean.
    patch.setattr(switchkit.losses.router_z, "mean_square_logsumexp", lambda r: r.logits.logsumexp(-1).square().mean())


@fault(properties.nothing_at_all_is_fine, SWITCH)
def balance_of_nothing_is_nan(patch: pytest.MonkeyPatch) -> None:
    # Hugging Face: a batch of padding makes the loss NaN.
    right = switchkit.losses.balance.evenness
    patch.setattr(switchkit.losses.balance, "evenness", lambda *a: right(*a) * (a[-1].sum() / a[-1].sum()))


@fault(properties.z_loss_has_its_closed_form)
def z_of_probabilities(patch: pytest.MonkeyPatch) -> None:
    # Hugging Face, for some months: the z-loss was fed what the softmax gave.
    right = switchkit.losses.router_z.mean_square_logsumexp
    patch.setattr(
        switchkit.losses.router_z, "mean_square_logsumexp", lambda r: right(replace(r, logits=r.logits.softmax(-1)))
    )


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, check = FAULTS[name]
    plant(monkeypatch)
    with pytest.raises(Broken):
        check()


# Whether a leak is declared decides which of two properties is asked; without the fault it is the other one.
DECLARED = {"leak_not_declared", "leak_in_training_not_declared", "leak_declared_in_vain"}


@pytest.mark.parametrize("name", [name for name in FAULTS if name.partition(",")[0] not in DECLARED])
def test_nothing_is_noticed_without_a_fault(name: str) -> None:
    FAULTS[name][1]()


def test_there_are_faults_enough() -> None:
    assert len(FAULTS) >= 40
    assert TopK in named(Router).values()
