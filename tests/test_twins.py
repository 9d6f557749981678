"""A dense twin equals its sparse model in what was asked for."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from switchkit import (
    Decoder,
    EncoderDecoder,
    ExpertChoice,
    Factor,
    FeedForward,
    GatedMlp,
    LanguageModule,
    Linear,
    MoELayer,
    Null,
    ReLU,
    Shared,
    Soft,
    TopK,
)
from switchkit.counts import count
from switchkit.spec import build
from switchkit.twins import dense_spec, net_of

VOCAB, CONTEXT = 11, 16
DECODER = partial(Decoder, d_model=16, num_layers=3, num_heads=2, d_ff=24, num_experts=4, context=CONTEXT)
BOTH = partial(EncoderDecoder, d_model=16, encoder_layers=3, num_heads=2, d_ff=24, num_experts=4)
TWO = partial(TopK, k=2)
GATED = partial(FeedForward, gated=True)


def module(net: Any, **parts: Any) -> LanguageModule:
    return LanguageModule(net, moe=partial(MoELayer, **parts), vocab_size=VOCAB)


def widths(spec: dict[str, Any]) -> dict[str, Any]:
    arguments = spec["init_args"]["net"]["init_args"]
    return {name: arguments[name] for name in ("d_ff", "decoder_d_ff") if name in arguments}


EXACT = {
    "one expert": (DECODER, {}, {"d_ff": 24}),
    "two experts beside dense layers": (DECODER, {"router": TWO}, {"d_ff": [24, 48, 24]}),
    "two of half the width": (partial(DECODER, expert_d_ff=12), {"router": TWO}, {"d_ff": 24}),
    "all sparse": (partial(DECODER, sparse="every(1)"), {"router": TWO}, {"d_ff": 48}),
    "widths by layer": (
        partial(DECODER, d_ff=[8, 16, 40], sparse=[0, 2]),
        {"router": TWO},
        {"d_ff": [16, 16, 80]},
    ),
    "cut": (DECODER, {"router": TWO, "granularity": 2}, {"d_ff": 24}),
    "gated like the dense ones": (partial(DECODER, feed_forward=GATED), {"experts": GatedMlp}, {"d_ff": 24}),
    "gated beside plain ones": (DECODER, {"experts": GatedMlp}, {"d_ff": [24, 36, 24]}),
    "shared": (
        partial(DECODER, feed_forward=GATED),
        {"router": TWO, "experts": partial(Shared, num_shared=2, mix="gate")},
        {"d_ff": [24, 96, 24]},
    ),
    "null": (DECODER, {"router": TWO, "experts": partial(Null, zero=1, copy=0)}, {"d_ff": [24, 36, 24]}),
    "expert choice": (
        partial(DECODER, allow_leak=True),
        {"router": partial(ExpertChoice, capacity_factor=1.5)},
        {"d_ff": [24, 36, 24]},
    ),
    "attention": (partial(DECODER, sparse_attention=[0]), {}, {"d_ff": 24}),
    "encoder-decoder": (BOTH, {"router": TWO}, {"d_ff": [24, 48, 24]}),
    "sides unlike": (
        partial(BOTH, decoder_layers=2, decoder_sparse=[]),
        {"router": TWO},
        {"d_ff": [24, 48, 24], "decoder_d_ff": 24},
    ),
    "a width of the decoder that no layer has": (
        partial(BOTH, decoder_layers=2, sparse="every(1)", expert_d_ff=12, decoder_d_ff=40),
        {"router": TWO},
        {"d_ff": 24},
    ),
    "expert choice in an encoder": (
        partial(BOTH, decoder_sparse=[]),
        {"router": partial(ExpertChoice, capacity_factor=1.5)},
        {"d_ff": [24, 36, 24], "decoder_d_ff": 24},
    ),
    "both sides sparse all through": (partial(BOTH, decoder_layers=2, sparse="every(1)"), {}, {"d_ff": 24}),
}


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT.keys())
def test_flops_are_equal(case: tuple[Any, dict[str, Any], dict[str, Any]]) -> None:
    net, parts, expected = case
    sparse = module(net, **parts)
    spec = dense_spec(sparse.spec, vocab_size=VOCAB)
    assert widths(spec) == expected
    dense = build(spec)()
    assert not dense.sparse_layers
    assert not dense.losses
    assert count(dense.net, CONTEXT).flops == count(sparse.net, CONTEXT).matched
    assert dense_spec({**sparse.spec}, vocab_size=VOCAB) == spec


@pytest.mark.parametrize("net", [DECODER, BOTH], ids=["decoder", "encoder-decoder"])
@pytest.mark.parametrize("experts", [None, GatedMlp, Shared], ids=["mlp", "gated", "shared"])
def test_parameters_are_as_near_as_a_width_allows(net: Any, experts: Any) -> None:
    sparse = module(net, router=TWO, experts=experts)
    spec = dense_spec(sparse.spec, match="params", vocab_size=VOCAB)
    wanted = count(sparse.net, CONTEXT).parameters
    mixtures = len(sparse.sparse_layers)
    unit = 2 * 16 * mixtures
    assert abs(count(net_of(spec, VOCAB), CONTEXT).parameters - wanted) <= unit / 2


def test_what_is_not_of_sparse_layers_stays() -> None:
    net = partial(DECODER, norm="rms", tied=False, dropout=0.1, feed_forward=GATED, num_experts=8, allow_leak=True)
    given = LanguageModule(net, optimizer=partial(torch.optim.SGD, lr=0.1), warmup_steps=7, vocab_size=VOCAB)
    before = repr(given.spec)
    spec = dense_spec(given.spec, vocab_size=VOCAB)
    assert repr(given.spec) == before
    kept = {
        n: v for n, v in given.spec["init_args"]["net"]["init_args"].items() if n not in ("num_experts", "allow_leak")
    }
    # Experts are plain by default: their two matrices of 24 are three of 16.
    assert spec["init_args"]["net"]["init_args"] == {**kept, "d_ff": [24, 16, 24], "sparse": []}
    others = {name: value for name, value in given.spec["init_args"].items() if name != "net"}
    assert {name: spec["init_args"][name] for name in others} == {**others, "moe": None, "losses": []}


def test_the_default_model_has_a_twin() -> None:
    assert widths(dense_spec(LanguageModule(vocab_size=VOCAB).spec, vocab_size=VOCAB)) == {"d_ff": 512}


def test_no_whole_width_is_exact() -> None:
    """Three products of 10 are worth two of 15, but of 11 they are worth two of 16.5."""
    exact = module(partial(DECODER, expert_d_ff=10), experts=GatedMlp)
    assert widths(dense_spec(exact.spec, vocab_size=VOCAB)) == {"d_ff": [24, 15, 24]}
    near = module(partial(DECODER, expert_d_ff=11), experts=GatedMlp)
    spec = dense_spec(near.spec, vocab_size=VOCAB)
    off = count(net_of(spec, VOCAB), CONTEXT).flops - count(near.net, CONTEXT).matched
    assert abs(off) == 2 * 2 * 16 / 2


class Plain(nn.Module):
    """A model of a user's own."""

    def __init__(self, vocab_size: int, moe: Any = None) -> None:
        super().__init__()
        self.layer = MoELayer(4, 2, d_ff=4)


