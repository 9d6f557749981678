"""Losses on records: what any of them must hold, and the closed forms of two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from switchkit.losses.balance import Balance
from switchkit.losses.base import Loss, alone
from switchkit.losses.router_z import RouterZ
from switchkit.records import Routing
from switchkit.testing.cases import EXACT, Case, collapsed, gradients, learned, run, seeded
from switchkit.testing.expect import Broken, breaks, error, expect, same

__all__ = [
    "LossCase",
    "balance_is_one_when_uniform",
    "balance_sees_collapse",
    "layers_do_not_cancel",
    "loss_changes_nothing",
    "loss_gradient_agrees",
    "loss_ignores_padding",
    "loss_of_nothing_is_zero",
    "loss_reaches_the_router",
    "z_loss_has_its_closed_form",
]


@dataclass(frozen=True)
class LossCase:
    """A loss, and the layer whose records it reads."""

    make: Callable[[], Loss]
    case: Case
    subject: str

    def loss(self) -> Callable[[Sequence[Routing]], Tensor]:
        """It as a step of one micro-batch calls it."""
        return partial(alone, self.make())

    def record(self, seed: int = 0, valid: Tensor | None = None) -> Routing:
        """The record of one layer on the case's inputs."""
        case = replace(self.case, seed=seed)
        x, real, ids = case.inputs()
        return run(case.layer(training=True), x, real if valid is None else valid, ids)[1]


@breaks("a batch of padding, or a model without sparse layers, makes the whole loss NaN")
def loss_of_nothing_is_zero(case: LossCase) -> None:
    """A scalar; zero without layers and without a real token, and finite with them."""
    loss = case.loss()
    found = {"no sparse layer": loss([]).detach()}
    shape = case.case.shape
    found["no real token"] = loss([case.record(valid=torch.zeros(shape, dtype=torch.bool))]).detach()
    for name, value in found.items():
        expect(value.shape == (), f"with {name} it has a shape of {list(value.shape)}, a scalar expected")
        expect(float(value) == 0, f"with {name} it is {float(value):.3g}, 0 expected")
    value = loss([case.record(), case.record(1)]).detach()
    expect(value.shape == () and bool(value.isfinite()), f"it is {value.tolist()}, a finite scalar expected")


@breaks("the length of the padding steers the router")
def loss_ignores_padding(case: LossCase) -> None:
    """What the record holds for padding, NaN and other experts included, changes neither the loss nor its gradient."""
    loss, r = case.loss(), case.record()
    assert not r.valid.all()
    theirs = ~r.valid.gather(1, r.token)
    padding = {"logits": ~r.valid.unsqueeze(-1), "probs": ~r.valid.unsqueeze(-1), "weight": theirs}
    other = torch.where(theirs, (r.expert + 1) % r.logits.shape[-1], r.expert)

    def of(filler: float | None) -> dict[str, Tensor]:
        leaves = {name: getattr(r, name).detach().requires_grad_() for name in padding}
        if filler is None:
            value = loss([replace(r, **leaves)])
        else:
            filled = {name: leaf.masked_fill(padding[name], filler) for name, leaf in leaves.items()}
            value = loss([replace(r, **filled, expert=other)])
        found = {"value": value}
        for name, leaf in leaves.items():
            grad = (
                torch.autograd.grad(value, leaf, allow_unused=True, retain_graph=True)[0]
                if value.requires_grad
                else None
            )
            found[f"gradient of {name}"] = (
                torch.zeros_like(leaf) if grad is None else grad.masked_fill(padding[name], 0)
            )
        return found

    for filler in (100.0, float("nan")):
        same(of(filler), of(None), EXACT, f"padding that holds {filler:g} changed the")


@breaks("layers that collapse on different experts look even together")
def layers_do_not_cancel(case: LossCase) -> None:
    """Over several layers the loss is the mean or the sum of those of each."""
    loss = case.loss()
    records = [case.record(seed) for seed in range(3)]
    groups = [records]
    try:
        groups.append([collapsed(e) for e in range(4)])
        loss(groups[1])
    except ValueError:
        # What the loss reads is not in such a record.
        groups = [records]
    for layers in groups:
        single = torch.stack([loss([r]) for r in layers]).detach()
        whole = loss(layers).detach()
        values = ", ".join(f"{value:.3g}" for value in single.tolist())
        expect(
            min(error(whole, single.mean()), error(whole, single.sum())) <= 1e-6,
            f"layers with losses of {values} have {float(whole):.3g} together, the mean or the sum expected",
        )


@breaks("the record is spoiled for the losses and metrics that read it next")
def loss_changes_nothing(case: LossCase) -> None:
    """It draws no random numbers, gives the same twice, also under autocast, and writes to no tensor of the record."""
    loss, r = case.loss(), case.record()
    before = {f.name: value.clone() for f in fields(r) if isinstance(value := getattr(r, f.name), Tensor)}
    state = torch.get_rng_state()
    first = loss([r])
    expect(torch.equal(state, torch.get_rng_state()), "it draws random numbers")
    expect(torch.equal(first, loss([r])), "it gives another value when called again")
    for name, value in before.items():
        expect(torch.equal(value.nan_to_num(), getattr(r, name).nan_to_num()), f"it wrote to `{name}` of the record")
    record = LossCase(case.make, replace(case.case, dtype=torch.float32), case.subject).record()
    plain = loss([record])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = loss([record])
    expect(rounded.dtype == plain.dtype, f"autocast turns it into {rounded.dtype}, {plain.dtype} expected")
    expect(error(rounded, plain) <= 1e-6, f"autocast changes it by a relative {error(rounded, plain):.2g}")


