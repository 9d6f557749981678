"""Fewer experts: nothing lost where nothing was used or all was the same, and what cannot be taken apart refused."""

from __future__ import annotations

from functools import partial

import pytest
import shapes
import torch
from torch import Tensor, nn

from switchkit import (
    Cosine,
    Decoder,
    EncoderDecoder,
    GatedMlp,
    Hash,
    LanguageModule,
    MoELayer,
    NoisyTopK,
    Null,
    RoundRobin,
    Shared,
    Sigmoid,
    Soft,
    Switch,
    TopK,
)
from switchkit.convert.measuring import ExpertUse, Measured, assumed, measure
from switchkit.convert.merging import merge, stack_of
from switchkit.convert.shrinking import groups_of, kept_experts, merge_experts, prune, rescale
from switchkit.convert.upcycling import upcycle

V, D, E = 13, 8, 6
NET = partial(Decoder, d_model=D, num_layers=2, num_heads=2, d_ff=12, num_experts=E, context=16, sparse="every(1)")
PAIR = partial(EncoderDecoder, d_model=D, encoder_layers=1, num_heads=2, d_ff=12, num_experts=E, sparse=[0])
TOP2 = partial(TopK, k=2)


def sparse(router: object = TOP2, net: partial = NET, **moe: object) -> LanguageModule:
    """Weights large enough that each part tells."""
    module = LanguageModule(net, moe=partial(MoELayer, router=router, **moe), vocab_size=V).double()
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module


def data(module: LanguageModule) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(4)
    tokens, targets = (torch.randint(V, (16, 16), generator=draw) for _ in range(2))
    pair = {"source": targets} if isinstance(module.net, EncoderDecoder) else {}
    return [{"tokens": tokens, "targets": targets, **pair}]


def logits(module: LanguageModule) -> Tensor:
    batch = data(module)[0]
    del batch["targets"]
    return module.eval().net(batch.pop("tokens"), **batch).logits.detach()


def layers(module: LanguageModule) -> list[MoELayer]:
    return [part for part in module.net.modules() if isinstance(part, MoELayer)]


def use(load: list[float], alike: list[list[float]] | None = None, weight: list[float] | None = None) -> ExpertUse:
    count = torch.tensor(load, dtype=torch.float64)
    table = torch.eye(len(load)).double() if alike is None else torch.tensor(alike).double()
    return ExpertUse(
        "x", count, count if weight is None else torch.tensor(weight).double(), 10, torch.diag(count), table
    )


@pytest.mark.parametrize("net", [NET, PAIR], ids=["decoder", "encoder-decoder"])
@pytest.mark.parametrize("router", ["top_k", "switch"])
@pytest.mark.parametrize("experts", [None, GatedMlp, Shared], ids=["mlp", "gated", "shared"])
def test_experts_that_got_no_token_are_not_missed(router: str, experts: object, net: partial) -> None:
    """Two of six: with rows u, 2u, -u, -2u and two of zeros, a token's two best are never zeros; with an offset of -1e4
    an expert has a probability of 0."""
    module = sparse(TOP2 if router == "top_k" else partial(Switch, offset=True), net, experts=experts)
    with torch.no_grad():
        for layer in layers(module):
            if router == "switch":
                layer.router.offset[[0, 3]] = -1e4
            else:
                row = layer.router.weight[1].clone()
                layer.router.weight.copy_(torch.tensor([0, 1, 2, 0, -1, -2]).double()[:, None] * row)
    before = measure(module, data(module))
    assert all(((one.load > 0) == torch.tensor([0, 1, 1, 0, 1, 1])).all() for one in before.layers)
    wanted = logits(module)
    for by in ("usage", "gate"):
        pruned = prune(module, 4, measured=before, by=by)
        torch.testing.assert_close(logits(pruned), wanted, rtol=1e-10, atol=1e-10)
        assert [layer.num_experts for layer in layers(pruned)] == [4] * len(layers(module))
        assert not rescale(pruned, before, measure(pruned, data(module)))
        rows = layers(module)[0].router.weight[[1, 2, 4, 5]]
        assert torch.equal(layers(pruned)[0].router.weight, rows)
    # One more takes something away.
    assert (logits(prune(module, 3, measured=before)) - wanted).abs().max() > 1e-3


