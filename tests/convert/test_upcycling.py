"""A dense model and the sparse one made of it: equal where that is promised, different where it is asked for."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from switchkit import Decoder, EncoderDecoder, LanguageModule
from switchkit.convert.comparing import change
from switchkit.convert.upcycling import upcycle
from switchkit.layers import FeedForward, MoELayer

V, D, F = 13, 16, 12
GATED = partial(FeedForward, gated=True, activation="silu")
DECODER = partial(Decoder, d_model=D, num_layers=3, num_heads=2, d_ff=F, context=24, sparse=[])
PAIR = partial(EncoderDecoder, d_model=D, encoder_layers=2, num_heads=2, d_ff=F, sparse=[])
NETS = {
    "decoder": DECODER,
    "gated decoder": partial(DECODER, feed_forward=GATED, norm="rms"),
    "encoder-decoder": PAIR,
    "gated encoder-decoder": partial(PAIR, feed_forward=GATED, dropout=0.1),
}


def dense(net: partial) -> LanguageModule:
    """Weights large enough that each layer tells."""
    torch.manual_seed(1)
    module = LanguageModule(net, vocab_size=V, losses=[])
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module


@pytest.fixture(params=NETS)
def module(request: pytest.FixtureRequest) -> LanguageModule:
    return dense(NETS[request.param])


def first(module: LanguageModule) -> MoELayer:
    return next(part for part in module.net.modules() if isinstance(part, MoELayer))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_experts": 3, "k": 3},
        {"granularity": 4},
        {"granularity": 3, "k": 3},
        {"granularity": 2, "k": 6, "router_std": 3.0},
        {"num_experts": 1, "k": 1},
        {"capacity_factor": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 1e-5), (torch.float64, 1e-14)], ids=["float32", "float64"]
)
def test_step_0_computes_what_the_dense_model_does(
    module: LanguageModule, options: dict, dtype: torch.dtype, rounding: float
) -> None:
    """To rounding, of which float32 has 2e-6 here."""
    module = module.to(dtype)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    made = upcycle(module, **options)
    found = change(module, made)
    assert found.logits < rounding
    assert found.after == pytest.approx(found.before, rel=rounding)
    assert len(made.sparse_layers) == (3 if isinstance(module.net, Decoder) else 4)
    # What was dense stays as it is, and is no one's but its own.
    for parameter in made.parameters():
        parameter.data.add_(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_granularity_keeps_parameters_and_groups(module: LanguageModule) -> None:
    """Each token takes whole copies: k experts that are pieces of k / g copies, all with one row of the router."""
    whole, cut = first(upcycle(module, num_experts=4)), first(upcycle(module, num_experts=4, granularity=3))
    assert (cut.num_experts, cut.d_ff, cut.router.k) == (12, F // 3, 6)
    assert sum(p.numel() for p in cut.experts.parameters()) == sum(p.numel() for p in whole.experts.parameters())
    rows = cut.router.weight.view(4, 3, D)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert len(rows[:, 0].unique(dim=0)) == 4
    _, routing = cut.eval()(torch.randn(2, 9, D))
    copies = (routing.expert.view(-1, 6) // 3).sort(-1).values
    assert torch.equal(copies[:, ::3].repeat_interleave(3, 1), copies)


def test_granularity_divides_the_widths_that_it_cuts() -> None:
    """Layers of several widths, as `to_dense` makes them."""
    module = dense(partial(DECODER, d_ff=[10, 12, 12]))
    made = upcycle(module, granularity=4, sparse=[1, 2])
    assert [part.d_ff for part in made.net.modules() if isinstance(part, MoELayer)] == [3, 3]
    assert change(module, made).logits < 1e-5
    with pytest.raises(ValueError, match="divide d_ff=10; got 4"):
        upcycle(module, granularity=4)


def test_a_switch_router_dips_a_little_and_less_when_tiny(module: LanguageModule) -> None:
    tiny, larger = (change(module, upcycle(module, k=1, router_std=std)).logits for std in (1e-5, 1e-1))
    assert 1e-8 < tiny < 1e-3
    assert larger > 30 * tiny
    made = upcycle(module, num_experts=5, k=1)
    weight = module.net.get_submodule(made.sparse_layers[0]).down.weight.t()
    assert torch.equal(first(made).experts.w2, 5 * weight.expand(5, F, D))
    assert 0.0005 < first(made).router.weight.std() < 0.002


@pytest.mark.parametrize("gated", [False, True])
def test_noise_is_measured_in_deviations_of_the_matrix(gated: bool) -> None:
    module = dense(partial(DECODER, d_ff=240, feed_forward=GATED if gated else FeedForward))
    old = module.net.blocks[0].mlp
    into = [old.gate.weight, old.up.weight] if gated else [old.up.weight]
    with torch.no_grad():
        into[0] *= 0.04
    layer = first(upcycle(module, noise=0.1))
    halves = layer.experts.w1.split(240, dim=-1)
    for weight, copied in zip([*halves, layer.experts.w2], [w.t() for w in [*into, old.down.weight]], strict=True):
        noise = (weight - copied).detach()
        assert float(noise.std() / copied.std().detach()) == pytest.approx(0.1, rel=0.05)
        assert len(noise.flatten(1).unique(dim=0)) == 8


@pytest.mark.parametrize("gated", [False, True])
def test_drop_draws_a_share_of_the_units_from_their_own_statistics(gated: bool) -> None:
    """Of 1000 units 300 go, others in each expert; each matrix has a mean and a deviation of its own."""
    width = 1000
    module = dense(partial(DECODER, d_ff=width, feed_forward=partial(FeedForward, gated=gated)))
    old = module.net.blocks[0].mlp
    matrices = [old.up.weight.t(), old.down.weight] + ([old.gate.weight.t()] if gated else [])
    with torch.no_grad():
        for number, matrix in enumerate(matrices):
            matrix.mul_(1 + number).add_(number - 1)
    layer = first(upcycle(module, num_experts=2, drop=0.3))
    w1, w2 = layer.experts.w1.detach(), layer.experts.w2.detach()
    parts = {"up": w1[..., -width:], "down": w2.transpose(1, 2)} | ({"gate": w1[..., :width]} if gated else {})
    gone = []
    for expert in range(2):
        changed = {}
        for name, part in parts.items():
            copied = getattr(old, name).weight.detach()
            copied = copied.t() if name != "down" else copied
            changed[name] = (part[expert] != copied).any(0)
            new, was = part[expert][:, changed[name]], copied[:, changed[name]]
            assert new.mean() == pytest.approx(float(was.mean()), abs=0.05 * float(was.std()))
            assert new.std() == pytest.approx(float(was.std()), rel=0.05)
        assert all(torch.equal(mask, changed["up"]) for mask in changed.values())
        assert int(changed["up"].sum()) == 300
        gone.append(changed["up"])
    assert not torch.equal(*gone)


def test_placement_and_the_rest_of_the_arguments() -> None:
    pair = upcycle(dense(NETS["gated encoder-decoder"]), sparse=[1], decoder_sparse="last(1)", num_experts=4)
    assert pair.sparse_layers == ["encoder.blocks.1.mlp", "decoder.blocks.1.mlp"]
    assert first(pair).experts.dropout == 0.1
    made = upcycle(dense(DECODER), sparse="every(3)", capacity_factor=1.5)
    assert made.sparse_layers == ["blocks.2.mlp"]
    assert first(made).capacity.limit(8, 8, 2, training=True) == 3
    assert first(made).capacity.limit(8, 8, 2, training=False) is None
    assert [type(loss).__name__ for loss in made.losses] == ["Balance"]


def test_it_learns_and_its_experts_part() -> None:
    made = upcycle(dense(DECODER), num_experts=3).train()
    tokens = torch.randint(V, (4, 24))
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    losses: list[Tensor] = []
    for _ in range(3):
        found = made.training_step({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}, 0)["loss"]
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        losses.append(found.detach())
    assert losses[-1] < losses[0]
    assert first(made).router.weight.grad.abs().sum() > 0
    weights = first(made).experts.w1.detach()
    assert not torch.equal(weights[0], weights[1])


def test_half_precision_stays() -> None:
    made = upcycle(dense(DECODER).bfloat16(), noise=0.1, drop=0.2)
    assert {tensor.dtype for tensor in made.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"k": 9}, "k=9 choices of a token are impossible: k must be from 1 to 8"),
        ({"k": 0}, "k=0 choices"),
        ({"granularity": 0}, "granularity must be at least 1; got 0"),
        ({"granularity": 5}, "granularity must be at least 1 and divide d_ff=12; got 5"),
        ({"granularity": 3, "k": 4}, "make k a multiple of 3"),
        ({"noise": -1.0}, "noise must be a finite number >= 0; got -1.0"),
        ({"drop": 1.5}, "drop is a share of the hidden units, from 0 to 1; got 1.5"),
        ({"num_experts": 0}, "num_experts must be at least 1; got 0"),
        ({"sparse": []}, "makes no layer sparse"),
        ({"sparse": [3]}, "sparse names layer 3"),
        ({"decoder_sparse": [1]}, "decoder_sparse is of an encoder-decoder"),
    ],
)
def test_what_is_impossible_is_refused(options: dict, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        upcycle(dense(DECODER), **options)


class Wide(FeedForward):
    """Feed-forward layers of someone's own."""


def test_other_models_are_refused() -> None:
    module = dense(DECODER)
    with pytest.raises(ValueError, match="has 3 sparse layers already"):
        upcycle(upcycle(module))
    with pytest.raises(ValueError, match=r"blocks.0.mlp is a Wide, which experts cannot express"):
        upcycle(dense(partial(DECODER, feed_forward=Wide)))