@pytest.mark.parametrize(
    ("net", "parts", "match", "told"),
    [
        (partial(DECODER, sparse=[]), {}, "flops", "dense already"),
        (DECODER, {}, "memory", "match must be 'flops' or 'params'; got 'memory'"),
        (Plain, {}, "flops", "a Decoder or an EncoderDecoder; this is a Plain"),
        (DECODER, {"router": ReLU}, "flops", "relu lets a token choose any number.*match parameters instead"),
        (partial(DECODER, allow_leak=True), {"router": Soft}, "flops", "soft computes the same rows"),
        (partial(DECODER, sparse_attention=[1]), {}, "params", "sparse_attention"),
        (
            partial(DECODER, expert_d_ff=1, allow_leak=True),
            {"router": partial(ExpertChoice, capacity_factor=0.25)},  # a width of 1 / 4
            "flops",
            "less than a dense layer of width 1",
        ),
        (
            partial(DECODER, sparse_attention=[1], attention_moe=partial(MoELayer, router=TWO, experts=Linear)),
            {},
            "flops",
            "2 times the multiply-adds",
        ),
    ],
)
def test_what_cannot_be_matched_is_refused(net: Any, parts: dict[str, Any], match: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        dense_spec(module(net, **parts).spec, match=match, vocab_size=VOCAB)


def test_a_router_without_a_fixed_cost_has_a_twin_of_equal_parameters() -> None:
    sparse = module(DECODER, router=ReLU)
    spec = dense_spec(sparse.spec, match="params", vocab_size=VOCAB)
    assert count(net_of(spec, VOCAB), CONTEXT).parameters == count(sparse.net, CONTEXT).parameters


def test_experts_choose_among_the_tokens_of_a_sequence() -> None:
    """Of 10 tokens each of 4 experts takes ceil(15 / 4) = 4, so that 16 are computed; trained with a limit of 2, 8."""
    for capacity, width in ((None, 24 * 16 / 10), (partial(Factor, train=0.4), 24 * 8 / 10)):
        router = partial(ExpertChoice, capacity_factor=1.5)
        sparse = module(partial(DECODER, allow_leak=True), router=router, capacity=capacity)
        assert widths(dense_spec(sparse.spec, vocab_size=VOCAB, context=10)) == {"d_ff": [24, round(width), 24]}


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"d_ff": [8, 8]}, "d_ff lists 2 widths for 3 layers"),
        ({"d_ff": [8, 0, 8]}, "d_ff must be at least 1; got 0"),
        ({"d_ff": []}, "d_ff lists 0 widths"),
    ],
)
def test_a_list_of_widths_that_does_not_fit(sizes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DECODER(VOCAB, **sizes)
    with pytest.raises(ValueError, match="decoder_d_ff lists 3 widths for 2 layers"):
        BOTH(VOCAB, decoder_layers=2, d_ff=[8, 8, 8])
