"""The loss on the router's rows, in closed form and through a router of a user's own."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from properties import collapsed

from switchkit import LinearRouter, Orthogonality, Router, named, token_choice
from switchkit.routing.base import softmax


def of(rows: torch.Tensor) -> torch.Tensor:
    return Orthogonality()([replace(collapsed(0, num_experts=len(rows)), extras={"rows": rows})])


def test_it_is_the_mean_squared_cosine_of_two_experts() -> None:
    rows = torch.randn(4, 6, dtype=torch.float64)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    cosines = torch.stack([torch.cosine_similarity(rows[i], rows[j], dim=0) for i, j in pairs])
    assert oracle.error(of(rows), cosines.square().mean()) < 1e-12


def test_extremes() -> None:
    assert of(3 * torch.eye(4, 6)) == 0
    assert of(torch.ones(4, 6)).item() == pytest.approx(1)
    assert of(torch.ones(1, 6)) == 0
    # Two orthogonal pairs of parallel rows: 4 of the 12 ordered pairs have cosine 1.
    assert of(torch.eye(2, 6).repeat(2, 1)).item() == pytest.approx(4 / 12)


def test_half_precision_and_autocast_do_not_round_it() -> None:
    rows = torch.randn(4, 64).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = of(rows)
    assert found.dtype == torch.float32
    assert oracle.error(found, of(rows.double())) < 1e-6


class Mine(LinearRouter):
    def forward(self, tokens, limit, valid, ids=None):
        logits = self.logits(tokens)
        weight, expert = softmax(logits).topk(1, dim=-1)
        return token_choice(logits, softmax(logits), expert, weight, valid, extras=self.extras())


def test_its_gradient_reaches_the_router() -> None:
    """Closed loop: descending makes the rows of a linear router orthogonal."""
    router = Mine(6, 4)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.1)
    x, valid = torch.randn(1, 3, 6), torch.ones(1, 3, dtype=torch.bool)
    before = Orthogonality()([router(x, None, valid)])
    for _ in range(100):
        optimizer.zero_grad()
        Orthogonality()([router(x, None, valid)]).backward()
        optimizer.step()
    assert Orthogonality()([router(x, None, valid)]) < 0.01 * before


@pytest.mark.parametrize("name", [name for name, cls in named(Router).items() if issubclass(cls, LinearRouter)])
def test_every_linear_router_hands_its_rows_over(name: str) -> None:
    router = named(Router)[name](6, 4)
    loss = Orthogonality()([router.eval()(torch.randn(1, 5, 6), None, torch.ones(1, 5, dtype=torch.bool))])
    rows = router.weight / router.weight.norm(dim=1, keepdim=True)
    expected = sum((rows[a] @ rows[b]) ** 2 for a in range(4) for b in range(4) if a != b) / 12
    grads = (torch.autograd.grad(x, router.weight)[0] for x in (loss, expected))
    assert oracle.error(loss, expected) < 1e-5
    assert oracle.error(*grads) < 1e-5


def test_a_router_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs extras 'rows' \[E, D\], which routers with one linear map provide"):
        Orthogonality()([collapsed(0)])
