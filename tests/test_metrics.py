"""Metrics add up over batches whatever the split, and equal loops over single tokens."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from properties import Case, collapsed, run
from torch import Tensor
from torchmetrics import Metric

from switchkit import Dropless, Routing, Sigmoid, TopK
from switchkit.metrics import (
    DroppedByPosition,
    Evaluation,
    RoutingAgreement,
    RoutingInformation,
    RoutingMetrics,
    TokenAccuracy,
    TokenLoss,
    step_stats,
)


def test_routing_metrics_are_ratios_of_sums() -> None:
    """Two batches of different size, two layers of two experts, counted by hand."""
    metric = RoutingMetrics(2, 2)
    metric.update({"load": torch.tensor([[3, 1], [4, 0]]), "dropped": torch.tensor([1, 2])})
    metric.update({"load": torch.tensor([[0, 2], [1, 1]]), "dropped": torch.tensor([0, 0])})
    got = metric.compute()
    torch.testing.assert_close(got["load"], torch.tensor([[3 / 6, 3 / 6], [5 / 6, 1 / 6]]))
    torch.testing.assert_close(got["imbalance"], torch.tensor([1.0, 10 / 6]))
    torch.testing.assert_close(got["dropped"], torch.tensor([1 / 6, 2 / 6]))


def test_counts_stay_exact_above_what_a_float_holds() -> None:
    metric = RoutingMetrics(1, 2)
    for _ in range(3):
        metric.update({"load": torch.tensor([[2**24 + 1, 0]]), "dropped": torch.tensor([0])})
    assert metric.load[0, 0] == 3 * (2**24 + 1)


@pytest.mark.parametrize("layers", [0, 2])
def test_nothing_chosen_gives_no_nan(layers: int) -> None:
    metric = RoutingMetrics(layers, 3 if layers else 0)
    metric.update({"load": metric.load.clone(), "dropped": metric.dropped.clone()})
    assert metric.compute()["max_violation"].tolist() == [0] * layers
    assert metric.compute()["dead"].tolist() == [3] * layers
    assert all(bool(torch.isfinite(value).all()) for value in metric.compute().values())


@pytest.mark.parametrize("masked", [True, False], ids=["valid", "-100"])
def test_token_accuracy_counts_real_targets(masked: bool) -> None:
    """Seven places over two batches, two of them padding: three of five are right."""
    metric = TokenAccuracy()
    for best, targets, valid in (
        ([[1, 2], [0, 1]], [[1, 0], [0, 1]], [[True, True], [True, False]]),
        ([[2, 2, 0]], [[2, 1, 0]], [[True, True, False]]),
    ):
        logits = torch.nn.functional.one_hot(torch.tensor(best), 3).float()
        wanted, real = torch.tensor(targets), torch.tensor(valid)
        metric.update(logits, wanted, real) if masked else metric.update(logits, wanted.masked_fill(~real, -100))
    assert math.isclose(metric.compute(), 3 / 5, rel_tol=1e-6)


def test_token_accuracy_of_nothing_is_no_nan() -> None:
    metric = TokenAccuracy()
    metric.update(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.bool))
    assert metric.compute() == 0


def test_a_valid_place_of_minus_100_is_no_target() -> None:
    """As in the loss: of four valid places one is -100, and two of the others are right."""
    metric = TokenAccuracy()
    targets = torch.tensor([[0, 1, -100, 1]])
    metric.update(torch.eye(2)[[0, 1, 1, 0]].unsqueeze(0), targets, torch.ones(1, 4, dtype=torch.bool))
    assert math.isclose(float(metric.compute()), 2 / 3, rel_tol=1e-6)


def test_an_evaluation_has_one_number_of_all_layers() -> None:
    """The worst imbalance, all dead experts, and means of the rest; layers of 4 and 2 experts."""
    evaluation = Evaluation([4, 2])
    load = torch.tensor([[3, 1, 0, 0], [4, 4, 0, 0]])
    entropy, confidence = torch.tensor([0.5, 1.5]).double(), torch.tensor([0.9, 0.6]).double()
    found = {"load": load, "dropped": torch.tensor([2, 0]), "tokens": torch.tensor([4, 8])}
    evaluation.loss.update(torch.tensor(8.0), 4)
    evaluation.accuracy.update(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long))
    evaluation.routing.update({**found, "entropy": 4 * entropy, "confidence": 8 * confidence})
    got = evaluation.compute()
    wanted = {
        "imbalance": 3.0,
        "dropped": (2 / 4 + 0) / 2,
        "dead_experts": 2.0,
        "router_entropy": (0.5 + 1.5 / 2) / 2,
        "router_confidence": (2 * 0.9 + 0.6) / 2,
    }
    assert {name: float(got[name]) for name in wanted} == pytest.approx(wanted)


def test_token_loss_weighs_tokens() -> None:
    metric = TokenLoss()
    metric.update(torch.tensor(10.0), 4)
    metric.update(torch.tensor(1.0), 1)
    got = metric.compute()
    assert math.isclose(got["loss"], 11 / 5)
    assert math.isclose(got["bits"], 11 / 5 / math.log(2))
    assert math.isclose(got["perplexity"], math.exp(11 / 5))


LAYERS, CONTEXT, LABELS = 2, 9, 3
GROUPS = ["sequence", "batch"]


def batch(group: str | int, rows: slice = slice(None), k: int = 2, seed: int = 0) -> tuple[Routing, ...]:
    """Two layers' records of 4 sequences of 7 tokens, some of it padding, at a capacity that drops."""
    found = []
    for layer in range(LAYERS):
        case = Case(k=k, group=group, shape=(4, 7), seed=10 * seed + layer)
        x, valid, ids = replace(case, seed=0).inputs()
        found.append(run(case.layer(), x[rows], valid[rows], ids[rows])[1])
    return tuple(found)


