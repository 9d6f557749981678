"""Whether routers and experts are taught: by the task, by each loss, once, and the same when recomputed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from switchkit import stats
from switchkit.audit.probe import Finding, Probe, Status, changed, learned, stacks
from switchkit.metrics import cross_entropy
from switchkit.models import Output
from switchkit.records import Routing

__all__ = ["counted_once", "gradients", "recomputed"]


def _task(probe: Probe, out: Output) -> Tensor:
    """Cross-entropy of the next token; the last place is asked for the first one, so that each has a target."""
    total, count = cross_entropy(out.logits, probe.tokens.roll(-1, 1), None)
    return total / count


def _grads(value: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Gradients of `value`, zeros where there is none; the graph stays."""
    if not (parameters and value.requires_grad):
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _norm(grads: Iterable[Tensor]) -> float:
    return float(sum((g.double().square().sum() for g in grads), torch.zeros((), dtype=torch.float64)).sqrt())


def _floor(probe: Probe) -> float:
    """The norm below which a gradient is rounding."""
    return 1e-12 if probe.tolerance < 1e-6 else 1e-8


def gradients(probe: Probe) -> Iterator[Finding]:
    """What reaches the routers and experts of each layer, from cross-entropy and from each loss by itself."""
    out = probe.forward(probe.tokens, training=True)
    routers = {name: learned(layer.router) for name, layer in probe.layers.items()}
    taught = [name for name, parameters in routers.items() if parameters]
    task = _task(probe, out)
    floor = _floor(probe)

    def per_layer(value: Tensor) -> dict[str, float]:
        flat = iter(_grads(value, [p for parameters in routers.values() for p in parameters]))
        return {name: _norm([next(flat) for _ in parameters]) for name, parameters in routers.items() if parameters}

    norms = per_layer(task)
    none = [name for name, norm in norms.items() if not norm > floor]
    shown = ", ".join(f"{name} {norm:.2g}" for name, norm in norms.items()) or "the routers learn nothing"
    fix = "hand `weight` back undetached, and for one choice not divided by itself (normalize=never)"
    status: Status = "fault" if none else "ok"
    yield Finding("router gradient, task", status, f"norm from cross-entropy: {shown}", fix if none else "")

    for name, loss, term in zip(probe.names(), probe.losses, probe.terms(out.routings), strict=True):
        norms = per_layer(term)
        shown = ", ".join(f"{layer} {loss.weight * norm:.2g}" for layer, norm in norms.items())
        value = loss.weight * float(term.detach())
        evidence = f"norm from {loss.weight:g} * {name} = {value:.2g}: {shown or 'no router learns'}"
        none = [layer for layer, norm in norms.items() if not norm > floor]
        if not none and taught and loss.weight:
            yield Finding(f"router gradient, {name}", "ok", evidence)
            continue
        even = none and all(_even(r) for layer, r in zip(probe.layers, out.routings, strict=False) if layer in none)
        if not loss.weight:
            yield Finding(f"router gradient, {name}", "note", evidence, f"its weight is 0: raise it or drop {name}")
        elif not taught or even:
            why = "the load is exactly even whatever the router does" if even else "there is no router to teach"
            yield Finding(
                f"router gradient, {name}", "note", f"{evidence} ({why})", f"leave {name} out of model.losses"
            )
        else:
            where = ", ".join(none)
            fix = f"it does nothing in {where}: hand `probs` and `logits` back undetached, or leave {name} out"
            yield Finding(f"router gradient, {name}", "fault", evidence, fix)
    yield _expert_gradients(probe, out, task, floor)


def _even(routing: Routing) -> bool:
    counts = stats.load(routing)
    return bool(counts.max() == counts.min())