@breaks("it is added to the loss and changes nothing")
def loss_reaches_the_router(case: LossCase) -> None:
    """Some parameter of the router has a gradient from it, on one of several records: even ones, and crowded ones."""
    records = [(seed, alike) for alike in (False, True) for seed in range(4)]
    expect(
        any(_pull(case, *record) > 1e-12 for record in records), "no parameter of the router gets a gradient from it"
    )


def _pull(case: LossCase, seed: int, alike: bool) -> float:
    """The size of the gradient of the router; `alike`: of tokens that are nearly one, so that an expert has most."""
    made = replace(case.case, seed=seed)
    layer = made.layer(training=True)
    x, valid, ids = made.inputs()
    _, r = run(layer, x[:1, :1] + x / 10 if alike else x, valid, ids)
    value = case.loss()([r])
    if not value.requires_grad:
        return 0.0
    grads = torch.autograd.grad(value, tuple(learned(layer.router).values()), allow_unused=True)
    return max((float(grad.norm()) for grad in grads if grad is not None), default=0.0)


@breaks("the optimizer follows a gradient that is not that of the loss")
def loss_gradient_agrees(case: LossCase) -> None:
    """torch.autograd.gradcheck with respect to the tokens and the router."""
    small = replace(case.case, d_model=3, d_ff=4, shape=(2, 4))
    layer = small.layer(training=True)
    x, valid, ids = small.inputs()
    loss, named = case.loss(), {f"router.{n}": p for n, p in learned(layer.router).items()}

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        seeded(0)
        _, r = torch.func.functional_call(layer, dict(zip(named, parameters, strict=True)), (x, valid, ids))
        return loss([r])

    inputs = tuple(value.detach().requires_grad_() for value in (x, *named.values()))
    seeded(3)
    try:
        gradcheck(function, inputs, atol=1e-6, nondet_tol=0.0, fast_mode=True)
    except GradcheckError as differs:
        first = next((line for line in str(differs).splitlines() if line.strip()), "a gradient differs")
        raise Broken(f"finite differences do not confirm its gradient ({first.strip(' .,:')})") from differs


@breaks("its weight means another strength for every number of experts")
def balance_is_one_when_uniform(case: Case) -> None:
    """Uniform probabilities give 1 for every k, whatever the load; and log^2 E is the z-loss of logits of zero."""
    layer = case.layer()
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.zero_()
    _, r = run(layer, *case.inputs())
    even = torch.full_like(r.probs, 1 / case.num_experts)
    expect(error(r.probs, even) <= 1e-9, "a router whose parameters are zero has no uniform probabilities")
    # A router that chooses nothing at a logit of zero has no load to be even.
    one = torch.ones((), dtype=case.dtype) * bool(r.chosen.any())
    same({"balance loss": Balance()([r])}, {"balance loss": one}, 1e-9, "uniform probabilities have another")
    if not r.logits.any():
        log = torch.tensor(case.num_experts).double().log() ** 2
        same({"z-loss": RouterZ()([r])}, {"z-loss": log}, 1e-9, "zero logits have another")


@breaks("the router collapses on few experts, and the loss does not tell")
def _sees_collapse(case: Any, make: Callable[..., Loss]) -> None:
    for k in (1, 2, 3):
        one = make()([collapsed(0, k=k)])
        all_four = [collapsed(e, k=k) for e in range(4)]
        found = {
            "one collapsed layer": (one, 4 / k),
            "four layers collapsed on different experts": (make()(all_four), 4 / k),
            "their sum": (make(layers="sum")(all_four), 16 / k),
            "scale='k'": (make(scale="k")(all_four), 4),
        }
        for name, (value, expected) in found.items():
            value = value.detach()
            off = abs(float(value) - expected)
            expect(off <= 1e-9, f"{name} at k={k} gives {float(value):.3g}, {expected:.3g} expected")


def balance_sees_collapse(make: Callable[..., Loss] = Balance) -> None:
    """E/k for one collapsed layer; and two layers collapsed on different experts do not cancel."""
    _sees_collapse("Balance", make)


@breaks("logits grow until the softmax saturates")
def _closed_form(case: Any, make: Callable[..., Loss]) -> None:
    seeded(0)
    base = collapsed(0, tokens=5)
    logits = (3 * torch.randn(1, 5, 4, dtype=torch.float64)).requires_grad_()
    valid = torch.tensor([[True, True, False, True, True]])
    value = make()([replace(base, logits=logits, probs=logits.softmax(-1), valid=valid)])
    lse = logits.exp().sum(-1).log()
    expected = {"value": lse[valid].square().sum() / 4}
    found = {"value": value, **{f"gradient of {n}": g for n, g in gradients(value, logits=logits).items()}}
    expected["gradient of logits"] = 2 * lse.unsqueeze(-1) * logits.softmax(-1) / 4 * valid.unsqueeze(-1)
    same(found, expected, EXACT, "the closed form gives another")
    flat = replace(base, logits=torch.zeros(1, 5, 4, dtype=torch.float64))
    off = abs(float(make()([flat])) - float(torch.tensor(4.0).log()) ** 2)
    expect(off <= 1e-6, f"zero logits are off from log(E)^2 by {off:.2g}")


def z_loss_has_its_closed_form(make: Callable[..., Loss] = RouterZ) -> None:
    """mean lse^2 over real tokens, with gradient 2 lse softmax / T; log^2 E at zero logits."""
    _closed_form("RouterZ", make)