def labels(rows: slice = slice(None)) -> Tensor:
    """One of three per token, -1 for some."""
    return (torch.arange(28).view(4, 7) * 5 % 7 % 4 - 1)[rows]


def tokens_of(routing: Routing) -> list[tuple[int, int, list[tuple[int, bool]], Tensor]]:
    """Real tokens: sequence, place in it, (expert, kept) of what was chosen for it, probabilities."""
    found = []
    groups, size = routing.valid.shape
    for g in range(groups):
        for s in range(size):
            if routing.valid[g, s]:
                sent = [
                    (int(routing.expert[g, n]), bool(routing.kept[g, n]))
                    for n in range(routing.token.shape[1])
                    if routing.chosen[g, n] and routing.token[g, n] == s
                ]
                found.append((*divmod(g * size + s, 7), sent, routing.probs[g, s]))
    return found


def updates() -> dict[str, tuple[Callable[[], Metric], Callable[[Metric, Any], None]]]:
    """Each metric, and how it takes some rows of the batch of a grouping."""
    return {
        "routing": (
            lambda: RoutingMetrics(LAYERS, 4, scores=True),
            lambda metric, rows: metric.update(step_stats(batch("sequence", rows), scores=True)),
        ),
        "position": (
            lambda: DroppedByPosition(LAYERS, CONTEXT),
            lambda metric, rows: metric.update(batch("sequence", rows)),
        ),
        "agreement": (
            lambda: RoutingAgreement(LAYERS),
            lambda metric, rows: metric.update(batch("sequence", rows), batch("sequence", rows, seed=1)),
        ),
        "information": (
            lambda: RoutingInformation(LAYERS, 4, LABELS),
            lambda metric, rows: metric.update(batch("sequence", rows), labels(rows)),
        ),
    }