def _expert_gradients(probe: Probe, out: Output, task: Tensor, floor: float) -> Finding:
    weights = {name: stacks(layer.experts) for name, layer in probe.layers.items()}
    flat = iter(_grads(task, [p for found in weights.values() for stack in found for p in stack.parameters]))
    idle: list[str] = []
    cut: list[str] = []
    count, least = 0, float("inf")
    for (name, found), routing in zip(weights.items(), out.routings, strict=False):
        assert routing.kept is not None
        came = torch.bincount(routing.expert[routing.kept], minlength=routing.logits.shape[-1])
        for stack in found:
            each = stack.by_expert([next(flat) for _ in stack.parameters])
            for index, value in enumerate((float(grad.norm()) for grad in each), stack.first):
                count += 1
                if value > floor:
                    least = min(least, value)
                else:
                    (cut if came[index] else idle).append(f"{name} {index}")
    check = "expert gradients"
    if not count:
        return Finding(check, "ok", "there are no weights of single experts, stacked or in a ModuleList")
    share = f"{count - len(idle) - len(cut)} of {count} experts get a gradient from cross-entropy"
    if cut:
        fix = "let the expert's output reach the layer's, undetached and with a weight other than 0"
        return Finding(check, "fault", f"{share}; cut although tokens came: {', '.join(cut)}", fix)
    if idle:
        fix = "random tokens need not reach all; watch dead_experts in training, and raise the balance loss"
        return Finding(check, "note", f"{share}; no token came to {', '.join(idle)}", fix)
    return Finding(check, "ok", f"{share}, the smallest norm {least:.2g}")


def counted_once(probe: Probe) -> Finding:
    """The same micro-batch twice, each loss halved as the trainer halves it, against once."""
    check = "gradient accumulation"
    parameters = [p for layer in probe.layers.values() for p in learned(layer.router)]
    if not (parameters and probe.losses):
        return Finding(check, "ok", "no router is taught by a loss")
    sums: list[list[Tensor]] = []
    once: list[float] = []
    for step in range(3):
        terms = probe.terms(probe.forward(probe.tokens, training=True).routings)
        grads = [_grads(term, parameters) for term in terms]
        if step == 0:
            once = [_norm(g) for g in grads]
            sums = [[torch.zeros_like(p) for p in parameters] for _ in terms]
        else:
            sums = [
                [s + g / 2 for s, g in zip(total, new, strict=True)] for total, new in zip(sums, grads, strict=True)
            ]
    ratios = {
        name: _norm(s) / n if n > _floor(probe) else 1.0 for name, s, n in zip(probe.names(), sums, once, strict=True)
    }
    shown = ", ".join(f"{name} {ratio:.6g}" for name, ratio in ratios.items())
    evidence = f"router gradient of one micro-batch twice, each half, over that of once: {shown}"
    if all(abs(ratio - 1) <= max(probe.tolerance, 1e-6) for ratio in ratios.values()):
        return Finding(check, "ok", evidence)
    return Finding(check, "fault", evidence, "compute the loss from the records alone: keep no sum between calls")


def recomputed(probe: Probe) -> Finding:
    """Gradients with the whole model under non-reentrant checkpointing, against those without."""
    check = "activation checkpointing"
    parts = [part for layer in probe.layers.values() for part in (layer.router, layer.experts)]
    parameters = [p for part in parts for p in learned(part)]

    def again(net: nn.Module, tokens: Tensor, valid: Tensor | None) -> Any:
        return checkpoint(net, tokens, valid, use_reentrant=False)

    def by_weight(**how: Any) -> list[Tensor]:
        out = probe.forward(probe.tokens, training=True, **how)
        terms = zip(probe.losses, probe.terms(out.routings), strict=True)
        return _grads(_task(probe, out) + sum(term.weight * value for term, value in terms), parameters)

    fix = "let `forward` depend on its inputs and weights alone: keep no counter or state on the part"
    try:
        plain, kept = by_weight(), by_weight(through=again)
    except RuntimeError as error:
        return Finding(check, "fault", f"recomputation went another way: {str(error).strip().splitlines()[0]}", fix)
    change = max((probe.differ(a, b) for a, b in zip(plain, kept, strict=True)), default=0.0)
    evidence = (
        f"gradients of {len(parameters)} weights of routers and experts, recomputed (not reentrant): {changed(change)}"
    )
    return Finding(check, "fault" if change else "ok", evidence, fix if change else "")
