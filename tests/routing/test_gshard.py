"""Two experts per token, against algorithm 1 of arXiv 2006.16668 in a loop."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from torch import Tensor

from switchkit import GShard, Routing

D, E = 6, 4


def route(router: GShard, x: Tensor, *, training: bool = False) -> Routing:
    return router.train(training)(x, None, torch.ones(x.shape[:2], dtype=torch.bool))


def tokens(groups: int = 2, size: int = 40) -> Tensor:
    return 5 * torch.randn(groups, size, D, dtype=torch.float64)


@pytest.mark.parametrize("normalize", ["before", "after", "never"])
@pytest.mark.parametrize("policy", ["all", "threshold"])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_loop(normalize: str, policy: str, training: bool) -> None:
    """The normalised second weight decides, whatever normalisation the weights get."""
    mode = {"second": policy} if training else {"eval_second": policy}
    other = {} if training else {"second": "all"}
    x, router = tokens(), GShard(D, E, normalize=normalize, **mode, **other).double()
    r = route(router, x, training=training)
    for g in range(2):
        for s in range(40):
            p = [math.exp(v) for v in (router.weight @ x[g, s]).tolist()]
            p = [v / sum(p) for v in p]
            first, second = sorted(range(E), key=lambda e, p=p: -p[e])[:2]
            g1, g2 = p[first], p[second]
            mine = slice(2 * s, 2 * s + 2)
            assert r.expert[g, mine].tolist() == [first, second]
            assert r.chosen[g, mine].tolist() == [True, policy == "all" or g2 / (g1 + g2) > 0.2]
            weight = [g1 / (g1 + g2), g2 / (g1 + g2)] if normalize == "before" else [g1, g2]
            assert oracle.error(r.weight[g, mine], torch.tensor(weight)) < 1e-6
    assert r.renormalize == (normalize == "after")
    assert 0 < r.chosen[:, 1::2].double().mean() <= 1
    assert r.chosen[:, 1::2].all() == (policy == "all")


@pytest.mark.parametrize("training", [True, False])
def test_a_second_choice_at_the_threshold_is_not_sent(training: bool) -> None:
    """Of certain tokens in float32 its weight is exactly 0, which is not above a threshold of 0."""
    router = GShard(1, 3, second="threshold", eval_second="threshold", threshold=0.0)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[200.0], [0.0], [0.0]]))
    r = route(router, torch.tensor([[[1.0], [0.01]]]), training=training)
    assert r.chosen.tolist() == [[True, False, True, True]]


@pytest.mark.parametrize("multiplier", [1.0, 2.0, 5.0])
def test_the_second_is_sent_in_proportion(multiplier: float) -> None:
    """With probability min(1, multiplier * g2 / (g1 + g2)) in training; always in evaluation."""
    n = 10_000
    router = GShard(D, E, multiplier=multiplier).double()
    # Two experts with logits 0 and -1.5 for every token: s = 1 / (1 + e^1.5) = 0.18.
    with torch.no_grad():
        router.weight.copy_(torch.tensor([0.0, -1.5, -9, -9]).view(4, 1).expand(4, D) / D)
    x = torch.ones(1, n, D, dtype=torch.float64)
    r = route(router, x, training=True)
    p = min(1.0, multiplier / (1 + math.exp(1.5)))
    sent = r.chosen.view(n, 2)[:, 1].double().mean()
    assert abs(sent - p) <= 5 * math.sqrt(p * (1 - p) / n)
    assert r.chosen.view(n, 2)[:, 0].all()
    assert route(router, x).chosen.all()


def test_both_weights_have_a_gradient() -> None:
    x, router = tokens(1, 3), GShard(D, E).double()
    r = route(router, x, training=True)
    grad = oracle.gradients(r.weight[0, 0], weight=router.weight)["weight"]
    assert grad[r.expert[0, 0]].norm() > 0
    assert grad[r.expert[0, 1]].norm() > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_experts": 1}, "num_experts must be at least 2; got 1"),
        ({"second": "none"}, "second must be 'all', 'threshold' or 'proportional'; got 'none'"),
        ({"eval_second": "proportional"}, "eval_second must be 'all' or 'threshold'"),
        ({"second": "threshold", "threshold": 0.5}, "threshold must be in [0, 0.5)"),
        ({"threshold": 0.1}, "threshold=0.1 does nothing"),
        ({"multiplier": 0.0}, "multiplier must be a finite number > 0; got 0.0"),
        ({"multiplier": 3.0, "second": "all"}, "multiplier=3.0 does nothing with second='all'"),
        ({"normalize": "both"}, "normalize must be 'before', 'after', 'never'"),
        ({"jitter": 1.0}, "jitter must be in [0, 1)"),
    ],
)
def test_bad_options_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        GShard(**{"d_model": D, "num_experts": E, **options})
    assert says in str(caught.value)


def test_only_a_second_choice_that_depends_on_the_token_in_evaluation_is_uneven() -> None:
    """A dense twin is of what evaluation costs."""
    assert GShard(8, 4).uneven is None
    assert "only above the threshold" in str(GShard(8, 4, eval_second="threshold").uneven)