def same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["routing", "position", "agreement", "information"])
def test_halves_and_merged_instances_equal_the_whole(name: str) -> None:
    build, update = updates()[name]
    whole, halves, one, other = build(), build(), build(), build()
    update(whole, slice(None))
    for rows in (slice(0, 3), slice(3, 4)):
        update(halves, rows)
    update(one, slice(0, 1))
    update(other, slice(1, 4))
    one.merge_state(other)
    same(halves.compute(), whole.compute())
    same(one.compute(), whole.compute())
    values = whole.compute()
    for value in values.values() if isinstance(values, dict) else [values]:
        assert bool(torch.isfinite(value).all())
        assert bool((value != 0).any()) or name == "routing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_is_cast_does_not_cast_the_sums(dtype: torch.dtype) -> None:
    """A bfloat16 stops counting at 256, a float16 at 65,504."""
    metric = Evaluation([4]).to(dtype)
    metric.loss.update(torch.tensor(3e5), 70_000)
    for _ in range(1000):
        metric.loss.update(torch.tensor(3.0), 1)
    assert math.isclose(float(metric.loss.compute()["loss"]), 303_000 / 71_000, rel_tol=1e-6)
    metric.reset()
    assert metric.loss.total.dtype == metric.routing.entropy.dtype == torch.float64


@pytest.mark.parametrize("name", ["routing", "position", "agreement", "information"])
def test_a_metric_goes_on_outside_inference_mode(name: str) -> None:
    build, update = updates()[name]
    metric, expected = build(), build()
    with torch.inference_mode():
        update(metric, slice(0, 2))
        metric.reset()
    update(metric, slice(None))
    update(expected, slice(None))
    same(metric.compute(), expected.compute())


def test_one_layer_is_no_scalar() -> None:
    routings = batch("sequence")[:1]
    metric = RoutingMetrics(1, 4, scores=True)
    metric.update(step_stats(routings, scores=True))
    assert {value.shape for name, value in metric.compute().items() if name != "load"} == {torch.Size([1])}
    assert metric.compute()["load"].shape == (1, 4)
    agreement = pickle.loads(pickle.dumps(RoutingAgreement(1)))
    agreement.update(routings, routings)
    assert agreement.compute().tolist() == [1.0]


@pytest.mark.parametrize("group", GROUPS)
def test_routing_metrics_by_a_loop(group: str) -> None:
    routings = batch(group)
    metric = RoutingMetrics(LAYERS, 4, scores=True)
    metric.update(step_stats(routings, scores=True))
    got = metric.compute()
    for layer, routing in enumerate(routings):
        every = tokens_of(routing)
        counts = Counter(expert for *_, sent, _ in every for expert, _ in sent)
        mean = sum(counts.values()) / 4
        entropy = [-sum(p * math.log(p) for p in probs.tolist()) for *_, probs in every]
        assert got["max_violation"][layer] == pytest.approx((max(counts.values()) - mean) / mean, rel=1e-6)
        assert got["entropy"][layer] == pytest.approx(sum(entropy) / len(every), rel=1e-6)
        assert got["confidence"][layer] == pytest.approx(
            sum(max(probs.tolist()) for *_, probs in every) / len(every), rel=1e-6
        )


def test_dead_experts_are_those_that_a_layer_has() -> None:
    """Layer 0 has two experts, both used; layer 1 has four, of which one got everything."""
    metric = RoutingMetrics(2, [2, 4])
    metric.update({"load": torch.tensor([[3, 1, 0, 0], [0, 4, 0, 0]]), "dropped": torch.tensor([0, 0])})
    got = metric.compute()
    assert got["dead"].tolist() == [0, 3]
    assert got["imbalance"].tolist() == [1.5, 4]
    assert got["max_violation"].tolist() == [0.5, 3]


def test_numbers_of_experts_for_other_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one for each of 3 layers; got \[2, 4\]"):
        RoutingMetrics(3, [2, 4])