def test_which_experts_stay() -> None:
    alike = [[1.0, 0.9, 0.1, 0.0], [0.9, 1.0, 0.2, 0.3], [0.1, 0.2, 1.0, 0.5], [0.0, 0.3, 0.5, 1.0]]
    one = use([5.0, 7.0, 0.0, 9.0], alike, weight=[4.0, 1.0, 3.0, 2.0])
    assert kept_experts(one, 2) == [1, 3]
    assert kept_experts(one, 2, "gate") == [0, 2]
    # 0 and 1 are most alike and 0 is used less; then 2 and 3, of which 2 is.
    assert kept_experts(one, 3, "similarity") == [1, 2, 3]
    assert kept_experts(one, 2, "similarity") == [1, 3]


def test_which_experts_are_merged() -> None:
    """The two most used lead; each other joins the leader that it is most like, not the expert."""
    alike = [[1.0, 0.9, 0.1, 0.8], [0.9, 1.0, 0.2, 0.3], [0.1, 0.2, 1.0, 0.5], [0.8, 0.3, 0.5, 1.0]]
    assert groups_of(use([5.0, 7.0, 0.0, 9.0], alike), 2) == [[1, 0], [3, 2]]
    assert groups_of(use([5.0, 7.0, 0.0, 9.0], alike), 1) == [[3, 0, 1, 2]]


@pytest.mark.parametrize("experts", [None, GatedMlp], ids=["mlp", "gated"])
def test_pairs_of_the_same_expert_become_one(experts: object) -> None:
    """Three experts, each twice: the second time with its hidden units in another order.

    A switch router with equal rows for both gives each half of what one alone would have, which `rescale` makes up for.
    """
    module = sparse(Switch, partial(NET, sparse=[0]), experts=experts)
    with torch.no_grad():
        for layer in layers(module):
            layer.router.weight[3:] = layer.router.weight[:3]
            stack = stack_of(layer.experts)
            order = torch.randperm(12)
            both = torch.cat([order, order + 12]) if experts is GatedMlp else order
            stack["w1"][3:] = stack["w1"][:3][:, :, both]
            stack["w2"][3:] = stack["w2"][:3][:, order]
    before = measure(module, data(module))
    wanted = logits(module)
    for how, error in (("aligned", 0.0), ("mean", 1e-3)):
        made = merge_experts(module, 3, measured=before, how=how)
        assert (logits(made) - wanted).abs().max() > 1e-3
        assert rescale(made, before, measure(made, data(module)))
        assert float((logits(made) - wanted).abs().max()) == pytest.approx(0, abs=1e-10) or error
        assert float((logits(made) - wanted).abs().max()) >= error


def test_a_merged_expert_and_its_row_are_means_by_usage() -> None:
    module = sparse()
    before = measure(module, data(module))
    made = merge_experts(module, 2, measured=before, how="usage")
    for layer, new, one in zip(layers(module), layers(made), before.layers, strict=True):
        for index, group in enumerate(groups_of(one, 2)):
            share = one.load[group] / one.load[group].sum()
            row = sum(float(s) * layer.router.weight[e] for s, e in zip(share, group, strict=True))
            torch.testing.assert_close(new.router.weight[index], row, rtol=1e-12, atol=1e-12)
            stack = {name: weight[group] for name, weight in stack_of(layer.experts).items()}
            for name, weight in merge(stack, "usage", usage=one.load[group]).items():
                assert torch.equal(getattr(new.experts, name)[index], weight)


@pytest.mark.parametrize(
    "router",
    [
        partial(Sigmoid, k=2),
        partial(NoisyTopK, k=2),
        partial(Cosine, k=2),
        partial(TopK, k=2, softmax="after"),
        partial(Switch, offset=True),
    ],
    ids=lambda router: router.func.__name__,
)
def test_every_tensor_of_the_router_is_cut(router: partial) -> None:
    """What is told by experts, biases and noise included, loses the same rows; the rest stays."""
    module = sparse(router)
    state = layers(module)[0].router.state_dict()
    for tensor in state.values():
        tensor.copy_(torch.rand_like(tensor))
    made = prune(module, 3, measured=measure(module, data(module)))
    kept = kept_experts(measure(module, data(module)).layers[0], 3)
    cut = layers(made)[0].router.state_dict()
    assert cut.keys() == state.keys()
    for name, tensor in state.items():
        rows = tensor[kept] if tensor.dim() and tensor.shape[0] == E else tensor
        torch.testing.assert_close(cut[name], rows, rtol=1e-15, atol=0)
    assert torch.isfinite(logits(made)).all()


