"""What an output depends on: later tokens, the rest of the batch, chance, padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from switchkit import stats
from switchkit.audit.probe import (
    MODES,
    Finding,
    Probe,
    called,
    changed,
    counted_group,
    drawing,
    generator_state,
    hooked,
    percent,
    short_name,
    without_drops,
)
from switchkit.layers import MoELayer
from switchkit.records import Routing

__all__ = ["FUTURE", "chance", "future", "padding", "rest_of_batch"]

FUTURE = "future tokens"
_EDITED = 16


@dataclass(frozen=True)
class _Edit:
    tokens: Tensor
    row: int
    place: int


def _edits(probe: Probe) -> list[_Edit]:
    """Tails of other tokens, and of one token over and over, which crowds one expert; of up to 16 of the sequences.

    In a group of many sequences an expert is full from one place on, and an edit there alone shows a leak.
    """
    rows, size = probe.tokens.shape
    places = [size // 4, size // 2, size // 2, 3 * size // 4, size - 1]
    count = max(len(places), min(rows, _EDITED))
    found = []
    for number in range(count):
        place = min(max(places[number % len(places)], 1), size - 1)
        row = number * rows // count if rows > count else number % rows
        tokens = probe.tokens.clone()
        crowd = tokens[row, 0] if number % 2 == 0 and place < size - 1 else None
        tokens[row, place:] = probe.others(tokens[row, place:], number + 1) if crowd is None else crowd
        found.append(_Edit(tokens, row, place))
    return found


def future(probe: Probe) -> list[Finding]:
    """Edits the tail of one sequence and watches its head, in both modes; then holds it against what layers declare."""
    edits = _edits(probe)
    leak, dropped = {}, {}
    for training in MODES:
        base = probe(probe.tokens, training=training)
        dropped[training] = _dropped(base.routings)
        leak[training] = max(
            probe.differ(base.logits[e.row, : e.place], probe(e.tokens, training=training).logits[e.row, : e.place])
            for e in edits
        )
    spent = ", ".join(f"{percent(share)} of assignments dropped in {MODES[mode]}" for mode, share in dropped.items())
    found = "; ".join(f"{MODES[mode]}: {changed(value)}" for mode, value in leak.items())
    size = probe.tokens.shape[1]
    evidence = (
        f"logits before {len(edits)} edits of the tail of {size} tokens: {found} ({spent if probe.layers else 'dense'})"
    )
    declared = [name for name, layer in probe.causal.items() if layer.leaks]
    seen = _leaking_layers(probe, edits) if declared or any(leak.values()) else []
    if not any(leak.values()):
        first = _unless_unfilled(probe, Finding(FUTURE, "ok", evidence), probe.causal)
    else:
        where = f"; first in {seen[0]}" if seen else "; in no sparse layer"
        first = Finding(FUTURE, "fault", evidence + where, _mend_leak(probe, seen))
    return [first, _declaration(probe, declared, seen, leak, dropped)]


def _declaration(
    probe: Probe, declared: list[str], seen: list[str], leak: dict[bool, float], dropped: dict[bool, float]
) -> Finding:
    check = "declared leaks"
    silent = [name for name in seen if name not in declared]
    unseen = [name for name in declared if name not in seen]
    if silent or (any(leak.values()) and not seen):
        where = ", ".join(silent) or "outside the sparse layers"
        fix = "set `leaks` of the router, or of the capacity policy, to the reason, so that a causal model refuses it"
        return Finding(check, "fault", f"read the future and do not say so: {where}", fix)
    if unseen:
        why = "" if any(dropped.values()) else "; nothing was dropped, so nothing was pushed out"
        reason = probe.layers[unseen[0]].leaks
        evidence = f"said to leak, and not seen to: {', '.join(unseen)} ({reason}){why}"
        return Finding(check, "note", evidence, "lower the capacity until it binds, or mend what the part declares")
    if declared:
        return Finding(check, "ok", f"{', '.join(declared)}: {probe.layers[declared[0]].leaks}")
    return Finding(check, "ok", "no part declares a leak" + (", none was seen" if probe.layers else ""))


def _unless_unfilled(probe: Probe, finding: Finding, layers: dict[str, MoELayer]) -> Finding:
    """A note in its place if the capacity of some layers is that of a larger group than the batch fills."""
    tokens = probe.tokens.numel()
    names = [name for name, layer in layers.items() if counted_group(layer) > tokens]
    if not names:
        return finding
    size = layers[names[0]].group
    told = f"{finding.evidence}; not measured: {tokens} tokens do not fill a group of {size} in {', '.join(names)}"
    return Finding(finding.check, "note", told, f"--model.moe.group={tokens} or less, or sequence")


def _leaking_layers(probe: Probe, edits: list[_Edit]) -> list[str]:
    """The sparse layers whose outputs before an edit change although their inputs there do not."""
    seen: set[str] = set()
    for training in MODES:
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def keep(
            name: str, inputs: dict[str, Tensor] = inputs, outputs: dict[str, Tensor] = outputs
        ) -> Callable[..., None]:
            def look(_: nn.Module, args: Any, kwargs: Any, out: tuple[Tensor, Routing]) -> None:
                inputs[name], outputs[name] = called(*args, **kwargs)[0], out[0]

            return look

        with hooked(layer.register_forward_hook(keep(name), with_kwargs=True) for name, layer in probe.layers.items()):
            probe(probe.tokens, training=training)

        for edit in edits:

            def mix(
                name: str, edit: _Edit = edit, inputs: dict[str, Tensor] = inputs
            ) -> Callable[..., tuple[Any, ...]]:
                def replaced(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, ...]:
                    given, *rest = called(*args, **kwargs)
                    x = inputs[name].clone()
                    x[edit.row, edit.place :] = given[edit.row, edit.place :]
                    return (x, *rest), {}

                return replaced

            def look(name: str, edit: _Edit = edit, outputs: dict[str, Tensor] = outputs) -> Callable[..., None]:
                def compare(_: nn.Module, args: tuple[Any, ...], out: tuple[Tensor, Routing]) -> None:
                    if probe.differ(outputs[name][edit.row, : edit.place], out[0][edit.row, : edit.place]):
                        seen.add(name)

                return compare

            handles = [
                layer.register_forward_pre_hook(mix(name), with_kwargs=True) for name, layer in probe.layers.items()
            ]
            handles += [layer.register_forward_hook(look(name)) for name, layer in probe.layers.items()]
            with hooked(handles):
                probe(edit.tokens, training=training)
    return [name for name in probe.layers if name in seen]


def _mend_leak(probe: Probe, seen: list[str]) -> str:
    layer = probe.layers[seen[0]] if seen else None
    if layer is None:
        return "mask what the model mixes over time, such as its attention"
    if layer.router.leaks:
        return "--model.moe.router=top_k (or switch, sigmoid, ...), or keep this router for an encoder"
    if layer.capacity.order != "arrival":
        return "--model.moe.capacity.order=arrival"
    if layer.capacity.leaks(layer.router.k):
        return "--model.moe.capacity=factor (arrival order), or dropless"
    parts = " and ".join(short_name(part) for part in (layer.router, layer.capacity, layer.experts))
    return f"let {parts} treat a token by itself and earlier ones alone"


def rest_of_batch(probe: Probe) -> Finding:
    """The first and the last sequence: alone, and with all others replaced."""
    check, rows = "rest of the batch", probe.tokens.shape[0]
    values: dict[str, float] = {}
    for training, mode in MODES.items():
        base = probe(probe.tokens, training=training)
        for row in (0, rows - 1):
            tokens = probe.others(probe.tokens, 100 + row)
            tokens[row] = probe.tokens[row]
            found = probe.differ(base.logits[row], probe(tokens, training=training).logits[row])
            key = f"{mode}, others replaced"
            values[key] = max(values.get(key, 0.0), found)
            if not training:
                # In training the draws for a batch of one are others, so that only evaluation can be compared.
                alone = probe(probe.tokens[row : row + 1], training=False).logits[0]
                key = "evaluation, alone"
                values[key] = max(values.get(key, 0.0), probe.differ(base.logits[row], alone))
    evidence = f"logits of a sequence in a batch of {rows}: " + "; ".join(
        f"{k}: {changed(v)}" for k, v in values.items()
    )
    if not any(values.values()):
        return _unless_unfilled(probe, Finding(check, "ok", evidence), probe.layers)
    wide = {str(layer.group) for layer in probe.layers.values() if layer.group != "sequence"}
    if wide:
        evidence += f"; capacity is counted over group={', '.join(sorted(wide))}"
    fix = "--model.moe.group=sequence" if wide else "let no part mix sequences: routing groups are single ones already"
    return Finding(check, "fault", evidence, fix)


def chance(probe: Probe) -> Finding:
    """Two calls in evaluation, and torch's generator before and after."""
    check = "chance in evaluation"
    torch.manual_seed(probe.seed)
    before = generator_state(probe.net)
    with drawing(dict(probe.layers)) as drawn:
        first = probe(probe.tokens, training=False, seeded=False)
        second = probe(probe.tokens, training=False, seeded=False)
    moved = not torch.equal(before, generator_state(probe.net))
    change = probe.differ(first.logits, second.logits)
    generator = "moved" if moved else "did not move"
    evidence = f"logits of two calls: {changed(change)}; torch's generator {generator}"
    if not moved and not change:
        return Finding(check, "ok", evidence)
    where = f", in {', '.join(drawn)}" if drawn else ""
    fix = (
        "draw under `if self.training:` only; in evaluation take the best, or a fixed table as the router `random` does"
    )
    return Finding(check, "fault", evidence + where, fix)


