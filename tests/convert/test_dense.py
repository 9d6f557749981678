"""A sparse model made dense: exact where its experts are one, and a dense model like any other."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from switchkit import Decoder, EncoderDecoder, GatedMlp, LanguageModule, Mlp, MoELayer, Shared, Switch, TopK
from switchkit.convert.comparing import change
from switchkit.convert.dense import to_dense
from switchkit.convert.measuring import assumed, measure
from switchkit.convert.merging import feed_forward_of
from switchkit.convert.upcycling import upcycle
from switchkit.layers import FeedForward

V, D, F = 13, 16, 12
GATED = partial(FeedForward, gated=True, activation="gelu_tanh")
NETS = {
    "decoder": partial(Decoder, d_model=D, num_layers=3, num_heads=2, d_ff=F, context=24, sparse=[]),
    "pair": partial(EncoderDecoder, d_model=D, encoder_layers=2, num_heads=2, d_ff=F, sparse=[], feed_forward=GATED),
}


def made(net: partial, **more: object) -> LanguageModule:
    module = LanguageModule(net, vocab_size=V, **more)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module


def data(module: LanguageModule) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(V, (4, 12))
    return [{"tokens": tokens, "targets": tokens} | ({} if isinstance(module.net, Decoder) else {"source": tokens})]


@pytest.mark.parametrize("how", ["mean", "usage", "most_used", "aligned"])
@pytest.mark.parametrize("sparse", ["every(1)", "every(2)"])
@pytest.mark.parametrize("net", NETS)
def test_there_and_back(net: str, sparse: str, how: str) -> None:
    """Upcycled and made dense again, a model has every weight that it had, and the same arguments where they tell."""
    dense = made(NETS[net])
    up = upcycle(dense, sparse=sparse)
    back = to_dense(up, measured=measure(up, data(up)), how=how)
    assert change(dense, back).logits < 1e-6
    assert back.sparse_layers == []
    assert back.losses == []
    assert back.state_dict().keys() == dense.state_dict().keys()
    for name, weight in dense.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], weight, rtol=1e-6, atol=1e-7)


def test_a_switch_is_turned_down_by_its_mean_weight() -> None:
    module = made(
        partial(Decoder, **NETS["decoder"].keywords | {"sparse": "every(1)"}), moe=partial(MoELayer, router=Switch)
    )
    before = measure(module, data(module))
    dense = to_dense(module, measured=before, how="usage")
    for name, one in zip(module.sparse_layers, before.layers, strict=True):
        wanted = feed_forward_of(module.net.get_submodule(name), "usage", usage=one.load, gate=one.gate)
        assert 0 < one.gate < 1
        for key, weight in dense.net.get_submodule(name).state_dict().items():
            assert torch.equal(weight, wanted[key])
    others = [n for n in module.state_dict() if ".experts." not in n and ".router." not in n]
    assert all(torch.equal(dense.state_dict()[n], module.state_dict()[n]) for n in others)


def test_shared_experts_widen_a_model_that_is_sparse_throughout() -> None:
    net = partial(Decoder, **NETS["decoder"].keywords | {"sparse": "every(1)", "expert_d_ff": 6})
    moe = partial(MoELayer, router=partial(TopK, k=2), experts=partial(Shared, num_shared=2))
    module = made(net, moe=moe)
    dense = to_dense(module, measured=assumed(module))
    assert {layer.up.out_features for layer in dense.net.modules() if isinstance(layer, FeedForward)} == {18}
    assert dense.net.blocks[0].mlp.activation == "silu"
    partly = made(partial(net, sparse=[1]), moe=moe)
    with pytest.raises(
        ValueError, match=r"blocks.0.mlp is dense with .*'relu', False, 12.* would have .*'silu', True, 18"
    ):
        to_dense(partly, measured=assumed(partly))


def test_what_has_no_dense_form_is_refused() -> None:
    with pytest.raises(ValueError, match="dense already"):
        to_dense(made(NETS["decoder"]), measured=assumed(made(NETS["decoder"])))
    attention = made(partial(NETS["decoder"], sparse_attention=[1]))
    with pytest.raises(ValueError, match=r"blocks.1.attention.* is a sparse layer in attention"):
        to_dense(attention, measured=assumed(attention))
    biased = made(partial(NETS["decoder"], sparse=[1]), moe=partial(MoELayer, experts=partial(Mlp, bias=True)))
    with pytest.raises(ValueError, match="have biases"):
        to_dense(biased, measured=assumed(biased))
    gated = made(partial(NETS["decoder"], sparse=[1]), moe=partial(MoELayer, experts=GatedMlp))
    with pytest.raises(ValueError, match="a dense model has one kind of layer"):
        to_dense(gated, measured=assumed(gated))
