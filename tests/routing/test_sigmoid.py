"""Sigmoid affinities and the bias on the choice, against equations 12 to 16 of arXiv 2412.19437 in a loop."""

from __future__ import annotations

import copy
import math

import oracle
import pytest
import torch
from torch import Tensor

from switchkit import Entropy, MutualInformation, Routing, Sigmoid
from switchkit.losses.base import Loss
from switchkit.routing.grouping import limit_to_groups

D, E = 6, 8


def route(router: Sigmoid, x: Tensor) -> Routing:
    return router.eval()(x, None, torch.ones(x.shape[:2], dtype=torch.bool))


def tokens(groups: int = 2, size: int = 20) -> Tensor:
    return 3 * torch.randn(groups, size, D, dtype=torch.float64)


def biased(shift: float = 0.0, **options) -> Sigmoid:
    router = Sigmoid(D, E, **options).double()
    router.bias.copy_(torch.linspace(-0.4, 0.5, E) + shift)
    return router


def loop(router: Sigmoid, x: Tensor, *, groups: int = 1, top_groups: int = 1) -> tuple[list[int], list[float]]:
    """The choice and the weights of one token."""
    s = [1 / (1 + math.exp(-v)) for v in (router.weight @ x).tolist()]
    biased = [v + b for v, b in zip(s, router.bias.tolist(), strict=True)]
    size = E // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    score = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in members]
    best = sorted(range(groups), key=lambda g: -score[g])[:top_groups]
    open_ = [e for g in best for e in members[g]]
    chosen = sorted(open_, key=lambda e: -biased[e])[: router.k]
    total = sum(s[e] for e in chosen) if router.normalize else 1
    return chosen, [router.scale * s[e] / total for e in chosen]


@pytest.mark.parametrize("shift", [0.0, -3.0, 3.0])
@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2), (2, 1), (4, 4), (8, 3)])
@pytest.mark.parametrize("normalize", [True, False])
def test_it_is_the_loop(groups: int, top_groups: int, normalize: bool, shift: float) -> None:
    """The bias decides and never weighs; groups hold whatever the sign of the biased scores."""
    router = biased(shift, k=3, scale=2.5, normalize=normalize, groups=groups, top_groups=top_groups)
    x = tokens()
    r = route(router, x)
    for g in range(2):
        for s in range(20):
            expert, weight = loop(router, x[g, s], groups=groups, top_groups=top_groups)
            assert r.expert[g, 3 * s : 3 * s + 3].tolist() == expert
            assert oracle.error(r.weight[g, 3 * s : 3 * s + 3], torch.tensor(weight)) < 1e-6
            affinity = (router.weight @ x[g, s]).sigmoid()
            assert oracle.error(r.probs[g, s], affinity / affinity.sum()) < 1e-12
    assert oracle.error(r.logits, x @ router.weight.T) < 1e-12


def test_a_shift_of_the_bias_changes_nothing() -> None:
    x, options = tokens(), {"k": 3, "groups": 4, "top_groups": 2}
    router = biased(**options)
    expected = route(router, x)
    for shift in (-7.0, 7.0):
        router.bias.copy_(torch.linspace(-0.4, 0.5, E) + shift)
        r = route(router, x)
        assert torch.equal(r.expert, expected.expert)
        assert torch.equal(r.weight, expected.weight)


@pytest.mark.parametrize("best", [1, 2, 5])
@pytest.mark.parametrize("sign", [1, -1])
def test_groups_are_masked_by_their_best_scores(best: int, sign: int) -> None:
    """Two of three groups of four stay, also where all scores are negative."""
    scores = sign * torch.rand(2, 5, 12)
    limited = limit_to_groups(scores, 3, 2, best)
    for g in range(2):
        for s in range(5):
            parts = scores[g, s].view(3, 4).tolist()
            score = [sum(sorted(part, reverse=True)[:best]) for part in parts]
            worst = score.index(min(score))
            inside = torch.ones(12, dtype=torch.bool)
            inside[4 * worst : 4 * worst + 4] = False
            assert torch.equal(limited[g, s], scores[g, s].masked_fill(~inside, -math.inf))


