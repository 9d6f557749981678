"""Dispatchers: where rows go. That they never change a result is in the contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from properties import Case, run

from switchkit import Dispatcher, Dropless, Padded, Routing, Sorted, named


def routed(case: Case) -> tuple[torch.Tensor, Routing]:
    x, valid, ids = case.inputs()
    return x * valid.unsqueeze(-1), run(case.layer(), x, valid, ids)[1]


def rows_of(x: torch.Tensor, routing: Routing, expert: int) -> list[list[float]]:
    """The tokens that an expert keeps, group by group in order of slot."""
    found = []
    for g in range(len(routing.expert)):
        mine = [n for n in range(routing.expert.shape[1]) if routing.kept[g, n] and routing.expert[g, n] == expert]
        found += [x[g, routing.token[g, n]].tolist() for n in sorted(mine, key=lambda n, g=g: int(routing.slot[g, n]))]
    return found


@pytest.mark.parametrize("case", [Case(k=2), Case(router="switch"), Case(k=3, capacity="dropless")], ids=str)
def test_sorted_rows_stand_expert_by_expert(case: Case) -> None:
    x, routing = routed(case)
    rows = Sorted().dispatch(x, routing)
    start = 0
    for e in range(4):
        end = start + int(rows.load[e])
        assert rows.x[start:end].tolist() == rows_of(x, routing, e)
        start = end
    assert len(rows.x) == routing.expert.numel()
    assert rows.sizes == tuple(rows.load.tolist())
    assert sorted(rows.row.flatten().tolist()) == list(range(len(rows.x)))
    assert torch.equal(rows.row.flatten()[rows.source], torch.arange(len(rows.x)))


@pytest.mark.parametrize("case", [Case(k=2), Case(router="switch"), Case(k=3, capacity="dropless")], ids=str)
def test_padded_rows_stand_in_their_experts_buffer(case: Case) -> None:
    x, routing = routed(case)
    rows = Padded().dispatch(x, routing)
    for e in range(4):
        used = int(rows.load[e])
        assert rows.x[e, :used].tolist() == rows_of(x, routing, e)
        assert (rows.x[e, used:] == 0).all()
    assert rows.x.shape[1] == rows.load.max(), "no longer than the largest load"


@pytest.mark.parametrize("name", list(named(Dispatcher)))
def test_lists_without_a_rhythm_are_served_too(name: str) -> None:
    """k=None: any number of assignments per token in any order, as when experts choose."""
    case = Case(k=2)
    x, regular = routed(case)
    order = torch.stack([torch.randperm(regular.token.shape[1]) for _ in range(len(x))])
    fields = ("token", "expert", "weight", "chosen")
    shuffled = {field: getattr(regular, field).gather(1, order) for field in fields}
    blank = {"slot": None, "kept": None, "load": None, "capacity": None}
    routing = Dropless().place(replace(regular, **shuffled, **blank, k=None), None, training=False)
    expected = Dropless().place(replace(regular, **blank), None, training=False)
    layer = case.layer()
    dispatcher = named(Dispatcher)[name]()
    results = []
    for record in (routing, expected):
        rows = dispatcher.dispatch(x, record)
        results.append(dispatcher.combine(layer.experts(rows), rows, record))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", list(named(Dispatcher)))
def test_a_routing_without_places_is_refused(name: str) -> None:
    x, routing = routed(Case())
    with pytest.raises(ValueError, match=r"call capacity\.place"):
        named(Dispatcher)[name]().dispatch(x, replace(routing, slot=None))


@pytest.mark.parametrize("name", list(named(Dispatcher)))
def test_a_second_backward_is_refused_where_the_first_is_written_by_hand(name: str) -> None:
    """Experts and dispatchers are differentiable once: a gradient of a gradient must not come out silently wrong."""
    case = Case(router="switch", dispatcher=name, expert_options=(("activation", "gelu"),))
    layer, (x, valid, ids) = case.layer(), case.inputs()
    x.requires_grad_()
    y, _ = run(layer, x, valid, ids)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    if name == "sorted":
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.square().sum().backward()
    else:
        grad.square().sum().backward()
        assert x.grad.isfinite().all()
