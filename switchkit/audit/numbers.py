"""Types and sizes: float32 routing, experts and routers at the start, the scale of each loss."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from switchkit import stats
from switchkit.audit.probe import Finding, Probe, called, hooked, learned, sparse_layers, stacks
from switchkit.losses.balance import Balance, SequenceBalance, balance
from switchkit.losses.base import Loss, alone
from switchkit.records import Routing

__all__ = ["equal_experts", "precision", "saturation", "scales", "uniform_routing"]

EQUAL, SATURATED = 1e-3, 0.9


def precision(probe: Probe) -> Finding:
    """Each sparse layer alone under autocast, on inputs in float32 and in bfloat16."""
    check = "float32 routing"
    net = copy.deepcopy(probe.net).float().eval()
    inputs: dict[str, tuple[Any, ...]] = {}
    layers = sparse_layers(net)

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: inputs.update({name: called(*args, **kwargs)})

    wrong, worst = [], 0.0
    with torch.no_grad():
        with hooked(layer.register_forward_pre_hook(keep(n), with_kwargs=True) for n, layer in layers.items()):
            net(probe.tokens)
        for name, layer in layers.items():
            x, *rest = inputs[name]
            for given in (x, x.bfloat16()):
                kind = _dtype(given)
                try:
                    torch.manual_seed(probe.seed)
                    _, plain = layer(given.float(), *rest)
                    torch.manual_seed(probe.seed)
                    with torch.autocast(x.device.type, dtype=torch.bfloat16):
                        _, half = layer(given, *rest)
                except RuntimeError as error:
                    wrong.append(f"{name} fails on {kind} inputs: {str(error).strip().splitlines()[0]}")
                    continue
                low = [n for n in ("logits", "probs", "weight") if getattr(half, n).dtype != torch.float32]
                change = max(_apart(getattr(plain, n), getattr(half, n).float()) for n in ("logits", "probs"))
                worst = max(worst, change)
                size = plain.logits.masked_fill(plain.logits.isinf(), 0).abs().max()
                if low or not change <= 1e-5 * max(1.0, float(size)):
                    types = ", ".join(f"{n} {_dtype(getattr(half, n))}" for n in low) or "float32 in the record"
                    wrong.append(f"{name} on {kind} inputs: {types}, off by up to {change:.2g}")
    if wrong:
        fix = "compute logits as LinearRouter.logits does: inputs and weights in float32, autocast off"
        return Finding(check, "fault", "; ".join(wrong), fix)
    evidence = "logits, probs and weight under bfloat16 autocast, on float32 and on bfloat16 inputs: float32"
    return Finding(check, "ok", f"{evidence}, off by at most {worst:.1g}")


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference; logits of -inf in both, of experts that are closed to a token, have none."""
    closed = (a == -torch.inf) & (b == -torch.inf)
    return float((a.masked_fill(closed, 0) - b.masked_fill(closed, 0)).abs().max())


def equal_experts(probe: Probe, trained: bool) -> Finding:
    """How far the closest two experts of a layer are apart."""
    check = "equal experts"
    closest: dict[str, float] = {}
    for name, layer in probe.layers.items():
        for stack in stacks(layer.experts):
            each = stack.by_expert(stack.parameters)
            if len(each) > 1 and len({len(own) for own in each}) == 1:
                flat = torch.stack(each)
                square = flat.square().sum(-1)
                mean = ((square.unsqueeze(1) + square) / 2).clamp(min=1e-300)
                apart = (2 * mean - 2 * flat @ flat.t()) / mean
                # What is left of the products of equal rows is rounding.
                apart = apart.masked_fill(apart < 1e-12, 0).sqrt()
                apart.fill_diagonal_(float("inf"))
                closest[name] = min(closest.get(name, float("inf")), float(apart.min()))
    state = "trained" if trained else "initial"
    if not closest:
        return Finding(check, "ok", "there are no two experts with weights of one shape, stacked or in a ModuleList")
    shown = ", ".join(f"{name} {value:.3g}" for name, value in closest.items())
    evidence = (
        f"difference of the closest two, as a share of their norm (independent draws: 1.41), {state} weights: {shown}"
    )
    if min(closest.values()) > EQUAL:
        return Finding(check, "ok", evidence)
    fix = "draw each expert's weights on its own; equal ones (as in upcycling) are told apart by router noise alone"
    return Finding(check, "fault", evidence, fix)


def saturation(probe: Probe, trained: bool) -> Finding:
    """How certain the routers are about random tokens."""
    check = "router saturation"
    routings = probe(probe.tokens, training=False).routings
    shown, high = [], 0.0
    for (name, layer), routing in zip(probe.layers.items(), routings, strict=False):
        if learned(layer.router) and layer.num_experts > 1:
            top = float(stats.scores(routing)[1] / stats.tokens(routing).clamp(min=1))
            shown.append(f"{name} {top:.3f} (even: {1 / layer.num_experts:.3f})")
            high = max(high, top)
    if not shown:
        return Finding(check, "ok", "no router that learns has a choice")
    evidence = (
        f"mean largest probability on random tokens, {'trained' if trained else 'initial'} weights: {', '.join(shown)}"
    )
    if high <= SATURATED:
        return Finding(check, "ok", evidence)
    fix = "start the router small, std sqrt(0.1 / d_model); add router_z to model.losses to keep its logits small"
    return Finding(check, "note" if trained else "fault", evidence, fix)


