"""The Triton kernels against plain operations in float64: on a GPU, or by Triton's interpreter on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import properties
import pytest
import torch
from properties import Case
from torch import Tensor

from switchkit.capacity import base
from switchkit.dispatch import sorted as sorted_rows
from switchkit.experts import gated as gated_experts
from switchkit.experts.base import ACTIVATIONS
from switchkit.kernels import usable as place

pytest.importorskip("triton")
from switchkit.kernels.gated import gated, gated_backward
from switchkit.kernels.order import arrange, queue
from switchkit.kernels.rows import clear_idle, clear_tail, weighted_sum, weighted_sum_backward

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # to infinity, whose inverse is 0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# Rounding of one result; a wrong row, weight or derivative is off by 0.1 and more.
CLOSE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 6e-3}
WIDTHS = [24, 300, 2100]  # less than a program's columns, more than a power of two, more than one program's


def close(found: Tensor, wanted: Tensor) -> bool:
    assert found.shape == wanted.shape
    return float((found.double() - wanted).norm() / wanted.norm()) < CLOSE[found.dtype]


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_rows_come_back_weighted(dtype: torch.dtype, width: int, k: int) -> None:
    row = torch.randperm(7 * k).view(7, k)
    source = torch.empty(7 * k, dtype=torch.long).scatter_(0, row.flatten(), torch.arange(7 * k))
    rows, weight = torch.randn(7 * k, width, dtype=dtype), torch.randn(7, k, dtype=dtype)
    grad = torch.randn(7, width, dtype=dtype)
    exact, exact_weight = (t.detach().double().clone().requires_grad_() for t in (rows, weight))
    wanted = torch.einsum("tkd,tk->td", exact[row], exact_weight)
    wanted.backward(grad.double())
    assert exact.grad is not None
    assert exact_weight.grad is not None
    assert close(weighted_sum(rows, weight, row), wanted.detach())
    assert close(weighted_sum(rows, None, row), exact.detach()[row].sum(1))
    grad_rows, product = weighted_sum_backward(grad, rows, weight, source)
    assert close(grad_rows, exact.grad)
    assert close(product.take(row), exact_weight.grad)


@pytest.mark.parametrize("used", [0, 5, 40, 70])
def test_spare_rows_are_cleared(used: int) -> None:
    """The others keep even what is not a number."""
    rows = torch.full((70, 300), float("nan"))
    clear_tail(rows, torch.tensor([0, used // 2, used], dtype=torch.int32))
    assert rows[:used].isnan().all()
    assert (rows[used:] == 0).all()


def test_idle_experts_are_cleared() -> None:
    weight = torch.full((4, 300, 301), float("nan"))
    clear_idle(weight, torch.tensor([1, 0, 7, 0]))
    assert (weight[[1, 3]] == 0).all()
    assert weight[[0, 2]].isnan().all()


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates(dtype: torch.dtype, activation: str) -> None:
    for width in WIDTHS:
        hidden, grad = 3 * torch.randn(4, 2 * width, dtype=dtype), torch.randn(4, width, dtype=dtype)
        exact = hidden.double().clone().requires_grad_()
        gate, value = exact.chunk(2, -1)
        wanted = ACTIVATIONS[activation](gate) * value
        wanted.backward(grad.double())
        assert exact.grad is not None
        assert close(gated(hidden, activation), wanted.detach())
        assert close(gated_backward(grad, hidden, activation), exact.grad)


def test_large_numbers_overflow_nowhere() -> None:
    """The logistic function of -1000 is 0, not infinity over infinity."""
    hidden = torch.tensor([[-1e3, 1e3, 1.0, 1.0]])
    for activation, function in ACTIVATIONS.items():
        assert torch.equal(gated(hidden, activation), function(hidden[:, :2]))
        found = gated_backward(torch.ones(1, 2), hidden, activation)
        assert torch.equal(found, torch.tensor([[0.0, 1.0, 0.0, 1e3]]))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_a_gate_of_zero_has_the_slope_that_torch_gives_it(activation: str) -> None:
    """Of a ReLU none, as for rows that fill up."""
    hidden = torch.tensor([[0.0, 0.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    gate, value = hidden.chunk(2, -1)
    (wanted,) = torch.autograd.grad((ACTIVATIONS[activation](gate) * value).sum(), hidden)
    found = gated_backward(torch.ones(1, 2, dtype=torch.float64), hidden.detach(), activation)
    torch.testing.assert_close(found, wanted)


# One group, many groups, more assignments than one program takes at a time, more experts than that, nothing.
@pytest.mark.parametrize(
    ("groups", "n", "experts"),
    [
        (1, 1, 1),
        (3, 7, 4),
        (2, 2500, 5),
        (2, 0, 3),
        (0, 4, 3),
        pytest.param(600, 3, 3, marks=pytest.mark.slow),
        pytest.param(2, 30, 1500, marks=pytest.mark.slow),
    ],
)
def test_assignments_queue_and_are_arranged(groups: int, n: int, experts: int) -> None:
    expert, chosen = torch.randint(0, experts, (groups, n)), torch.rand(groups, n) < 0.8
    slot, load = queue(expert, chosen, experts)
    hot = (expert.unsqueeze(-1) == torch.arange(experts)) & chosen.unsqueeze(-1)
    assert torch.equal(slot, (hot.cumsum(1) - hot.long()).gather(-1, expert.unsqueeze(-1)).squeeze(-1))
    assert torch.equal(load, hot.sum(1))
    kept, taken = chosen & (slot < 2), load.clamp(max=2)
    row, source, rows = arrange(expert, slot, kept, taken)
    used = int(taken.sum())
    assert torch.equal(rows, taken.sum(0))
    assert torch.equal(source[row.flatten()], torch.arange(groups * n))
    assert kept.flatten()[source[:used]].all()
    # By expert, in it by group, in it by slot.
    place = (expert * groups + torch.arange(groups).unsqueeze(-1)) * 2 + slot
    assert (place.flatten()[source[:used]].diff() > 0).all()


def test_slots_that_do_not_exist_stay_within_the_rows() -> None:
    """The fault of a user's own policy; plain operations raise at it, and a kernel must not touch other memory."""
    expert, slot = torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0, 1000, -1000, 1]])
    row, source, _ = arrange(expert, slot, torch.ones(1, 4, dtype=torch.bool), torch.tensor([[4]]))
    assert row.tolist() == [[0, 3, 0, 1]]
    assert ((source >= 0) & (source < 4)).all()


