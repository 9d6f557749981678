"""Metrics add up over batches whatever the split."""

from __future__ import annotations

import math

import pytest
import torch

from switchkit.metrics import RoutingMetrics, TokenLoss


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
    assert all(bool(torch.isfinite(value).all()) for value in metric.compute().values())


def test_token_loss_weighs_tokens() -> None:
    metric = TokenLoss()
    metric.update(torch.tensor(10.0), 4)
    metric.update(torch.tensor(1.0), 1)
    got = metric.compute()
    assert math.isclose(got["loss"], 11 / 5)
    assert math.isclose(got["bits"], 11 / 5 / math.log(2))
    assert math.isclose(got["perplexity"], math.exp(11 / 5))
