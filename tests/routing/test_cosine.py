"""Logits by angle, against their formula token by token."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from torch import Tensor

from switchkit import Cosine, Routing

D, E = 6, 4


def route(router: Cosine, x: Tensor) -> Routing:
    return router.eval()(x, None, torch.ones(x.shape[:2], dtype=torch.bool))


def tokens(groups: int = 2, size: int = 9) -> Tensor:
    return torch.randn(groups, size, D, dtype=torch.float64)


def dot(a: list[float], b: list[float]) -> float:
    return sum(u * v for u, v in zip(a, b, strict=True))


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("normalize", [None, "after", "never"])
def test_it_is_its_formula(k: int, normalize: str | None) -> None:
    if k == 1 and normalize == "after":
        return
    x, router = tokens(), Cosine(D, E, k=k, normalize=normalize, temperature=0.3).double()
    r = route(router, x)
    for g in range(2):
        for s in range(9):
            z = [dot(row, x[g, s].tolist()) for row in router.projection.tolist()]
            logits = []
            for e in router.embedding.tolist():
                logits.append(dot(z, e) / math.sqrt(dot(z, z) * dot(e, e)) / 0.3)
            total = sum(math.exp(v) for v in logits)
            best = sorted(range(E), key=lambda e, logits=logits: -logits[e])[:k]
            probs = [math.exp(logits[e]) / total for e in best]
            weight = [p / sum(probs) for p in probs] if normalize is None and k > 1 else probs
            mine = slice(s * k, (s + 1) * k)
            assert r.expert[g, mine].tolist() == best
            # Parameters were drawn in float32: the temperature is off by its rounding.
            assert oracle.error(r.logits[g, s], torch.tensor(logits)) < 1e-6
            assert oracle.error(r.weight[g, mine], torch.tensor(weight)) < 1e-6
    assert r.renormalize == (normalize == "after")
    assert r.logits.stride(-1) == 2 * 9, "experts come first in memory"


def test_neither_the_norm_of_a_token_nor_that_of_an_expert_counts() -> None:
    x, router = tokens(), Cosine(D, E).double()
    expected = route(router, x)
    with torch.no_grad():
        router.embedding.mul_(torch.tensor([0.1, 3.0, 7.0, 100.0]).view(E, 1))
    assert oracle.error(route(router, 50 * x).logits, expected.logits) < 1e-12
    assert (route(router, x).logits.abs() <= 1 / 0.07 + 1e-3).all()


def test_the_temperature_learns_and_has_a_floor() -> None:
    router = Cosine(D, E, temperature=0.5).double()
    x = tokens()
    hot = route(router, x).logits
    with torch.no_grad():
        router.log_temperature.fill_(-50.0)
    assert oracle.error(route(router, x).logits, hot * 50) < 1e-6
    router.reset_parameters()
    assert abs(0.01 + router.log_temperature.exp().item() - 0.5) < 1e-6
    grads = oracle.gradients(route(router, x).weight[:, ::2].sum(), **dict(router.named_parameters()))
    assert all(grad.norm() > 1e-4 for grad in grads.values())


def test_a_token_of_zeros_has_even_odds_and_a_bounded_gradient() -> None:
    x = torch.zeros(1, 1, D, requires_grad=True)
    router = Cosine(D, E)
    r = route(router, x)
    assert torch.equal(r.probs, torch.full_like(r.probs, 1 / E))
    grads = oracle.gradients(r.weight[0, 0], x=x, **dict(router.named_parameters()))
    assert all(grad.isfinite().all() for grad in grads.values())
    # The floor of 1e-6 in place of the norm: d logit / d x = P^T unit(e) / (1e-6 * temperature).
    (grad,) = torch.autograd.grad(route(router, x).logits[0, 0, 1], x)
    unit = router.embedding[1] / router.embedding[1].norm()
    assert oracle.error(grad[0, 0], 1e6 / 0.07 * unit @ router.projection) < 1e-5


def test_projections_and_experts_start_with_a_length_of_one() -> None:
    router = Cosine(800, 100, width=50)
    assert abs(router.projection.std() * 800**0.5 - 1) < 0.02
    assert abs(router.embedding.std() * 50**0.5 - 1) < 0.05


def test_the_projection_is_half_as_wide_and_no_wider_than_256() -> None:
    assert [Cosine(d, 2).projection.shape[0] for d in (1, 2, 9, 512, 1024)] == [1, 1, 4, 256, 256]
    assert Cosine(D, E, width=5).embedding.shape == (E, 5)
    assert list(Cosine(D, E).state_dict()) == ["projection", "embedding", "log_temperature"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 5}, "k=5 choices"),
        ({"width": 0}, "width must be at least 1, or null for half of d_model; got 0"),
        ({"temperature": 0.01}, "temperature must be a finite number > 0.01; got 0.01"),
        ({"normalize": True}, "normalize must be 'before', 'after', 'never' or null; got True"),
        ({"k": 1, "normalize": "before"}, "normalize='before' with k=1 makes every weight 1"),
    ],
)
def test_bad_options_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Cosine(D, E, **options)
    assert says in str(caught.value)
