"""What must not matter: padding, the rest of the batch, the future, the order of tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from switchkit.layers import MoELayer
from switchkit.losses.balance import Balance
from switchkit.losses.router_z import RouterZ
from switchkit.testing import oracle
from switchkit.testing.cases import EXACT, Case, gradients, learned, results, run, seeded
from switchkit.testing.expect import breaks, error, expect, same

__all__ = [
    "groups_are_layers_of_their_own",
    "leaks_as_declared",
    "order_goes_with_the_tokens",
    "padding_changes_nothing",
    "sequences_do_not_meet",
    "the_future_changes_nothing",
]


@breaks("sequences of different lengths in a batch will disturb each other")
def padding_changes_nothing(case: Case, *, steady: bool = True) -> None:
    """Neither what it holds, NaN included, nor its side, nor (where capacity does not grow with it) its amount.

    Without `steady` each place has random numbers of its own in training, so that tokens stay where they are.
    """
    layer = case.layer()
    x, valid, ids = case.inputs()
    expected = results(layer, x, valid, ids)
    for filler in (100.0, float("nan")):
        other = x.masked_fill(~valid.unsqueeze(-1), filler)
        found = results(layer, other, valid, ids.masked_fill(~valid, 7))
        same(found, expected, EXACT, f"padding that holds {filler:g} changed")
    if case.group != "sequence" or (case.training and not steady):
        return
    # All real tokens to the left, then to the right: outputs of the real tokens and losses stay.
    flipped = []
    for left in (True, False):
        order = valid.to(torch.int).argsort(dim=1, descending=left, stable=True)
        moved = x.gather(1, order.unsqueeze(-1).expand_as(x))
        flipped.append((moved, valid.gather(1, order), ids.gather(1, order)))
    before, r = run(layer, x, valid, ids)
    if r.share is not None or r.capacity is None:
        moved, real, names = flipped[0]
        flipped.append((_longer(moved), _longer(real), _longer(names)))
    for moved, real, names in flipped:
        after, s = run(layer, moved, real, names)
        name = "output of real tokens"
        same({name: after[real]}, {name: before[valid]}, EXACT, "padding changed the")
        for loss in (Balance(), RouterZ()):
            name = f"{type(loss).__name__} loss"
            same({name: loss([s])}, {name: loss([r])}, EXACT, "padding changed the")


def _longer(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(x.shape[0], 4, *x.shape[2:])], 1)


@breaks("outputs depend on which sequences share a batch, and gradients do not add up over micro-batches")
def sequences_do_not_meet(case: Case, *, steady: bool = True) -> None:
    """A sequence gets the same outputs alone as in a batch, and gradients of micro-batches add up to the batch's.

    Without `steady` a batch of another size has other random numbers in training: then others take their places.
    """
    layer = case.layer()
    x, valid, ids = case.inputs()
    if case.training and not steady:
        expected, _ = run(layer, x, valid, ids)
        for b in range(len(x)):
            mine = torch.arange(len(x), device=x.device) == b
            row, place = mine.view(-1, 1, 1), mine.view(-1, 1)
            y, _ = run(layer, torch.where(row, x, x.flip(1) + 1), valid | ~place, torch.where(place, ids, ids + 1))
            same({"output": y[b]}, {"output": expected[b]}, EXACT, "other sequences of the batch changed the")
        return
    zero = x.new_zeros(())

    def task(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        y, _ = run(layer, x[part], valid[part], ids[part])
        probe = torch.sin(torch.arange(x.numel(), device=x.device, dtype=x.dtype)).view_as(x)
        loss = (y * probe[part]).sum()
        return y, gradients(loss, **learned(layer)) if loss.requires_grad else {}

    whole, grads = task(slice(None))
    parts = [task(slice(b, b + 1)) for b in range(len(x))]
    alone = {"output": torch.cat([y for y, _ in parts])}
    same(alone, {"output": whole}, EXACT, "other sequences of the batch changed the")
    total = {name: sum((part[name] for _, part in parts), zero) for name in grads}
    same(total, grads, EXACT, "other sequences of the batch changed the gradient of")


def _reach(layer: MoELayer, case: Case) -> tuple[float, int]:
    """The largest change that editing the tokens after t makes to the outputs up to t, and that t."""
    x, valid, ids = case.inputs()
    before, _ = run(layer, x, valid, ids)
    found = (0.0, 0)
    for t in range(x.shape[1] - 1):
        for seed in range(2):
            seeded(seed)
            later, names = x.clone(), ids.clone()
            later[:, t + 1 :] = torch.randn_like(later[:, t + 1 :])
            names[:, t + 1 :] = torch.randint_like(names[:, t + 1 :], 50)
            after, _ = run(layer, later, valid, names)
            found = max(found, (error(after[:, : t + 1], before[:, : t + 1]), t))
    return found


@breaks("a causal model learns to read the answer, and fails when it generates (name the reason in `leaks`)")
def the_future_changes_nothing(case: Case, modes: tuple[bool, ...] = (False, True)) -> None:
    """Editing the tokens after t changes no output up to t, in evaluation (False in `modes`) and in training (True)."""
    for training in modes:
        off, t = _reach(case.layer(training=training), case)
        mode = "training" if training else "evaluation"
        expect(
            off <= EXACT,
            f"tokens after position {t} changed outputs before it in {mode} (relative error {off:.2g}, at most {EXACT} "
            "expected of a part that declares no leak)",
        )


@breaks("causal models refuse a part that would do them no harm")
def leaks_as_declared(case: Case) -> None:
    """Where a leak is declared, some later token does change an earlier output, in training or in evaluation."""
    reason = case.layer().leaks
    expect(reason, "no leak is declared: hold the_future_changes_nothing instead")
    # Three inputs, as a leak need not show in all.
    for seed in (case.seed, case.seed + 1, case.seed + 2):
        for training in (True, False):
            if _reach(case.layer(training=training), replace(case, seed=seed))[0] > 1e-6:
                return
    expect(False, f"`leaks` is declared ({reason}), but no later token changed an earlier output")


@breaks("a token's expert depends on where it stands, and what it learns at one place is lost at another")
def order_goes_with_the_tokens(case: Case) -> None:
    """Without capacity, permuting a sequence permutes its outputs."""
    case = replace(case, capacity="dropless", capacity_options=None)
    layer = case.layer()
    x, valid, ids = case.inputs()
    order = torch.randperm(x.shape[1], device=x.device)
    before, _ = run(layer, x, valid, ids)
    after, _ = run(layer, x[:, order], valid[:, order], ids[:, order])
    same({"output": after}, {"output": before[:, order]}, EXACT, "another order of the tokens changed the")


@breaks("capacity is shared between tokens that should not meet")
def groups_are_layers_of_their_own(case: Case) -> None:
    """`group` counts capacity as if each group were a sequence given alone, a short last one filled with padding."""
    layer = case.layer()
    x, valid, ids = case.inputs()
    y, r = run(layer, x, valid, ids)
    alone = replace(case, group="sequence").layer()
    parts = [oracle.groups(value, case.group) for value in (x, valid, ids)]
    expected = torch.cat([run(alone, *(p[g : g + 1] for p in parts))[0][0] for g in range(len(parts[0]))])
    expected = expected[: x.shape[0] * x.shape[1]].view_as(x)
    same({"output": y}, {"output": expected}, EXACT, f"a group of {case.group} does not give its own")
    expect(r.batch == x.shape[0], f"the record says {r.batch} sequences, the batch has {x.shape[0]}")
    expect(r.length == x.shape[1], f"the record says sequences of {r.length} tokens, they have {x.shape[1]}")