def padding(probe: Probe) -> Finding:
    """What padding holds, whether it is routed or counted, and whether there being some changes anything."""
    rows, size = probe.tokens.shape
    lengths = torch.tensor([max(1, size - row * size // (2 * (rows - 1))) for row in range(rows)])
    valid = (torch.arange(size) < lengths.unsqueeze(-1)).to(probe.tokens.device)
    other = torch.where(valid, probe.tokens, probe.others(probe.tokens, 200))
    wrong: list[str] = []
    notes: list[str] = []
    for training, mode in MODES.items():
        one, two = (probe(tokens, valid, training=training) for tokens in (probe.tokens, other))
        if change := probe.differ(one.logits[valid], two.logits[valid]):
            wrong.append(f"logits of real tokens follow what padding holds in {mode}: {changed(change)}")
        for name, a, b in zip(probe.layers, one.routings, two.routings, strict=False):
            routed = int((a.chosen & ~_real(a, valid)).sum())
            if routed or int(a.valid.sum()) != int(valid.sum()):
                sent = int(stats.load(a).sum())
                wrong.append(f"{name} in {mode}: {routed} of {sent} assignments are padding's")
            elif not torch.equal(stats.load(a), stats.load(b)):
                wrong.append(f"{name} in {mode}: the load follows what padding holds")
    records = one.routings
    spoilt = [_spoilt(r, valid) for r in records]
    for name, was, now in zip(probe.names(), probe.terms(records), probe.terms(spoilt), strict=True):
        if records and probe.differ(was, now):
            values = f"{float(was.detach()):.4g}, and {float(now.detach()):.4g}"
            wrong.append(f"{name} counts padding: {values} with other values there")
    half = size // 2
    some = (torch.arange(size, device=valid.device) < half).expand(rows, size)
    short = probe(probe.tokens[:, :half], some[:, :half], training=False)
    padded = probe(probe.tokens, some, training=False)
    if change := probe.differ(short.logits, padded.logits[:, :half]):
        what = f"{size - half} places of padding change the logits of {half} tokens in evaluation: {changed(change)}"
        limited = any(r.capacity is not None for r in padded.routings)
        (notes if limited else wrong).append(
            what + (", by a capacity that follows the padded length" if limited else "")
        )
    share = percent(1 - float(valid.float().mean()))
    if wrong:
        fix = "honour `valid`: never choose a token where it is False (token_choice does that), nor sum over it"
        return Finding("padding", "fault", "; ".join(wrong), fix)
    if notes:
        layers = probe.layers.values()
        binding = [m for m in layers if m.capacity.limit(size, m.num_experts, m.router.k, training=False) is not None]
        fix = (
            "the router sets a capacity of its own by the padded length: give it sequences of equal length, as text has"
            if not binding
            else f"{without_drops(binding)} makes evaluation dropless"
        )
        return Finding("padding", "note", "; ".join(notes), fix)
    evidence = f"with {share} padding: what it holds changes no logit, load or loss; none is routed"
    return Finding("padding", "ok", evidence)


def _real(routing: Routing, valid: Bool[Tensor, "B S"]) -> Bool[Tensor, "G N"]:
    """Whether the token of each assignment is a real one, by the model's `valid` and not the record's own."""
    groups, size = routing.valid.shape
    flat = valid.flatten()
    flat = torch.cat([flat, flat.new_zeros(groups * size - flat.numel())])
    return flat.view(groups, size).gather(1, routing.token)


def _spoilt(routing: Routing, valid: Bool[Tensor, "B S"]) -> Routing:
    """The record with other logits, probabilities, experts and weights at padding."""
    groups, size = routing.valid.shape
    flat = torch.cat([valid.flatten(), valid.new_zeros(groups * size - valid.numel())]).view(groups, size, 1)
    wild = 3 * torch.ones_like(routing.logits).cumsum(-1)
    real, other = _real(routing, valid), (routing.expert + 1) % routing.logits.shape[-1]
    return replace(
        routing,
        expert=torch.where(real, routing.expert, other),
        weight=torch.where(real, routing.weight, 3),
        logits=torch.where(flat, routing.logits, wild.to(routing.logits.dtype)),
        probs=torch.where(flat, routing.probs, wild.softmax(-1).to(routing.probs.dtype)),
    )


def _dropped(routings: Sequence[Routing]) -> float:
    chosen = sum(int(r.chosen.sum()) for r in routings)
    return sum(int(stats.dropped(r)) for r in routings) / max(chosen, 1)
