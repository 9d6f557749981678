"""Soft MoE against algorithm 1 in loops."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from torch import Tensor

from switchkit import CapacityPolicy, Dispatcher, MoELayer, Routing, Soft, named
from switchkit.routing.soft import soft

D, E = 6, 3


def make(**options) -> Soft:
    router = Soft(D, E, **options).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


def inputs() -> tuple[Tensor, Tensor]:
    """Three groups of five tokens: full, padded on the right, padded on the left."""
    valid = torch.ones(3, 5, dtype=torch.bool)
    valid[1, 3:] = False
    valid[2, :4] = False
    return torch.randn(3, 5, D, dtype=torch.float64) * valid.unsqueeze(-1), valid


def loops(router: Soft, x: Tensor) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """Logits, dispatch and combine weights of real tokens [n, D]: n rows of E*P numbers."""
    phi = router.phi.flatten(0, 1)
    if router.normalize:
        x = torch.stack([t / t.norm() for t in x])
        phi = router.scale * torch.stack([v / v.norm() for v in phi])
    logits = [[(t @ v).item() for v in phi] for t in x]
    down = [sum(math.exp(row[j]) for row in logits) for j in range(len(phi))]
    dispatch = [[math.exp(v) / down[j] for j, v in enumerate(row)] for row in logits]
    combine = [[math.exp(v) / sum(math.exp(u) for u in row) for v in row] for row in logits]
    return logits, dispatch, combine


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("normalize", [True, False])
def test_softmax_over_tokens_and_over_slots(slots: int, normalize: bool) -> None:
    router, (x, valid) = make(slots=slots, normalize=normalize), inputs()
    r = router(x, None, valid)
    assert r.k == E * slots
    assert r.capacity == slots
    for g in range(3):
        real = [s for s in range(5) if valid[g, s]]
        logits, dispatch, combine = loops(router, x[g][valid[g]])
        seen = set()
        for n in range(r.token.shape[1]):
            s, e, c = int(r.token[g, n]), int(r.expert[g, n]), int(r.slot[g, n])
            seen.add((s, e, c))
            assert bool(r.chosen[g, n]) == bool(r.kept[g, n]) == (s in real)
            if s not in real:
                assert r.share[g, n] == 0
                continue
            # Lengths are rounded by 1e-6 under the root.
            assert r.share[g, n].item() == pytest.approx(dispatch[real.index(s)][e * slots + c], rel=1e-5)
            assert r.weight[g, n].item() == pytest.approx(combine[real.index(s)][e * slots + c], rel=1e-5)
        assert len(seen) == 5 * E * slots, "every token meets every slot once"
        assert (r.load[g] == len(real) * slots).all()
        for i, s in enumerate(real):
            for e in range(E):
                mine = slice(e * slots, (e + 1) * slots)
                assert r.probs[g, s, e].item() == pytest.approx(sum(combine[i][mine]), rel=1e-5)
                lse = math.log(sum(math.exp(v) for v in logits[i][mine]))
                assert r.logits[g, s, e].item() == pytest.approx(lse, rel=1e-4, abs=1e-5)


def output(r: Routing, x: Tensor, phi: Tensor) -> Tensor:
    """Slots, one linear map per expert, tokens: by the record alone."""
    y = torch.zeros_like(x)
    for g in range(len(x)):
        mixed = torch.zeros(*phi.shape[:1], r.capacity, D, dtype=x.dtype)
        for n in range(r.token.shape[1]):
            mixed[r.expert[g, n], r.slot[g, n]] += r.share[g, n] * x[g, r.token[g, n]]
        for n in range(r.token.shape[1]):
            row = mixed[r.expert[g, n], r.slot[g, n]] @ phi[r.expert[g, n]]
            y[g, r.token[g, n]] += r.kept[g, n] * r.weight[g, n] * row
    return y


def test_the_record_says_what_algorithm_one_says() -> None:
    """Y = C f(D^T X), with the matrices of the paper."""
    router, (x, valid) = make(slots=2), inputs()
    maps = torch.randn(E, D, D, dtype=torch.float64)
    y = output(router(x, None, valid), x, maps)
    for g in range(3):
        real = x[g][valid[g]]
        unit = real / real.norm(dim=-1, keepdim=True)
        phi = router.phi.flatten(0, 1)
        logits = unit @ (router.scale * phi / phi.norm(dim=-1, keepdim=True)).T
        slots = logits.softmax(0).T @ real
        out = torch.einsum("epd,edf->epf", slots.view(E, 2, D), maps).flatten(0, 1)
        oracle.assert_same({"y": y[g][valid[g]]}, {"y": logits.softmax(1) @ out}, 1e-5)
        assert (y[g][~valid[g]] == 0).all()


@pytest.mark.parametrize("dispatcher", named(Dispatcher).values())
def test_a_layer_is_algorithm_one(dispatcher: type[Dispatcher]) -> None:
    """Experts see E*P mixtures of each group and nothing else, whatever brings them there."""
    layer = MoELayer(D, E, d_ff=4, router=lambda **sizes: Soft(slots=2, **sizes), dispatcher=dispatcher).double()
    x, valid = inputs()
    y, _ = layer(x, valid)
    for g in range(3):
        _, dispatch, combine = (torch.tensor(value).double() for value in loops(layer.router, x[g][valid[g]]))
        mixed = dispatch.T @ x[g][valid[g]]
        out = torch.stack([oracle.one_expert(layer.experts, j // 2, row) for j, row in enumerate(mixed)])
        oracle.assert_same({"y": y[g][valid[g]]}, {"y": combine @ out}, 1e-5)
        assert (y[g][~valid[g]] == 0).all()


def test_padding_and_other_groups_change_nothing() -> None:
    router, (x, valid) = make(slots=2), inputs()
    r = router(x, None, valid)

    def matrices(r: Routing, g: int) -> dict[str, Tensor]:
        """Weights and shares of the real tokens."""
        found = {"weight": r.weight, "share": r.share, "probs": r.probs}
        return {
            name: value.unflatten(1, (5, -1) if value.dim() == 2 else (5,))[g][r.valid[g]]
            for name, value in found.items()
        }

    for left in (True, False):
        order = valid.int().argsort(dim=1, descending=left, stable=True)
        moved = router(x.gather(1, order.unsqueeze(-1).expand_as(x)), None, valid.gather(1, order))
        for g in range(3):
            oracle.assert_same(matrices(moved, g), matrices(r, g), 1e-12)
    filled = router(x.masked_fill(~valid.unsqueeze(-1), 9.0), None, valid)
    for g in range(3):
        oracle.assert_same(matrices(filled, g), matrices(r, g), 1e-12)
        oracle.assert_same(matrices(router(x[g : g + 1], None, valid[g : g + 1]), 0), matrices(r, g), 1e-12)


def test_a_group_of_padding_gives_zeros() -> None:
    """In values and in gradients, which softmax over nothing would make NaN."""
    router, (x, valid) = make(slots=2), inputs()
    x = (x * 0).requires_grad_()
    r = router(x, None, torch.zeros_like(valid))
    assert (r.share == 0).all()
    assert not r.kept.any()
    assert (r.load == 0).all()
    grads = oracle.gradients(r.share.sum() + (r.weight * r.kept).sum(), x=x, **dict(router.named_parameters()))
    assert all((grad == 0).all() for grad in grads.values())


@pytest.mark.parametrize("normalize", [True, False])
def test_everything_has_its_gradient(normalize: bool) -> None:
    router, (x, valid) = make(slots=2, normalize=normalize), inputs()
    names, values = zip(*router.named_parameters(), strict=True)

    def function(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, parameters, strict=True))
        r = torch.func.functional_call(router, given, (x, None, valid))
        return r.weight * r.chosen, r.share, r.logits * valid.unsqueeze(-1)

    # Tokens of length 0 bend over a distance of 1e-3: check at real ones.
    x = x + ~valid.unsqueeze(-1)
    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *values), fast_mode=True)


def test_the_capacity_policy_has_no_say() -> None:
    router, (x, valid) = make(slots=2), inputs()
    r = router(x, 1, valid)
    assert r.capacity == 2
    assert CapacityPolicy().place(r, 1, training=True) is r


def test_normalised_tokens_have_no_length() -> None:
    """Ten times the tokens: the same mixture."""
    router, (x, valid) = make(), inputs()
    a, b = router(x, None, valid), router(10 * x, None, valid)
    oracle.assert_same({"share": b.share, "weight": b.weight}, {"share": a.share, "weight": a.weight}, 1e-5)


def test_it_starts_with_a_scale_of_one_and_vectors_of_length_one() -> None:
    router = Soft(400, 8, slots=3)
    assert router.scale.item() == 1
    # Truncation at two deviations leaves 0.88 of a deviation.
    assert abs(router.phi.norm(dim=-1).mean().item() / 0.88 - 1) < 0.02
    assert "scale" not in Soft(400, 8, normalize=False).state_dict()


def test_slots_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="slots must be at least 1; got 0"):
        Soft(D, E, slots=0)


def test_padding_is_behind_the_smallest_of_logits() -> None:
    """Far below -1e4, as without `normalize` they may be: the real tokens share the whole of each slot."""
    logits = -1e6 - torch.arange(6.0).view(1, 3, 2)
    dispatch, _ = soft(logits, torch.tensor([[True, False, True]]))
    torch.testing.assert_close(dispatch[0, [0, 2]], logits[0, [0, 2]].softmax(0))
    assert dispatch[0, 1].tolist() == [0, 0]


def test_rows_are_those_of_the_slots() -> None:
    router = Soft(6, 4, slots=3)
    assert [router.rows(size, limit) for size, limit in ((1, None), (9, None), (9, 2))] == [12] * 3
