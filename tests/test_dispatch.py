"""Dispatchers: where rows go. That they never change a result is in the contract."""

from __future__ import annotations

from dataclasses import replace

import properties
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import Case, run

from switchkit import Dispatcher, Dropless, Experts, Padded, Routing, Sorted, named
from switchkit.dispatch import filling


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


@pytest.fixture
def filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads, and loads as small and uneven as those of tests filled up too."""
    torch.set_num_threads(2)
    monkeypatch.setattr(filling, "MOST", ((100, 100.0),))


@pytest.mark.usefixtures("filled_up")
@pytest.mark.parametrize("case", [Case(k=2), Case(router="switch"), Case(k=3, capacity="dropless")], ids=str)
def test_loads_of_neighbours_are_filled_up_with_zeros(case: Case) -> None:
    x, routing = routed(replace(case, num_experts=6))
    rows = Sorted().dispatch(x, routing)
    kept = torch.bincount(routing.expert[routing.kept], minlength=6).tolist()
    assert rows.sizes == tuple(rows.load.tolist()) == (max(kept),) * 6 != tuple(kept)
    parts = rows.x.split([*rows.sizes, len(rows.x) - sum(rows.sizes)])
    for e, part in enumerate(parts[:-1]):
        assert part[: kept[e]].tolist() == rows_of(x, routing, e)
        assert (part[kept[e] :] == 0).all()
    assert len(parts[-1]) == routing.kept.numel() - sum(kept), "what was not kept comes after all loads"
    flat = rows.row.flatten()
    assert len(flat.unique()) == flat.numel()
    assert torch.equal(rows.source[flat], torch.arange(flat.numel()))


FILLED = [
    *(Case(k=k, capacity=capacity) for k in (1, 2) for capacity in ("dropless", "factor")),
    Case(k=2, group="batch"),
    Case(k=2, dropped="input"),
    Case(router="expert_choice", capacity="factor"),
    Case(router="relu", k=2, capacity="dropless"),
    *(Case(k=2, experts=name) for name in named(Experts)),
    Case(k=1, expert_options=(("activation", "gelu"), ("bias", True))),
]


@pytest.mark.usefixtures("filled_up")
@pytest.mark.parametrize("case", FILLED, ids=str)
def test_filling_up_changes_no_output_and_no_gradient(case: Case) -> None:
    properties.dispatchers_agree(replace(case, num_experts=5))


def ways(n: int, longest: int) -> list[list[int]]:
    """Every way to write n as a sum of parts of at most `longest`, in order."""
    return [[part, *rest] for part in range(1, min(n, longest) + 1) for rest in ways(n - part, longest)] if n else [[]]


def cost_of(way: list[int], sizes: tuple[int, ...], threads: int) -> tuple[int, tuple[int, ...]]:
    """Rows and what products cost beside them, where each part of `way` counts experts per thread; and the loads."""
    cost, filled, last = 0, [], len(way) - 1
    for i, part in enumerate(way):
        first = len(filled)
        run = sizes[first:] if i == last else sizes[first : first + part * threads]
        cost += len(run) * max(run) + (35 if part == 1 else 10)
        filled += [max(run)] * len(run)
    return cost, tuple(filled)


@given(st.lists(st.integers(0, 900), min_size=2, max_size=23).map(tuple), st.integers(2, 9))
def test_loads_are_filled_up_in_the_cheapest_way(sizes: tuple[int, ...], threads: int) -> None:
    """Against all ways to take neighbours together; nothing where rows would grow by more than the filling saves."""
    options = [cost_of(way, sizes, threads) for way in ways(max(len(sizes) // threads, 1), 4)]
    cheapest, total, mean = min(options)[0], sum(sizes), sum(sizes) / len(sizes)
    most = (1.3 if mean < 96 else 1.15 if mean < 768 else 1.0) * total
    filled = filling.evened(sizes, threads)
    best = [loads for cost, loads in options if cost == cheapest]
    assert filled in best if filled is not None else any(sum(loads) > most or loads == sizes for loads in best)
    assert filled is None or total < sum(filled) <= most


@given(st.lists(st.integers(40, 80), min_size=2, max_size=23).map(tuple), st.integers(2, 9))
def test_nearly_even_loads_are_filled_up_in_the_cheapest_way(sizes: tuple[int, ...], threads: int) -> None:
    """The same where the filling is worth it more often than not."""
    test_loads_are_filled_up_in_the_cheapest_way.hypothesis.inner_test(sizes, threads)


@pytest.mark.parametrize(
    ("sizes", "threads", "expected"),
    [
        ((60, 64, 60, 64, 50, 44), 2, (64,) * 6),  # 32 rows of zeros more, where another product costs 35
        ((60, 64, 60, 64, 40, 44), 2, (64,) * 4 + (44,) * 2),
        ((90, 90, 60, 64, 60, 64), 2, (90,) * 2 + (64,) * 4),
        ((60, 64, 50, 64, 40, 44), 1, None),  # one thread has nobody to share with
        ((64, 64, 64, 64), 2, None),  # even as they are
        ((20, 90, 20, 90), 2, None),  # too uneven
        ((500, 530, 520, 490), 2, (530,) * 4),
        ((400, 660, 420, 690), 2, None),
        ((400, 410, 600, 620), 2, (410,) * 2 + (620,) * 2),
        ((63,) * 9 + (64,), 2, (63,) * 6 + (64,) * 4),  # no more than 8 in one product
        ((60, 60, 64), 2, (64,) * 3),  # the last thread has two
        ((1000, 1001, 1000, 1001), 2, None),  # large products are shared well
        ((64,), 2, None),
        ((0, 0, 0), 2, None),
        ((1, 0), 2, None),
    ],
)
def test_what_loads_are_filled_up_to(sizes: tuple[int, ...], threads: int, expected: tuple[int, ...] | None) -> None:
    assert filling.evened(sizes, threads) == expected


def test_half_precision_is_not_filled_up() -> None:
    torch.set_num_threads(2)
    x, routing = routed(Case(router="round_robin", capacity="dropless", num_experts=3, shape=(1, 8)))
    assert Sorted().dispatch(x.float(), routing).sizes == (3, 3, 3)
    assert Sorted().dispatch(x.bfloat16(), routing).sizes == (3, 3, 2)
    with torch.autocast("cpu"):
        assert Sorted().dispatch(x.float(), routing).sizes == (3, 3, 2)


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


@pytest.mark.parametrize("name", list(named(Dispatcher)))
@pytest.mark.parametrize("k", [1, 2])
def test_weights_of_what_was_dropped_are_not_read(name: str, k: int) -> None:
    """Not even those that are no number: neither an output nor a gradient of what was kept hears of them."""
    case = Case(k=k, dispatcher=name)
    x, routing = routed(case)
    assert not routing.kept.all()
    dispatcher = named(Dispatcher)[name]()
    found = []
    for filler in (0.0, float("nan")):
        weight = routing.weight.detach().masked_fill(~routing.kept, filler).requires_grad_()
        rows = dispatcher.dispatch(x, routing)
        out = rows.x.detach().clone().requires_grad_()
        y = dispatcher.combine(out, rows, replace(routing, weight=weight))
        found.append([y, *torch.autograd.grad(y.square().sum(), (out, weight))])
    for nothing, something in zip(*found, strict=True):
        assert torch.equal(nothing, something)
