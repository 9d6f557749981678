"""Outputs and gradients: loops, papers, finite differences and dense layers that say what they must be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from switchkit.dispatch.base import kept_load, placed
from switchkit.losses.balance import Balance
from switchkit.losses.router_z import RouterZ
from switchkit.process import threads
from switchkit.records import Routing, Rows
from switchkit.routing.sigmoid import Sigmoid
from switchkit.testing import oracle
from switchkit.testing.cases import (
    EXACT,
    Case,
    gradients,
    learned,
    make_equal,
    measured,
    objective,
    results,
    run,
    seeded,
)
from switchkit.testing.expect import Broken, breaks, error, expect, same

__all__ = [
    "dispatchers_agree",
    "dropped_tokens_get",
    "equal_experts_are_dense",
    "equals_the_loop",
    "equals_the_paper",
    "experts_see_kept_rows_only",
    "finite_differences_agree",
    "idle_experts_get_zero_gradients",
    "nothing_at_all_is_fine",
    "one_expert_is_dense",
    "rows_of_no_expert_are_zero",
    "task_gradient_reaches_the_router",
]


@breaks("tokens get the output of another expert or token, and the model trains on noise")
def equals_the_loop(case: Case) -> None:
    """Outputs and every gradient are those of a loop over tokens that takes the decisions from the record."""
    layer = case.layer()
    x, valid, ids = case.inputs()
    x.requires_grad_()
    y, r = run(layer, x, valid, ids)
    balance, z = Balance()([r]), RouterZ()([r])
    got = measured(layer, x, y, balance, z, valid)
    naive = oracle.outputs(layer, x * valid.unsqueeze(-1), r)
    same(got, measured(layer, x, naive, balance, z, valid), EXACT, "a loop over the record gives another")


@breaks("what trains is not the published method")
def equals_the_paper(case: Case) -> None:
    """Decisions, outputs, losses and every gradient are those of a loop that knows the weights only."""
    layer = case.layer()
    x, valid, ids = case.inputs()
    x.requires_grad_()
    y, r = run(layer, x, valid, ids)
    got = measured(layer, x, y, Balance()([r]), RouterZ()([r]), valid)
    y, balance, z, decisions = oracle.paper(layer, x, valid, k=layer.router.k, capacity=r.capacity)
    _, kept, _ = placed(r)
    for g, expected in enumerate(decisions):
        rows = zip(r.token[g], r.expert[g], kept[g], r.chosen[g], strict=True)
        found = [(int(t), int(e), bool(k)) for t, e, k, chosen in rows if chosen]
        differ = sum(a != b for a, b in zip(found, expected, strict=False)) + abs(len(found) - len(expected))
        expect(not differ, f"{differ} of {len(expected)} decisions of a sequence are not those of the paper")
    same(got, measured(layer, x, y, balance, z, valid), EXACT, "the paper's formulas give another")


@breaks("results depend on the dispatcher, so that a checkpoint behaves differently elsewhere")
def dispatchers_agree(case: Case) -> None:
    """The dispatcher gives the outputs and gradients of `einsum`."""
    expected = results(replace(case, dispatcher="einsum").layer(), *case.inputs())
    same(results(case.layer(), *case.inputs()), expected, EXACT, "the dispatcher einsum gives another")


@breaks("the optimizer follows a gradient that is not that of the loss")
def finite_differences_agree(case: Case, *, fast: bool = True) -> None:
    """torch.autograd.gradcheck with respect to the tokens and every parameter that learns."""
    case = replace(case, d_model=3, d_ff=4, shape=(2, 4))
    layer = case.layer()
    x, valid, ids = case.inputs()
    named = learned(layer)

    def function(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        seeded(0)
        y, r = torch.func.functional_call(layer, dict(zip(named, parameters, strict=True)), (x, valid, ids))
        return y, Balance()([r]), RouterZ()([r])

    inputs = tuple(value.detach().requires_grad_() for value in (x, *named.values()))
    seeded(3)
    try:
        gradcheck(function, inputs, atol=1e-6, nondet_tol=0.0, fast_mode=fast)
    except GradcheckError as differs:
        first = next((line for line in str(differs).splitlines() if line.strip()), "a gradient differs")
        raise Broken(f"finite differences do not confirm a gradient ({first.strip(' .,:')})") from differs


@breaks("a mixture of one expert is not that expert, so that it cannot start from a dense model")
def one_expert_is_dense(case: Case, *, whole: bool = True) -> None:
    """With a single expert that takes every token, the layer is that expert, in values and gradients.

    Without `whole` the expert is weighted as the router says: affinities that do not add up to one.
    """
    case = replace(case, num_experts=1, k=case.k and 1, capacity="dropless", capacity_options=None)
    layer = case.layer()
    x, valid, ids = case.inputs()
    x.requires_grad_()
    y, r = run(layer, x, valid, ids)
    balance, z = Balance()([r]), RouterZ()([r])
    if whole:
        mine = r.weight.detach()[placed(r)[1]]
        expect(torch.equal(mine, torch.ones_like(mine)), f"one expert has a weight of {float(mine.min()):.3g}, not 1")
    dense = torch.stack([oracle.one_expert(layer.experts, 0, token) for token in x.flatten(0, 1)]).view_as(x)
    dense = oracle.with_always(layer, _total(x, r).unsqueeze(-1) * dense, x)
    expected = measured(layer, x, dense, balance, z, valid)
    same(measured(layer, x, y, balance, z, valid), expected, EXACT, "one expert alone gives another")


def _total(x: Tensor, r: Routing) -> Tensor:
    """Sum of the kept weights of each token."""
    kept = placed(r)[1]
    return torch.zeros_like(x[..., 0]).scatter_add(1, r.token, r.weight.masked_fill(~kept, 0))


@breaks("the size of the output depends on how many experts a token has, and upcycling changes the model")
def equal_experts_are_dense(case: Case) -> None:
    """With the same weights in every expert, each token gets the sum of its weights times the one expert."""
    case = replace(case, capacity="dropless", capacity_options=None)
    layer = case.layer()
    make_equal(layer.experts)
    x, valid, ids = case.inputs()
    y, r = run(layer, x, valid, ids)
    dense = torch.stack([oracle.one_expert(layer.experts, 0, token) for token in x.flatten(0, 1)]).view_as(x)
    total = _total(x, r)
    if layer.router.k > 1 and normalizes(layer.router):
        # What is divided before some choices are not sent adds up with them.
        before = getattr(layer.router, "normalize", None) == "before"
        made = torch.zeros_like(total).scatter_add(1, r.token, r.chosen.to(total.dtype))
        sure = valid & (made == layer.router.k) if before else valid
        off = error(total.masked_fill(~sure, 0), sure.to(x.dtype))
        expect(off <= EXACT, f"the k weights of a token do not add up to 1 (relative error {off:.2g})")
    dense = oracle.with_always(layer, total.unsqueeze(-1) * dense, x) * valid.unsqueeze(-1)
    same({"output": y}, {"output": dense}, EXACT, "with equal experts, the weighted one gives another")


def normalizes(router: Any) -> bool:
    """True where a router says that the weights of a token add up to one."""
    says = getattr(router, "normalize", None) in ("before", "after") or getattr(router, "softmax", "") == "after"
    # True may mean anything in a router of the user's own: the length of its tokens, as in `soft`.
    says = says or (isinstance(router, Sigmoid) and router.normalize)
    return says and getattr(router, "scale", 1) == 1


@breaks("the residual of a dropped token is not what the option promises")
def dropped_tokens_get(case: Case) -> None:
    """Nothing, exactly; or what the option says."""
    layer = case.layer()
    x, valid, ids = case.inputs()
    y, r = run(layer, x, valid, ids)
    _, kept, _ = placed(r)
    tokens = oracle.groups(x, case.group)
    out = oracle.groups(y, case.group)
    seen = 0
    for g in range(len(tokens)):
        for s in range(tokens.shape[1]):
            mine = (r.token[g] == s) & r.chosen[g]
            if not r.valid[g, s]:
                expect(bool((out[g, s] == 0).all()), "padding got an output")
            elif mine.any() and not (mine & kept[g]).any():
                seen += 1
                promised = {
                    "zero": torch.zeros_like(tokens[g, s]),
                    "input": tokens[g, s],
                    "weighted_input": r.weight[g][mine].sum() * tokens[g, s],
                }[case.dropped]
                off = error(out[g, s], promised)
                bound = EXACT if case.dropped == "weighted_input" else 0
                expect(off <= bound, f"a dropped token gets something else than {case.dropped} (error {off:.2g})")
    expect(seen, "nothing was dropped: this case shows nothing")


@breaks("a mixture of experts then costs as much as all of them together")
def experts_see_kept_rows_only(case: Case) -> None:
    """The rows that experts compute on are the kept assignments, not every token for every expert."""
    layer = case.layer()
    seen: list[Rows] = []
    layer.experts.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with threads(1):  # for several, a dispatcher may fill loads up with zeros
        _, r = run(layer, *case.inputs())
    wanted = kept_load(r).sum(0)
    if r.share is not None:
        # All slots are mixtures of tokens, so all are computed.
        assert r.capacity is not None
        wanted = torch.full_like(wanted, len(r.expert) * r.capacity)
    got, want = int(seen[0].load.sum()), int(wanted.sum())
    expect(got == want, f"experts compute {got} rows where {want} assignments were kept")
    expect(torch.equal(seen[0].load, wanted), "rows of the experts are not those of the kept assignments")


@breaks("the router does not learn which expert is better, only to be even")
def task_gradient_reaches_the_router(case: Case) -> None:
    """In training, a loss of the outputs alone has a gradient for every parameter of the router."""
    layer = case.layer(training=True)
    x, valid, ids = case.inputs()
    y, _ = run(layer, x, valid, ids)
    loss = objective(y, y.new_zeros(()), y.new_zeros(()), valid)
    expect(loss.requires_grad, "the outputs have no gradient at all")
    for name, grad in gradients(loss, **learned(layer.router)).items():
        size = float(grad.norm()) / grad.numel() ** 0.5
        expect(size > 1e-3, f"the router's {name} gets a gradient of {size:.1g} from the task, at least 1e-3 expected")


@breaks("DDP waits for a gradient that never comes, or the optimizer takes garbage for one")
def idle_experts_get_zero_gradients(case: Case) -> None:
    """One token for k experts: the others have a gradient, and it is zero, whatever the memory held before."""
    case = replace(case, shape=(1, 1), capacity="dropless", capacity_options=None)
    layer = case.layer()
    x, valid, ids = case.inputs()
    poison = [torch.full_like(p, float("nan")) for p in layer.parameters() for _ in range(4)]
    del poison
    y, r = run(layer, x, valid, ids)
    grads = gradients(y.sum(), **learned(layer.experts))
    _, _, made = placed(r)
    for name, grad in grads.items():
        expect(bool(grad.isfinite().all()), f"{name} has a gradient of what the memory held")
        for e in range(case.num_experts):
            if grad.dim() and len(grad) == case.num_experts and made[0, e] == 0:
                expect(bool((grad[e] == 0).all()), f"expert {e} had no token, but {name} has a gradient")


@breaks("what a dropped token leaves in memory reaches the others")
def rows_of_no_expert_are_zero(case: Case) -> None:
    """In the sorted layout, rows past the last expert's come back as zeros and get no gradient, whatever they hold."""
    layer = case.layer()
    x = case.inputs()[0].flatten(0, 1).requires_grad_()
    sizes = [0] * case.num_experts
    sizes[:2] = [3, 2]
    load = torch.tensor(sizes, device=x.device)
    for known in (tuple(sizes), None):
        y: Tensor = layer.experts(Rows(x=x, load=load, sizes=known))
        expect(y.shape == x.shape, f"rows of shape {list(x.shape)} come back as {list(y.shape)}")
        expect(bool((y[sum(sizes) :] == 0).all()), "rows that belong to no expert have an output, zeros expected")
        (grad,) = torch.autograd.grad(y.sum(), x)
        expect(bool((grad[sum(sizes) :] == 0).all()), "rows that belong to no expert have a gradient, zero expected")


@breaks("an empty or padded batch, as at the end of an epoch, stops training or makes its weights NaN")
def nothing_at_all_is_fine(case: Case) -> None:
    """No sequence, no token, one token, only padding: outputs, losses and gradients are there and never NaN."""
    for batch, length in ((0, 5), (2, 0), (0, 0), (1, 1), (2, 5)):
        layer = case.layer()
        x = torch.randn(batch, length, case.d_model, dtype=case.dtype, device=case.device)
        valid = torch.zeros(batch, length, dtype=torch.bool, device=case.device)
        valid[:] = (batch, length) == (1, 1)
        found = results(layer, x, valid, torch.zeros_like(valid, dtype=torch.long))
        for name, value in found.items():
            expect(bool(value.isfinite().all()), f"the {name} of a batch of {batch} x {length} is not finite")
            if not valid.any():
                zero = bool((value == 0).all())
                expect(zero, f"the {name} of a batch of {batch} x {length} without a real token is not zero")
        expect(found["y"].shape == x.shape, f"a batch of {batch} x {length} comes back as {list(found['y'].shape)}")
