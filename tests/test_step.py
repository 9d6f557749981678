"""What micro-batches weigh in a step: the mean over its real targets, however they are cut."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from equal import Case, alone, one_by_one, train, worst

from switchkit import RouterZ
from switchkit.step import MicroBatch, Seen, Step, gradient_scale

LINEAR: Any = {"losses": [partial(RouterZ, weight=0.1)], "steps": 2}


def seen(targets: int, tokens: int) -> Seen:
    zero = torch.zeros(1, dtype=torch.long)
    return Seen(torch.tensor(targets), torch.tensor([[tokens]]), torch.tensor([tokens]), zero)


def test_micro_batches_of_uneven_padding_equal_one_big_batch() -> None:
    case = Case(**LINEAR, ranks=4)
    where, gap = worst(one_by_one(case), alone(case))
    assert gap < 2e-6, where


def test_a_mean_of_means_is_another_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(**LINEAR, ranks=4)
    monkeypatch.setattr(MicroBatch, "weights", lambda self, first: None)
    monkeypatch.setattr("switchkit.module.gradient_scale", lambda batches, accumulate: torch.ones(()))
    assert worst(one_by_one(case), alone(case))[1] > 0.1


def test_a_step_that_the_end_of_an_epoch_cuts_short_is_a_whole_one() -> None:
    """Three batches, two to a step: the second step has one, and its gradient is not halved."""
    case = Case(**LINEAR)
    batches = [shares[0] for shares in case.batches()] + [case.batches()[0][1]]
    pair = {name: torch.cat([batch[name] for batch in batches[:2]]) for name in batches[0]}
    found = train(case, batches, 2, max_steps=2)
    where, gap = worst(found, train(case, [pair, batches[2]], 1))
    assert gap < 2e-6, where


def test_weights_of_devices_and_micro_batches() -> None:
    """Two devices with 6 and 2 targets, 8 and 4 tokens; the second micro-batch has half as many in all."""
    first = MicroBatch(seen(6, 8), seen(8, 12), devices=2)
    second = MicroBatch(seen(1, 4), seen(4, 16), devices=2)
    assert first.weights(None) == (pytest.approx(12 / 8), pytest.approx(16 / 12))
    assert second.weights(first) == (pytest.approx(2 / 4 * 4 / 8), pytest.approx(8 / 16 * 4 / 8))
    # Divided by 2 each, weighed relative to the first: (8 + 4) / 2 / 8 in sum, so it takes 16 / 12.
    assert float(gradient_scale([first, second], 2)) == pytest.approx(16 / 12)
    assert MicroBatch(seen(3, 3), seen(3, 3)).weights(None) is None


def test_a_first_micro_batch_of_padding_weighs_nothing() -> None:
    empty, full = MicroBatch(seen(0, 0), seen(0, 0)), MicroBatch(seen(5, 5), seen(5, 5))
    weights = [0.0 if (w := batch.weights(first)) is None else float(w[0]) for batch, first in ((full, empty),)]
    assert weights[0] * float(gradient_scale([empty, full], 2)) / 2 == pytest.approx(1.0)


@pytest.mark.parametrize("first", [True, False])
def test_counts_in_the_middle_of_a_step_are_saved_and_go_on(first: bool) -> None:
    """Of all devices, which are the first one's when they are read; 3 of 5 are this device's, then 2 of 4."""
    begun, again = Step(), Step()
    begun.count(MicroBatch(seen(3, 3), seen(5, 5), devices=2))
    saved = begun.saved()
    assert saved is not None
    assert saved.tolist() == [[5, 5]]
    again.restore(saved, first)
    again.count(MicroBatch(seen(2, 2), seen(4, 4), devices=2))
    loads = [again.load(scope) for scope in ("rank", "global")]
    assert [None if load is None else load.tolist() for load in loads] == [[[7 if first else 2]], [[9]]]
    counts = again.take_counts()
    assert counts is not None
    assert counts.tolist() == [[9, 9]]
    assert again.saved() is None