@pytest.mark.parametrize(
    ("moe", "why"),
    [
        ({"router": Hash}, "router Hash has learned nothing of single experts"),
        ({"router": RoundRobin}, "router RoundRobin has learned nothing of single experts"),
        ({"router": TOP2, "experts": Null}, "kind Null cannot be merged"),
    ],
    ids=["hash", "round_robin", "null"],
)
def test_what_cannot_be_taken_apart_is_refused(moe: dict, why: str) -> None:
    module = sparse(**moe)
    for make in (prune, merge_experts):
        with pytest.raises(ValueError, match=why):
            make(module, 3, measured=measure(module, data(module)))


def test_a_table_of_experts_is_refused() -> None:
    module = sparse(partial(Hash, table="balanced", vocab_size=V))
    with pytest.raises(ValueError, match="router Hash keeps 'table' .* cannot do with fewer"):
        prune(module, 3, measured=measure(module, data(module)))


def test_soft_slots_go_with_their_expert() -> None:
    net = partial(Decoder, **{**NET.keywords, "allow_leak": True})
    module = sparse(partial(Soft, slots=3), net)
    made = prune(module, 2, measured=measure(module, data(module)))
    assert layers(made)[0].router.phi.shape == (2, 3, D)


def test_k_is_kept_or_told() -> None:
    module = sparse(partial(TopK, k=4))
    before = measure(module, data(module))
    assert layers(prune(module, 4, measured=before))[0].router.k == 4
    with pytest.raises(ValueError, match=r"k=4 choices of a token are impossible.* Keep more of them, or give k"):
        prune(module, 3, measured=before)
    assert layers(prune(module, 3, measured=before, k=2))[0].router.k == 2
    with pytest.raises(ValueError, match="router Switch has no option k"):
        prune(sparse(Switch), 3, measured=measure(sparse(Switch), data(module)), k=2)


def test_granularity_is_spelled_out() -> None:
    net = partial(Decoder, d_model=D, num_layers=2, num_heads=2, d_ff=12, context=16, sparse=[])
    module = upcycle(LanguageModule(net, vocab_size=V), num_experts=2, granularity=3)
    made = prune(module, 5, measured=measure(module, data(module)), k=3)
    assert [(layer.num_experts, layer.d_ff) for layer in layers(made)] == [(5, 4)] * 2
    again = prune(made, 4, measured=measure(made, data(made)))
    assert layers(again)[0].num_experts == 4


def test_without_data_rows_tell_which_are_alike() -> None:
    module = sparse()
    with torch.no_grad():
        for layer in layers(module):
            layer.router.weight[4] = 2 * layer.router.weight[1]
    assert kept_experts(assumed(module).layers[0], 5, "similarity") in ([0, 2, 3, 4, 5], [0, 1, 2, 3, 5])
    assert layers(merge_experts(module, 2, measured=assumed(module)))[0].num_experts == 2


def test_bad_numbers_are_refused() -> None:
    module = sparse()
    before = measure(module, data(module))
    for keep in (0, 6, 9):
        with pytest.raises(
            ValueError, match=f"keep must be from 1 to 5, fewer than the 6 experts of a layer; got {keep}"
        ):
            prune(module, keep, measured=before)
    with pytest.raises(ValueError, match="measured is of other layers"):
        prune(module, 3, measured=Measured(before.layers[:1], None))
    with shapes.unchecked(), pytest.raises(ValueError, match="by must be one of usage, gate, similarity; got 'size'"):
        prune(module, 3, measured=before, by="size")
    dense = LanguageModule(partial(Decoder, d_model=D, num_heads=2, sparse=[]), vocab_size=V)
    with pytest.raises(ValueError, match="the model has no sparse layer"):
        prune(dense, 3, measured=before)