def uniform_routing(like: Routing, k: int, *, collapsed: bool = False) -> Routing:
    """A record of E tokens with uniform probabilities and an even load of k choices each, for as many experts.

    `collapsed`: all tokens choose the first k experts, with all probability on these. `like` gives the number of
    experts, and what losses read beside the choices: the router's rows, the aim k; noise is 0 of deviation 1.
    """
    experts, device, dtype = like.logits.shape[-1], like.logits.device, like.probs.dtype
    k = min(max(k, 1), experts)
    place = torch.arange(experts * k, device=device)
    expert = (place % k if collapsed else place % experts).unsqueeze(0)
    logits = torch.zeros(1, experts, experts, device=device, dtype=dtype)
    probs = torch.full_like(logits, 1 / experts)
    if collapsed:
        probs = torch.zeros_like(logits)
        probs[..., :k] = 1 / k
    chosen = torch.ones(1, experts * k, dtype=torch.bool, device=device)
    kept_extras = {name: value.detach() for name, value in like.extras.items() if name in ("rows", "k")}
    return Routing(
        logits=logits,
        probs=probs,
        token=(place // k).unsqueeze(0),
        expert=expert,
        weight=torch.full((1, experts * k), 1 / k, device=device, dtype=dtype),
        chosen=chosen,
        valid=torch.ones(1, experts, dtype=torch.bool, device=device),
        batch=1,
        k=None if like.k is None else k,
        slot=torch.zeros_like(expert),
        kept=chosen,
        load=torch.bincount(expert[0], minlength=experts).unsqueeze(0),
        extras={**kept_extras, "noisy": torch.zeros_like(logits), "std": torch.ones_like(logits)},
    )


def scales(probe: Probe) -> Iterator[Finding]:
    """The value of each loss at uniform routing and what a balance loss weighs in each layer, against the defaults."""
    real = probe(probe.tokens, training=True).routings
    ks = [layer.router.k for layer in probe.layers.values()]
    even = [uniform_routing(r, k) for r, k in zip(real, ks, strict=False)]
    for name, loss in zip(probe.names(), probe.losses, strict=True):
        check = f"scale of {name}"
        value, weight, own = float(alone(loss, even).detach()), loss.weight, _own_weight(loss)
        source = _source(loss)
        told = f"{value:.4g} at uniform routing, times {weight:g} is {weight * value:.3g}"
        if not isinstance(loss, (Balance, SequenceBalance)):
            other = own is not None and weight != own
            evidence = told + (f"; the default weight is {own:g} ({source})" if other else f" ({source})")
            yield Finding(check, "note" if other else "ok", evidence, f"weight: {own:g}, unless meant" if other else "")
            continue
        shares = []
        for index, (routing, k) in enumerate(zip(real, ks, strict=False)):
            one = uniform_routing(routing, k, collapsed=True)
            rise = float(balance(one)) - 1
            if rise > 1e-9:
                moved = float(alone(loss, [*even[:index], one, *even[index + 1 :]]).detach())
                shares.append((moved - value) / rise)
        alike = bool(shares) and _same(shares)
        each = f", {weight * shares[0]:.3g} for each of {len(even)} layers" if alike else ""
        if shares and not alike:
            each = ", by layer " + ", ".join(f"{weight * share:.3g}" for share in shares)
        evidence = f"{told}{each} ({source}" + (")" if own is None else f", by default 1 * {own:g})")
        # A sum over layers, as the paper has it, or over stacks weighs in each what the mean does in a model of one.
        unit = value / _summed(loss, len(even))
        if own is None or _same([weight * value, own]) or _same([weight * unit, own]):
            yield Finding(check, "ok", evidence)
        elif _same([unit, 1.0]):
            yield Finding(check, "note", evidence, f"weight: {own:g}, unless meant")
        else:
            fix = "divide it" if getattr(loss, "scale", "one") == "one" else "scale: one"
            yield Finding(check, "fault", evidence, f"{fix}, or weight: {own / unit:.3g}")


def _summed(loss: Loss, layers: int) -> int:
    """How many terms of 1 at uniform routing a balance loss adds up: one of each layer, or of each stack of layers."""
    stacks = getattr(loss, "stacks", None) or ()
    summed = layers if getattr(loss, "layers", "mean") == "sum" else sum(size > 0 for size in stacks)
    return max(summed, 1)


def _same(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= 1e-6 * max(map(abs, values))


def _own_weight(loss: Loss) -> float | None:
    """The default of the class, which is its paper's."""
    parameter = inspect.signature(type(loss)).parameters.get("weight")
    return None if parameter is None or parameter.default is parameter.empty else float(parameter.default)


def _source(loss: Loss) -> str:
    """The last line of the docstring, where it names a source."""
    last = (inspect.getdoc(type(loss)) or "").rpartition("Source:")
    return " ".join(last[2].split()).rstrip(".") if last[1] else "no source given"


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
