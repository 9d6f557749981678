"""Importance and load of the first sparse layers, against loops and dice."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from properties import Case, collapsed, run

from switchkit import L1, Importance, Load, NoTokenLeftBehind, Routing
from switchkit.losses.variation import smooth_load, squared_variation
from switchkit.routing.base import softmax, token_choice


def record() -> Routing:
    return run(Case(k=2).layer(), *Case().inputs())[1]


def noisy(tokens: int = 5, experts: int = 6, k: int = 2) -> Routing:
    """The record of noisy top-k gating on random logits; the last token is padding."""
    logits = torch.randn(1, tokens, experts, dtype=torch.float64)
    std = torch.rand_like(logits) + 0.2
    with_noise = logits + std * torch.randn_like(logits)
    best, expert = with_noise.topk(k, dim=-1)
    valid = torch.ones(1, tokens, dtype=torch.bool)
    valid[0, -1] = False
    made = token_choice(logits, softmax(with_noise), expert, best.softmax(-1), valid)
    return replace(made, extras={"noisy": with_noise, "std": std})


def test_variation_divides_by_the_number_of_experts() -> None:
    x = torch.rand(7, dtype=torch.float64)
    assert oracle.error(squared_variation(x), (x.std(correction=0) / x.mean()) ** 2) < 1e-12
    assert squared_variation(torch.zeros(3)) == 0


@pytest.mark.parametrize("of", ["weight", "probs"])
def test_importance_is_a_sum_over_real_tokens(of: str) -> None:
    r = record()
    total = torch.zeros(4, dtype=torch.float64)
    for g in range(3):
        for n in range(14):
            if of == "weight" and r.chosen[g, n]:
                total[r.expert[g, n]] += r.weight[g, n]
        for s in range(7):
            if of == "probs" and r.valid[g, s]:
                total += r.probs[g, s]
    expected = ((total - total.mean()) ** 2).mean() / total.mean() ** 2
    assert not torch.equal(r.kept, r.chosen)
    assert oracle.error(Importance(of=of)([r]), expected) < 1e-12


@pytest.mark.parametrize("k", [1, 2, 5])
def test_chances_are_those_of_dice(k: int) -> None:
    """Draw the noise of one expert 20,000 times more and count how often it is among the k best."""
    r = noisy(tokens=3, k=k)
    logits, std, seen = r.logits[0], r.extras["std"][0], r.extras["noisy"][0]
    expected = torch.zeros(6, dtype=torch.float64)
    for t in range(2):
        for e in range(6):
            again = seen[t].repeat(20_000, 1)
            again[:, e] = logits[t, e] + std[t, e] * torch.randn(20_000, dtype=torch.float64)
            expected[e] += (again.topk(k, dim=-1).indices == e).any(-1).double().mean()
    # Five standard errors of a sum of two shares.
    assert (smooth_load(r, excluding=True) - expected).abs().max() < 5 * 0.5 * (2 / 20_000) ** 0.5


@pytest.mark.parametrize("threshold", ["excluding", "kth"])
def test_load_is_its_definition(threshold: str) -> None:
    """Equations 8 to 11 by sorting the others' logits, one expert at a time; V-MoE sorts all of them."""
    r = noisy()
    normal = torch.distributions.Normal(0.0, 1.0)
    total = torch.zeros(6, dtype=torch.float64)
    for t in range(4):
        for e in range(6):
            rivals = [r.extras["noisy"][0, t, i] for i in range(6) if threshold == "kth" or i != e]
            bar = sorted(rivals, reverse=True)[1]
            total[e] += normal.cdf((r.logits[0, t, e] - bar) / r.extras["std"][0, t, e])
    expected = total.var(correction=0) / total.mean() ** 2
    assert oracle.error(Load(threshold=threshold)([r]), expected) < 1e-6


def test_every_expert_chosen_has_no_bar_to_pass() -> None:
    r = noisy(experts=3, k=3)
    assert smooth_load(r, excluding=True).tolist() == [4, 4, 4]
    assert Load()([r]) == 0


def test_descending_it_evens_the_load_out() -> None:
    """Closed loop: a bias that starts in favour of one expert of six ends with all of them in use."""
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 6, generator=numbers)
    bias = torch.tensor([3.0, 0, 0, 0, 0, 0], requires_grad=True)
    valid = torch.ones(1, 64, dtype=torch.bool)

    def routed() -> Routing:
        logits = x + bias
        with_noise = logits + 0.5 * torch.randn(x.shape, generator=numbers)
        weight, expert = with_noise.topk(1, dim=-1)
        made = token_choice(logits, softmax(logits), expert, weight, valid)
        return replace(made, extras={"noisy": with_noise, "std": torch.full_like(logits, 0.5)})

    def busiest() -> float:
        return torch.bincount(routed().expert.flatten(), minlength=6).max().item() / 64

    assert busiest() > 0.7
    optimizer = torch.optim.SGD([bias], lr=1)
    for _ in range(60):
        optimizer.zero_grad()
        Load()([routed()]).backward()
        optimizer.step()
    assert busiest() < 0.35


@pytest.mark.parametrize("k", [2, 4])
def test_it_trains_the_router_that_provides_the_noise(k: int) -> None:
    """Gradients reach both weights of noisy_top_k, as long as there is a bar to pass."""
    layer = Case(router="noisy_top_k", k=k).layer(training=True)
    loss = Load()([run(layer, *Case().inputs())[1]])
    assert loss.requires_grad == (k < 4)
    if k < 4:
        found = oracle.gradients(loss, weight=layer.router.weight, noise=layer.router.noise_weight)
        assert all(grad.isfinite().all() and grad.any() for grad in found.values())


@pytest.mark.parametrize("change", [{"extras": {}}, {"k": None}], ids=["quiet", "irregular"])
def test_a_router_without_noise_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="which the router noisy_top_k provides"):
        Load()([replace(noisy(), **change)])


def test_collapse_is_the_worst() -> None:
    for k in (1, 2, 3):
        assert Importance()([collapsed(0, k=k)]).item() == pytest.approx(4 / k - 1)


def test_importance_counts_overflow_for_the_router_s_choice() -> None:
    """Three of four tokens for one expert find no room and go elsewhere: it still got all the weight, E - 1."""
    routing = collapsed(0, tokens=4)  # probabilities of 0, to whose experts nothing would go
    routing = replace(routing, probs=routing.probs.clamp(min=1e-9), slot=None, kept=None, load=None)
    moved = NoTokenLeftBehind().place(routing, 1, training=True)
    assert moved.taken.tolist() == [[1] * 4]
    assert Importance()([moved]).item() == pytest.approx(3)


AFTER = (("normalize", "after"), ("scale", 2.5))


@pytest.mark.parametrize(
    ("policy", "k", "options"),
    [("factor", 2, AFTER), ("no_token_left_behind", 1, ()), ("no_token_left_behind", 2, AFTER)],
)
def test_weights_are_those_before_the_drop(policy: str, k: int, options: tuple) -> None:
    """A capacity that binds changes the weights of what is kept or goes elsewhere, and no sum over those given."""
    free, tight = (
        run(Case(k=k, capacity=name, options=options).layer(), *Case().inputs())[1] for name in ("dropless", policy)
    )
    assert not torch.equal(tight.weight, free.weight)
    for loss in (Importance(), L1(1.0), L1(1.0, refined=False)):
        assert oracle.error(loss([tight]), loss([free])) < 1e-12