@pytest.mark.daily("switch-None-factor", "top_k-2-dropless", "relu-2-factor")
@pytest.mark.parametrize("capacity", ["factor", "dropless"])
@pytest.mark.parametrize(("router", "k"), [("switch", None), ("top_k", 2), ("relu", 2)])
def test_the_layer_equals_the_loop(monkeypatch: pytest.MonkeyPatch, router: str, k: int | None, capacity: str) -> None:
    """Outputs and every gradient, with drops and padding, where the layer takes the kernels."""
    taken = []
    for module in (base, sorted_rows, gated_experts):
        monkeypatch.setattr(module, "usable", lambda x: taken.append(x) is None)
    properties.equals_the_loop(Case(router=router, k=k, capacity=capacity, experts="gated_mlp", device=DEVICE))
    assert len(taken) > 4


def test_an_irregular_list_keeps_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are in float32, and no kernel brings its rows back."""
    for module in (base, sorted_rows, gated_experts):
        monkeypatch.setattr(module, "usable", lambda x: True)
    case = Case(router="expert_choice", dtype=torch.bfloat16, device=DEVICE)
    y, routing = case.layer()(*case.inputs())
    assert (y.dtype, routing.weight.dtype) == (torch.bfloat16, torch.float32)


def test_a_machine_without_a_compiler_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first launch fails, plain operations take over."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    place._works.cache_clear()
    monkeypatch.setattr(torch, "zeros", broken)
    try:
        with pytest.warns(UserWarning, match=r"Triton does not work on this machine \(RuntimeError: Failed to find C"):
            assert not place._works(0)
        assert not place._works(0)
    finally:
        place._works.cache_clear()


def test_cpu_tensors_take_plain_operations() -> None:
    assert not place.usable(torch.zeros(1, device="cpu"))