@pytest.mark.parametrize("group", [*GROUPS, 5])
def test_dropped_by_position_by_a_loop(group: str | int) -> None:
    """Groups of 5 tokens leave a ragged last one, and need to be told that sequences have 7."""
    routings = batch(group)
    metric = DroppedByPosition(LAYERS, CONTEXT)
    metric.update(routings, *([7] if group == 5 else []))
    expected = torch.zeros(LAYERS, CONTEXT)
    for layer, routing in enumerate(routings):
        chosen, dropped = Counter[int](), Counter[int]()
        for _, place, sent, _ in tokens_of(routing):
            chosen[place] += len(sent)
            dropped[place] += sum(not kept for _, kept in sent)
        for place, count in chosen.items():
            expected[layer, place] = dropped[place] / count
    assert expected.sum() > 0
    same(metric.compute(), expected)


def test_arrival_drops_late_tokens_only() -> None:
    """One expert of capacity 2 for every sequence of 5: places 0 and 1 are served."""
    x = torch.ones(3, 5, 6, dtype=torch.float64)
    case = Case(router="switch", capacity="fixed", capacity_options=(("train", 2), ("eval", 2)))
    metric = DroppedByPosition(1, 6)
    metric.update((run(case.layer(), x)[1],))
    assert metric.compute().tolist() == [[0, 0, 1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda: DroppedByPosition(LAYERS, 6).update(batch("sequence")), "of 7 tokens are longer than context=6"),
        (
            lambda: DroppedByPosition(LAYERS, 9).update([replace(r, length=None) for r in batch(5)]),
            "4 sequences are routed in 6 groups of 5 tokens",
        ),
        (lambda: DroppedByPosition(1, 9).update(batch("batch")), "2 sparse layers; this metric was made for 1"),
        (
            lambda: DroppedByPosition(LAYERS, 9).update(tuple(replace(r, kept=None) for r in batch("batch"))),
            r"call capacity\.place",
        ),
        (lambda: RoutingAgreement(3).update(batch("batch"), batch("batch")), "made for 3"),
        (lambda: RoutingInformation(3, 4, 2).update(batch("batch"), labels()), "made for 3"),
    ],
)
def test_records_that_do_not_fit_are_refused(act: Callable[[], None], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        act()


@pytest.mark.parametrize("first", [*GROUPS, 5])
@pytest.mark.parametrize("second", GROUPS)
def test_agreement_by_a_loop(first: str | int, second: str) -> None:
    one, two = batch(first), batch(second, seed=1)
    metric = RoutingAgreement(LAYERS)
    metric.update(one, two)
    for layer in range(LAYERS):
        sets = [{(b, s): {e for e, _ in sent} for b, s, sent, _ in tokens_of(r[layer])} for r in (one, two)]
        assert sets[0].keys() == sets[1].keys()
        expected = sum(sets[0][at] == sets[1][at] for at in sets[0]) / len(sets[0])
        assert 0 < expected < 1
        assert metric.compute()[layer] == pytest.approx(expected)


def test_agreement_ignores_the_order_of_choices_and_the_drop() -> None:
    """The same two experts in turn, under another capacity: the sets are equal."""
    routing = batch("sequence")[0]
    groups, n = routing.expert.shape
    turned = routing.expert.view(groups, n // 2, 2).flip(-1).reshape(groups, n)
    other = Dropless().place(replace(routing, expert=turned, slot=None, kept=None), None, training=False)
    metric = RoutingAgreement(1)
    metric.update((routing,), (other,))
    assert metric.compute() == 1
    metric.update((routing,), (replace(routing, expert=(routing.expert + 1) % 4),))
    assert metric.compute() < 1
    narrow = TopK(6, 3)(torch.zeros(3, 7, 6), None, torch.ones(3, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="layer 0 chose among 4 and 3 experts"):
        metric.update((routing,), (narrow,))


@pytest.mark.parametrize("group", [*GROUPS, 5])
def test_information_by_a_loop(group: str | int) -> None:
    routings, given = batch(group), labels()
    metric = RoutingInformation(LAYERS, 5, LABELS)
    metric.update(routings, given)
    got = metric.compute()
    for layer, routing in enumerate(routings):
        pairs = Counter(
            (e, int(given[b, s])) for b, s, sent, _ in tokens_of(routing) for e, _ in sent if given[b, s] >= 0
        )
        total = sum(pairs.values())
        by_expert, by_label = Counter[int](), Counter[int]()
        for (e, z), count in pairs.items():
            by_expert[e] += count
            by_label[z] += count
        nats = sum(c / total * math.log(c * total / (by_expert[e] * by_label[z])) for (e, z), c in pairs.items())
        entropy = -sum(c / total * math.log(c / total) for c in by_label.values())
        assert got["nats"][layer] == pytest.approx(nats, rel=1e-9)
        assert got["share"][layer] == pytest.approx(nats / entropy, rel=1e-9)


def test_information_in_closed_form() -> None:
    """An expert per label tells all; one expert for all labels, or no label at all, tells nothing."""
    routing = batch("sequence", k=1)[0]
    told = torch.full((4, 7), -1)
    told.scatter_(1, routing.token, routing.expert)
    for given, share in ((told, 1.0), (torch.zeros_like(told), 0.0), (torch.full_like(told, -1), 0.0)):
        metric = RoutingInformation(1, 4, 4)
        metric.update((routing,), given)
        assert metric.compute()["share"].item() == pytest.approx(share)
    # Every token goes to the same two experts.
    metric = RoutingInformation(1, 4, 2)
    metric.update((collapsed(1, k=2),), torch.tensor([[0, 0, 1, 0, 0, 1]]))
    assert metric.compute()["nats"].item() == pytest.approx(0, abs=1e-12)


def test_layers_may_have_labels_of_their_own() -> None:
    """As of an encoder and a decoder: each layer is counted with its own labels."""
    routings, given = batch("sequence"), labels()
    flipped = (LABELS - 1 - given).masked_fill(given < 0, -1).roll(1, 0)
    one, other, both = (RoutingInformation(LAYERS, 5, LABELS) for _ in range(3))
    one.update(routings, given)
    other.update(routings, flipped)
    both.update(routings, [given, *[flipped] * (LAYERS - 1)])
    assert both.compute()["nats"].tolist() == [one.compute()["nats"][0], *other.compute()["nats"][1:]]
    with pytest.raises(ValueError, match="zip"):
        both.update(routings, [given])


def test_a_label_out_of_range_is_no_other_experts() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        RoutingInformation(LAYERS, 4, 2).update(batch("sequence"), labels())


@pytest.mark.parametrize("group", GROUPS)
def test_padding_changes_no_metric(group: str) -> None:
    """Labels and probabilities of padding are arbitrary; the counts are those of the real tokens."""
    routings = batch(group)
    dirty = tuple(replace(r, probs=r.probs.masked_fill(~r.valid.unsqueeze(-1), math.nan)) for r in routings)
    noise = labels().masked_fill(~torch.cat([r.valid for r in routings[:1]]).view(4, 7), 2)
    for build, update in (
        (lambda: RoutingMetrics(LAYERS, 4, scores=True), lambda m, r, z: m.update(step_stats(r, scores=True))),
        (lambda: RoutingInformation(LAYERS, 4, LABELS), lambda m, r, z: m.update(r, z)),
    ):
        clean, padded = build(), build()
        update(clean, routings, labels())
        update(padded, dirty, noise)
        same(padded.compute(), clean.compute())


def test_gates_that_are_no_distribution_are_normalised() -> None:
    """Independent gates of 0.5 on four experts are the uniform distribution; a token without any counts nothing."""
    router = Sigmoid(6, 4)
    record = router(torch.zeros(1, 3, 6), None, torch.ones(1, 3, dtype=torch.bool))
    record = Dropless().place(replace(record, probs=torch.tensor([[[0.5] * 4, [2.0, 0, 0, 0], [0.0] * 4]])), None,
                              training=True)  # fmt: skip
    found = step_stats((record,), scores=True)
    assert found["entropy"].item() == pytest.approx(math.log(4), rel=1e-6)
    assert found["confidence"].item() == pytest.approx(1.25, rel=1e-6)
