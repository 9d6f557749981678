"""Experts by token id: the same for the same id, balanced over the vocabulary or over the corpus."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from switchkit import Hash, Routing

D, E = 6, 4


def route(router: Hash, ids: Tensor, valid: Tensor | None = None, *, training: bool = False) -> Routing:
    valid = torch.ones(ids.shape, dtype=torch.bool) if valid is None else valid
    return router.train(training)(torch.randn(*ids.shape, D), None, valid, ids)


def experts(router: Hash, vocab: int) -> Tensor:
    """The experts of every id, [V, K]."""
    return route(router, torch.arange(vocab).unsqueeze(0)).expert.view(vocab, router.k)


BALANCED = {"table": "balanced", "vocab_size": 50}


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, BALANCED, {"table": "balanced", "counts": list(range(50))}])
def test_the_id_alone_decides(k: int, options: dict) -> None:
    """Not the place, the neighbours, the vector, the mode or the instance; k different experts, each 1/k."""
    router, again = Hash(D, E, k=k, **options), Hash(D, E, k=k, **options)
    ids = torch.randint(0, 50, (3, 40))
    r, s = route(router, ids), route(again, ids.flip(1), training=True)
    known = experts(router, 50)
    assert torch.equal(r.expert.view(3, 40, k), known[ids])
    assert torch.equal(s.expert.view(3, 40, k), known[ids.flip(1)])
    assert all(len(set(row)) == k for row in known.tolist())
    assert torch.equal(r.weight, torch.full_like(r.weight, 1 / k))
    assert (r.logits == 0).all()
    assert (r.probs == 1 / E).all()


def test_the_hash_spreads_ids_of_any_size() -> None:
    """Each expert gets its share of 8000 ids, near zero, far away and below zero; each seed another table."""
    n = 8000
    for start in (0, 2**31, 2**40, -n):
        found = route(Hash(D, E, k=2), torch.arange(start, start + n).unsqueeze(0)).expert.view(n, 2)
        share = torch.bincount(found[:, 0], minlength=E) / n
        assert ((share - 1 / E).abs() <= 5 * math.sqrt(0.25 * 0.75 / n)).all()
        pairs = torch.bincount(found @ torch.tensor([E, 1]), minlength=E * E) / n
        p = 1 / (E * (E - 1))
        assert ((pairs[pairs > 0] - p).abs() <= 5 * math.sqrt(p * (1 - p) / n)).all()
        assert (pairs > 0).sum() == E * (E - 1), "every ordered pair occurs"
    first, second = (experts(Hash(D, E, seed=seed), n) for seed in (0, 1))
    assert abs((first == second).double().mean() - 1 / E) <= 5 * math.sqrt(0.25 * 0.75 / n), "seeds are independent"
    assert torch.equal(route(Hash(D, E), torch.full((1, 3), 7, dtype=torch.int32)).expert[0], first[7].expand(3))


@pytest.mark.parametrize(("vocab", "k"), [(50, 1), (50, 3), (7, 2), (3, 1), (64, 4)])
def test_a_balanced_table_deals_the_vocabulary_evenly(vocab: int, k: int) -> None:
    router = Hash(D, E, k=k, table="balanced", vocab_size=vocab)
    load = torch.bincount(experts(router, vocab).flatten(), minlength=E)
    assert load.max() - load.min() <= 1
    assert router.table.dtype == torch.int64
    assert list(router.state_dict()) == ["table"]
    if vocab == 50:
        other = experts(Hash(D, E, k=k, table="balanced", vocab_size=vocab, seed=1), vocab)
        assert not torch.equal(experts(router, vocab), other)


def test_ids_that_never_occur_go_to_those_with_the_fewest_ids() -> None:
    """Expert 0 has one frequent id and expert 1 three rarer ones: of six more, four and two make five each."""
    for seed in range(3):
        router = Hash(D, 2, table="balanced", counts=[90, 30, 30, 30, *([0] * 6)], seed=seed)
        table = experts(router, 10).flatten()
        assert sorted(torch.bincount(table[:4]).tolist()) == [1, 3]
        assert torch.bincount(table).tolist() == [5, 5]


@pytest.mark.parametrize("k", [1, 2])
def test_counts_go_most_frequent_first_to_the_least_loaded(k: int) -> None:
    """Replayed: in order of frequency each id went to the k experts with the fewest tokens at that moment."""
    counts = [(60 - rank) ** 2 for rank in torch.randperm(60).tolist()]
    table = experts(Hash(D, E, k=k, table="balanced", counts=counts), 60).tolist()
    load = [0] * E
    for i in sorted(range(60), key=lambda i: -counts[i]):
        assert sorted(load[e] for e in table[i]) == sorted(load)[:k]
        for e in table[i]:
            load[e] += counts[i]
    assert max(load) - min(load) < 0.01 * sum(load)


def test_ids_that_never_occur_are_spread_too() -> None:
    counts = [100, 90, 5, 4, *([0] * 40)]
    table = experts(Hash(D, E, table="balanced", counts=counts), 44).flatten()
    assert sorted(table[:4].tolist()) == [0, 1, 2, 3]
    assert torch.bincount(table).tolist() == [11] * 4


def test_the_table_comes_back_from_a_checkpoint() -> None:
    """Whatever seed the new router was built with, and not cast with the module."""
    router, other = Hash(D, E, **BALANCED), Hash(D, E, seed=9, **BALANCED).bfloat16()
    assert not torch.equal(router.table, other.table)
    other.load_state_dict(router.state_dict())
    assert torch.equal(experts(router, 50), experts(other, 50))


def test_ids_of_padding_are_not_read() -> None:
    ids = torch.tensor([[3, -100, 10**9, 4]])
    valid = torch.tensor([[True, False, False, True]])
    r = route(Hash(D, E, **BALANCED), ids, valid)
    assert r.chosen.tolist() == valid.tolist()
    assert torch.equal(r.expert[r.chosen], experts(Hash(D, E, **BALANCED), 50)[[3, 4], 0])


@pytest.mark.parametrize("outside", [-1, 50])
def test_ids_outside_the_table_are_refused(outside: int) -> None:
    with pytest.raises(ValueError, match="token ids must be from 0 to 49"):
        route(Hash(D, E, **BALANCED), torch.tensor([[1, outside]]))
    with pytest.raises(ValueError, match="routes by token ids"):
        Hash(D, E)(torch.randn(1, 2, D), None, torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own compiler does
def test_a_table_compiles(unchecked: None) -> None:
    ids = torch.randint(0, 50, (2, 5))
    x, valid = torch.randn(2, 5, D), torch.ones(2, 5, dtype=torch.bool)
    router = Hash(D, E, k=2, **BALANCED)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, None, valid, ids).expert, router(x, None, valid, ids).expert)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 5}, "k=5 choices"),
        ({"table": "random"}, "table must be 'hash' or 'balanced'; got 'random'"),
        ({"vocab_size": 5}, "do nothing with table='hash'"),
        ({"counts": [1]}, "do nothing with table='hash'"),
        ({"table": "balanced"}, "needs vocab_size >= 1, or counts; got vocab_size=None"),
        ({"table": "balanced", "vocab_size": 0}, "got vocab_size=0"),
        ({"table": "balanced", "vocab_size": 3, "counts": [1, 2]}, "one entry per id, vocab_size=3; got 2"),
        ({"table": "balanced", "counts": [1, -2]}, "counts must be numbers >= 0"),
        ({"table": "balanced", "counts": []}, "at least one"),
        ({"seed": -1}, "seed must be from 0 to 2**32 - 1; got -1"),
    ],
)
def test_bad_options_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Hash(D, E, **options)
    assert says in str(caught.value)