def test_the_bias_gets_tokens_for_an_expert_and_no_gradient() -> None:
    x, router = tokens(), Sigmoid(D, E).double()
    before = route(router, x)
    router.bias[3] += 2.0
    r = route(router, x)
    assert (r.expert.view(2, 20, 2)[..., 0] == 3).all()
    assert not (before.expert.view(2, 20, 2)[..., 0] == 3).all()
    assert not router.bias.requires_grad
    affinity = r.logits.sigmoid().gather(-1, r.expert.view(2, 20, 2))
    assert oracle.error(r.weight.view(2, 20, 2), affinity / affinity.sum(-1, keepdim=True)) < 1e-12


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16).float(),
        lambda m: copy.deepcopy(m).to("cpu", torch.float16),
    ],
)
def test_the_bias_survives_every_cast(cast) -> None:
    """Values that 16 bits do not hold (0.001, 1.007) stay to the last bit, within a bigger module too."""
    router = Sigmoid(D, E)
    router.bias.copy_(1 + 0.001 * torch.arange(E))
    exact = router.bias.clone()
    outer = cast(torch.nn.Sequential(router))
    assert outer[0].bias.dtype == torch.float32
    assert torch.equal(outer[0].bias, exact)
    assert torch.equal(outer.state_dict()["0.bias"], exact)
    other = Sigmoid(D, E).bfloat16()
    other.load_state_dict(outer[0].state_dict())
    assert torch.equal(other.bias, exact)


def test_the_bias_is_float32_from_the_start_and_moves_between_devices() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        router = Sigmoid(D, E)
    finally:
        torch.set_default_dtype(before)
    assert router.weight.dtype == torch.bfloat16
    assert router.bias.dtype == torch.float32
    assert list(router.state_dict()) == ["weight", "bias"]
    meta = Sigmoid(D, E).to("meta")
    assert meta.bias.device.type == "meta"
    assert meta.to_empty(device="cpu").bias.dtype == torch.float32
    assert Sigmoid(D, E).to(device="meta", dtype=torch.float16).bias.dtype == torch.float32
    assert list(Sigmoid(D, E, bias=False).half().state_dict()) == ["weight"]


def test_without_a_bias_the_largest_affinities_are_chosen() -> None:
    x, router = tokens(), Sigmoid(D, E, k=1, bias=False).double()
    r = route(router, x)
    assert torch.equal(r.expert, r.logits.argmax(-1))
    assert torch.equal(r.weight, r.logits.sigmoid().max(-1).values)


def test_affinities_that_vanish_give_no_nan() -> None:
    router = Sigmoid(D, E)
    torch.nn.init.constant_(router.weight, -1000.0)
    r = route(router, torch.ones(1, 2, D))
    assert (r.weight == 0).all()
    assert torch.equal(r.probs, torch.full_like(r.probs, 1 / E))


@pytest.mark.parametrize("logit", [-50.0, -90.0, 200.0])
@pytest.mark.parametrize("loss", [Entropy(), Entropy(of="token"), MutualInformation()])
def test_probabilities_add_up_to_one_at_any_logits_and_have_a_gradient(logit: float, loss: Loss) -> None:
    router = Sigmoid(D, E)
    torch.nn.init.constant_(router.weight, logit / D)
    r = route(router, torch.ones(1, 2, D) + 1e-3 * torch.randn(1, 2, D))
    torch.testing.assert_close(r.probs.sum(-1), torch.ones(1, 2))
    loss([r]).backward()
    assert router.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 9}, "k=9 choices"),
        ({"k": 1, "normalize": True}, "normalize=True with k=1"),
        ({"scale": 0.0}, "scale must be a finite number > 0; got 0.0"),
        ({"groups": 3, "top_groups": 1}, "groups=3 must divide num_experts=8"),
        ({"groups": 0, "top_groups": 1}, "groups=0 must divide num_experts=8"),
        ({"groups": 4}, "groups=4 needs top_groups"),
        ({"groups": 4, "top_groups": 5}, "top_groups must be from 1 to groups=4; got 5"),
        ({"groups": 4, "top_groups": 1, "k": 3}, "k=3 choices do not fit into the 2 experts of top_groups=1"),
    ],
)
def test_bad_options_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Sigmoid(D, E, **options)
    assert says in str(caught.value)
