"""The scale of the initial weights, and the router's precision: options for experiments that the paper made."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from switchkit import Attention, FeedForward, GatedMlp, Mlp, MoELayer, Switch
from switchkit.records import Routing

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "switch": lambda **given: Switch(64, 128, **given),
    "mlp": lambda **given: Mlp(64, 64, 4, **given),
    "gated_mlp": lambda **given: GatedMlp(64, 64, 4, **given),
    "FeedForward": lambda **given: FeedForward(64, 64, gated=True, **given),
    "Attention": lambda **given: Attention(64, 4, **given),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_the_scale_is_that_of_the_same_draw(name: str) -> None:
    """A truncated normal of ten times the variance is the same draw, sqrt(10) times as large."""
    drawn = []
    for given in ({}, {"init_scale": 1.0}):
        torch.manual_seed(3)
        drawn.append(dict(BUILDERS[name](**given).state_dict()))
    plain, wide = drawn
    assert plain
    for key, weight in plain.items():
        torch.testing.assert_close(wide[key], math.sqrt(10) * weight)
        # Truncated at two deviations of sqrt(0.1 / 64), which leaves 0.88 of the deviation.
        assert weight.abs().max() <= 2 * math.sqrt(0.1 / 64)
        assert float(weight.std()) == pytest.approx(0.88 * math.sqrt(0.1 / 64), rel=0.05)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_none(name: str, scale: float) -> None:
    with pytest.raises(ValueError, match="init_scale must be a finite number > 0"):
        BUILDERS[name](init_scale=scale)


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="init_scale=1.0 does nothing beside init_std=0.02"):
        Switch(8, 2, init_scale=1.0, init_std=0.02)
    with pytest.raises(ValueError, match="precision must be 'float32' or 'bfloat16'; got 'float16'"):
        Switch(8, 2, precision="float16")  # type: ignore[arg-type]


def route(router: Switch, x: Tensor) -> Routing:
    return router(x, None, torch.ones(x.shape[:2], dtype=torch.bool))


def test_a_router_in_bfloat16_sees_what_bfloat16_holds() -> None:
    router = Switch(16, 4, precision="bfloat16").eval()
    x = torch.randn(2, 8, 16)
    found = route(router, x)
    assert found.logits.dtype == found.probs.dtype == torch.bfloat16
    wanted = x.bfloat16() @ router.weight.bfloat16().t()
    torch.testing.assert_close(found.logits, wanted)
    router.precision = "float32"
    exact = route(router, x).logits
    assert exact.dtype == torch.float32
    # It is no finer than eight bits, and not the float32 result cast afterwards.
    assert 1e-4 < (exact - found.logits.float()).abs().max() < 0.05


def test_a_layer_with_it_trains() -> None:
    layer = MoELayer(16, 4, d_ff=8, router=lambda **sizes: Switch(**sizes, precision="bfloat16"))
    y, routing = layer(torch.randn(2, 8, 16))
    assert y.dtype == torch.float32
    (y.square().mean() + routing.probs.float().square().mean()).backward()
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.abs().sum() > 0
