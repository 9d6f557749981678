"""Fewer experts: what nobody was sent to goes without a trace, equal experts merge into themselves."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from switchkit import (
    Decoder,
    Dropless,
    EncoderDecoder,
    Factor,
    GatedMlp,
    Hash,
    LanguageModule,
    Mlp,
    MoELayer,
    Null,
    Shared,
    Sigmoid,
    Switch,
    TopK,
)
from switchkit.convert.comparing import change
from switchkit.convert.densifying import to_dense
from switchkit.convert.measuring import ExpertUse, Measured, assumed, measure
from switchkit.convert.shrinking import check_shrinks, groups_of, kept_experts, merge, prune, rescale
from switchkit.convert.upcycling import upcycle
from switchkit.layers import FeedForward
from switchkit.losses.devices import CommunicationBalance, DeviceBalance
from switchkit.routing.local_experts import LocalExperts
from switchkit.routing.unlearned import Random, RoundRobin

V, D, F, E = 13, 16, 12, 5
NETS = {
    "decoder": partial(Decoder, d_model=D, num_layers=3, num_heads=2, d_ff=F, num_experts=E, context=24),
    "encoder-decoder": partial(EncoderDecoder, d_model=D, encoder_layers=2, num_heads=2, d_ff=F, num_experts=E),
}
NETS["sparse decoder"] = partial(NETS["encoder-decoder"], sparse=[], decoder_sparse=[1])
TOP2 = partial(MoELayer, router=partial(TopK, k=2))


def module_of(net: str = "decoder", moe: partial = TOP2) -> LanguageModule:
    torch.manual_seed(1)
    module = LanguageModule(NETS[net], moe=moe, vocab_size=V)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module


def batches(module: LanguageModule) -> list[dict[str, Tensor]]:
    torch.manual_seed(2)
    tokens = torch.randint(V, (2, 3, 17))
    more = {"source": torch.randint(V, (3, 9))} if isinstance(module.net, EncoderDecoder) else {}
    return [{"tokens": rows[:, :-1], "targets": rows[:, 1:], **more} for rows in tokens]


def measured(module: LanguageModule) -> Measured:
    return measure(module, batches(module))


def layers(module: LanguageModule) -> list[MoELayer]:
    return [part for part in module.net.modules() if isinstance(part, MoELayer)]


def loss(module: LanguageModule) -> float:
    return measured(module).loss or 0.0


def equal_experts(module: LanguageModule, *, shuffled: bool = False) -> None:
    """All experts of a layer made copies of its first; with `shuffled` their hidden units in another order each."""
    with torch.no_grad():
        for layer in layers(module):
            w1, w2 = layer.experts.w1, layer.experts.w2
            for expert in range(1, len(w1)):
                order = torch.randperm(w2.shape[1]) if shuffled else torch.arange(w2.shape[1])
                halves = [half[:, order] for half in w1[0].split(w2.shape[1], dim=-1)]
                w1[expert], w2[expert] = torch.cat(halves, -1), w2[0][order]


@pytest.mark.parametrize("net", NETS)
def test_pruning_what_no_token_is_sent_to_changes_nothing(net: str) -> None:
    """A bias keeps two of five experts out of reach; the weights of those in reach sum to one with and without them."""
    module = module_of(net, partial(MoELayer, router=partial(Sigmoid, k=2)))
    for layer in layers(module):
        layer.router.bias[[1, 3]] = -10
    found = measured(module)
    made = prune(module, 3, found)
    assert loss(made) == pytest.approx(found.loss, abs=1e-6)
    assert all(layer.router.bias.tolist() == [0, 0, 0] for layer in layers(made))
    assert abs(loss(prune(module, 2, found)) - float(found.loss or 0)) > 1e-3


@pytest.mark.parametrize("by", ["usage", "weight"])
def test_as_many_stay_in_each_group_of_the_router(by: str) -> None:
    """Of four, one of the first group and two of the second are out of reach: one of each goes, and nothing changes."""
    net = partial(NETS["decoder"], num_experts=8)
    router = partial(Sigmoid, k=2, groups=2, top_groups=1)
    module = LanguageModule(net, moe=partial(MoELayer, router=router), vocab_size=V)
    (layer,) = layers(module)
    nn.init.normal_(layer.router.weight)
    layer.router.bias[[3, 4, 5]] = -10
    found = measured(module)
    assert (found.layers[0].load > 0).tolist() == [True] * 3 + [False] * 3 + [True] * 2
    made = prune(module, 6, found, by=by)
    assert torch.equal(layers(made)[0].router.weight, layer.router.weight[[0, 1, 2, 4, 6, 7]])
    assert loss(made) == pytest.approx(found.loss, abs=1e-6)


@pytest.mark.slow
def test_groups_judged_by_their_best_expert_stay_the_same() -> None:
    """Twelve experts in four groups, of which the few tokens need two in each at most."""
    net = partial(NETS["decoder"], num_experts=12)
    router = partial(TopK, k=2, groups=4, top_groups=2)
    seen = 0
    for seed in range(30):
        torch.manual_seed(seed)
        module = LanguageModule(net, moe=partial(MoELayer, router=router), vocab_size=V)
        nn.init.normal_(layers(module)[0].router.weight)
        tokens = torch.randint(V, (1, 4))
        found = measure(module, [{"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}])
        used = (found.layers[0].load > 0).view(4, 3).sum(-1)
        if used.max() > 2:
            continue
        seen += 1
        made = prune(module, 8, found)
        before, after = (one.eval()(tokens[:, :-1]) for one in (module, made))
        assert torch.allclose(before, after, atol=1e-6)
    assert seen > 10


@pytest.mark.parametrize("by", ["usage", "weight"])
def test_the_best_stay_in_their_order(by: str) -> None:
    module = module_of()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = measured(module)
    made = prune(module, 3, found, by=by)
    for use, old, new in zip(found.layers, layers(module), layers(made), strict=True):
        score = use.load if by == "usage" else use.weight
        stays = sorted(sorted(range(E), key=lambda e: (-float(score[e]), e))[:3])
        assert torch.equal(new.experts.w1, old.experts.w1[stays])
        assert torch.equal(new.experts.w2, old.experts.w2[stays])
        assert torch.equal(new.router.weight, old.router.weight[stays])
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("kind", ["mlp", "gated_mlp", "shared"])
def test_merging_equal_experts_is_exact(kind: str) -> None:
    """Copies that are sent everything alike, whatever the router says, for their weights sum to one."""
    experts = {"mlp": Mlp, "gated_mlp": GatedMlp, "shared": partial(Shared, experts=Mlp)}[kind]
    module = module_of(moe=partial(TOP2, experts=experts))
    if kind == "shared":
        for layer in layers(module):
            layer.experts.routed.w1.data.copy_(layer.experts.routed.w1.data[:1].expand(E, -1, -1).clone())
            layer.experts.routed.w2.data.copy_(layer.experts.routed.w2.data[:1].expand(E, -1, -1).clone())
    else:
        equal_experts(module, shuffled=True)
    found = measured(module)
    made = merge(module, 2, found)
    assert all(layer.num_experts == 2 for layer in layers(made))
    assert loss(made) == pytest.approx(found.loss, abs=1e-6)
    if kind != "shared":
        assert abs(loss(merge(module, 2, found, how="usage")) - float(found.loss or 0)) > 1e-3


@pytest.mark.parametrize("kind", [Mlp, GatedMlp, partial(Mlp, bias=True)], ids=["mlp", "gated", "biases"])
def test_pairs_of_the_same_expert_become_one(kind: type | partial) -> None:
    """Three experts, each twice, the second time with its hidden units in another order.

    With equal rows of a switch router each has half of what one alone would have, which `rescale` makes up for.
    """
    net = partial(NETS["decoder"], num_experts=6)
    module = LanguageModule(net, moe=partial(MoELayer, router=Switch, experts=kind), vocab_size=V).double()
    (layer,) = layers(module)
    stack, order = layer.experts, torch.randperm(F)
    with torch.no_grad():
        nn.init.normal_(layer.router.weight)
        layer.router.weight[3:] = layer.router.weight[:3]
        halves = [half[:, :, order] for half in stack.w1[:3].chunk(stack.w1.shape[-1] // F, dim=-1)]
        stack.w1[3:], stack.w2[3:] = torch.cat(halves, -1), stack.w2[:3][:, order]
        if stack.b1 is not None:
            for bias in (stack.b1, stack.b2):
                nn.init.normal_(bias)
            stack.b1[3:], stack.b2[3:] = stack.b1[:3][:, order], stack.b2[:3]
    found = measured(module)
    (use,) = found.layers
    # Which of two alike a token was sent to, the rounding of their logits decides: say that it was the first.
    load = torch.cat([use.load[:3] + use.load[3:], torch.zeros_like(use.load[3:])])
    found = replace(found, layers=(replace(use, load=load),))
    made = merge(module, 3, found)
    assert change(module, made).logits > 1e-3
    assert rescale(made, found, measured(made))
    assert change(module, made).logits < 1e-12


@pytest.mark.parametrize("normalize", ["before", "after"])
@pytest.mark.parametrize("capacity", [Dropless, partial(Factor, eval=0.7)], ids=["dropless", "dropping"])
def test_weights_that_sum_to_one_are_not_rescaled(capacity: partial, normalize: str) -> None:
    """Nor where fewer experts drop less, each having more room."""
    router = partial(TopK, k=2, normalize=normalize, scale=2.0 if normalize == "after" else 1.0)
    module = module_of(moe=partial(MoELayer, router=router, capacity=capacity))
    found = measured(module)
    made = prune(module, 3, found)
    before = loss(made)
    assert not rescale(made, found, measured(made))
    assert loss(made) == before


def test_of_two_that_are_alike_the_less_used_goes() -> None:
    """0 and 1 are most alike and 0 is used less; then 2 and 3, of which 2 is."""
    alike = [[1.0, 0.9, 0.1, 0.0], [0.9, 1.0, 0.2, 0.3], [0.1, 0.2, 1.0, 0.5], [0.0, 0.3, 0.5, 1.0]]
    load = torch.tensor([5.0, 7.0, 0.0, 9.0]).double()
    use = ExpertUse("x", load, load.flip(0), 21, torch.tensor(alike).double(), 21.0)
    assert kept_experts(use, 3, "similarity") == [1, 2, 3]
    assert kept_experts(use, 2, "similarity") == [1, 3]
    assert kept_experts(use, 2, "usage") == [1, 3]
    assert kept_experts(use, 2, "weight") == kept_experts(use, 2) == [0, 2]


def test_groups_join_the_most_alike_leader() -> None:
    """Experts 1 and 4 are used most; 0 is most like 4, 2 and 3 like 1."""
    alike = torch.eye(5)
    for a, b, value in ((0, 1, 0.2), (0, 4, 0.9), (2, 1, 0.5), (2, 4, 0.1), (3, 1, 0.0), (3, 4, -0.5), (1, 4, 0.99)):
        alike[a, b] = alike[b, a] = value
    assert groups_of(alike, torch.tensor([1.0, 9.0, 0.0, 2.0, 5.0]), 2).tolist() == [1, 0, 0, 0, 1]


def test_groups_stay_within_those_of_the_router() -> None:
    """The two most used are of one group of the router; the other has a leader too, and all of it join that one."""
    alike = torch.full((4, 4), 0.1)
    alike[0, 2] = alike[2, 0] = alike[1, 3] = alike[3, 1] = 0.9
    usage = torch.tensor([5.0, 6.0, 1.0, 0.0])
    assert groups_of(alike, usage, 2).tolist() == [0, 1, 0, 1]
    assert groups_of(alike, usage, 2, groups=2).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("count", "told"), [(6, "as many in each of the router's 4 groups"), (4, "at least 8")])
def test_numbers_that_no_groups_fit_are_refused(count: int, told: str) -> None:
    router = partial(TopK, k=3, groups=4, top_groups=2)
    module = LanguageModule(
        partial(NETS["decoder"], num_experts=16), moe=partial(MoELayer, router=router), vocab_size=V
    )
    for shrink in (prune, merge):
        with pytest.raises(ValueError, match=told):
            shrink(module, count, assumed(module))


def test_where_every_expert_is_needed_none_can_go() -> None:
    net = partial(NETS["decoder"], num_experts=8)
    for router, told in (
        (partial(TopK, k=3, groups=4, top_groups=2), "sent to 3 of its 8, chosen from 2 of 4 groups$"),
        (LocalExperts, "sent to 8 of its 8$"),
    ):
        module = LanguageModule(net, moe=partial(MoELayer, router=router), vocab_size=V)
        with pytest.raises(ValueError, match=f"no expert can be taken out of blocks.1.mlp: a token is {told}"):
            prune(module, 4, assumed(module))


@pytest.mark.parametrize("kind", [DeviceBalance, CommunicationBalance])
def test_the_devices_of_a_loss_share_out_what_is_left(kind: type) -> None:
    net = partial(NETS["decoder"], num_experts=8)
    module = LanguageModule(net, moe=TOP2, losses=[partial(kind, devices=4)], vocab_size=V)
    found = measured(module)
    for shrink in (prune, merge):
        with pytest.raises(
            ValueError, match=f"6 experts cannot be shared out to the 4 devices of the loss {kind.__name__}"
        ):
            shrink(module, 6, found)
    prune(module, 4, found).training_step(batches(module)[0], 0)


def test_a_merged_row_of_the_router_is_the_mean_by_usage() -> None:
    module = module_of()
    found = measured(module)
    made = merge(module, 2, found)
    for use, old, new in zip(found.layers, layers(module), layers(made), strict=True):
        group = groups_of(use.alike, use.load, 2).tolist()
        for number in range(2):
            members = [e for e in range(E) if group[e] == number]
            total = sum(float(use.load[e]) for e in members)
            row = sum(old.router.weight[e].double() * float(use.load[e]) / total for e in members)
            assert torch.allclose(new.router.weight[number].double(), row, atol=1e-6)


@pytest.mark.parametrize("how", ["mean", "usage", "most_used", "aligned"])
@pytest.mark.parametrize("net", NETS)
def test_dense_of_equal_experts_computes_the_same(net: str, how: str) -> None:
    module = module_of(net)
    equal_experts(module, shuffled=how in ("most_used", "aligned"))
    found = measured(module)
    made = to_dense(module, found, how=how)
    assert not made.sparse_layers
    assert not made.losses
    assert change(module, made).logits < 1e-5
    assert loss(made) == pytest.approx(found.loss, abs=1e-6)


def test_dense_and_sparse_and_dense_again() -> None:
    torch.manual_seed(3)
    net = partial(Decoder, d_model=D, num_layers=2, num_heads=2, d_ff=[F, 20], context=24, sparse=[], norm="rms")
    gated = partial(FeedForward, gated=True, activation="silu", init_scale=0.3)
    module = LanguageModule(partial(net, feed_forward=gated), vocab_size=V, losses=[])
    back = to_dense(upcycle(module, sparse=[1], num_experts=3), assumed(upcycle(module, sparse=[1], num_experts=3)))
    for name, tensor in module.state_dict().items():
        assert torch.allclose(back.state_dict()[name], tensor, atol=1e-6), name
    first, last = (made.spec["init_args"]["net"]["init_args"]["feed_forward"] for made in (module, back))
    assert first == last


def test_shared_experts_stand_beside_the_merged_one() -> None:
    module = module_of(moe=partial(TOP2, experts=partial(Shared, experts=Mlp, width=7)))
    made = to_dense(module, measured(module))
    assert made.net.d_ff == (F, F + 7, F)


def test_granularity_is_gone() -> None:
    module = module_of(moe=partial(TOP2, granularity=2))
    made = prune(module, 3, measured(module))
    assert [(layer.num_experts, layer.d_ff) for layer in layers(made)] == [(3, F // 2)]


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda m, f: prune(m, E, f), "5 experts cannot be left of the 5 of blocks.1.mlp: at least 2"),
        (lambda m, f: prune(m, 1, f), "1 experts cannot be left"),
        (lambda m, f: prune(m, 2, f, by="luck"), "by must be 'usage', 'weight' or 'similarity'; got 'luck'"),
        (lambda m, f: merge(m, 2, f, how="sum"), "how must be"),
    ],
)
def test_what_is_impossible_is_refused(call, why: str) -> None:
    module = module_of()
    with pytest.raises(ValueError, match=why):
        call(module, measured(module))


def test_models_that_cannot_shrink_are_refused() -> None:
    dense = LanguageModule(partial(NETS["decoder"], sparse=[]), vocab_size=V)
    with pytest.raises(ValueError, match="dense already"):
        to_dense(dense, Measured((), None))
    mixed = module_of(moe=partial(TOP2, experts=GatedMlp))
    with pytest.raises(ValueError, match="several kinds \\(relu, silu gated\\)"):
        to_dense(mixed, measured(mixed))


class Squared(FeedForward):
    """Dense layers of one's own: of the same weights it computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu().square())


def test_dense_layers_of_a_class_of_ones_own_are_not_replaced() -> None:
    net = partial(NETS["decoder"], sparse=[1], feed_forward=Squared)
    module = LanguageModule(net, moe=TOP2, vocab_size=V)
    with pytest.raises(ValueError, match="blocks.0.mlp is a Squared, another kind of dense layer"):
        to_dense(module, measured(module))


@pytest.mark.parametrize(
    ("moe", "counts", "why"),
    [
        (partial(MoELayer, router=Hash), [3], "Hash holds nothing for each expert"),
        (partial(TOP2, experts=Null), [3, None], "kind Null cannot be taken apart"),
        (partial(TOP2, experts=partial(Mlp, bias=True)), [None], "these experts have biases"),
        (partial(TOP2, experts=partial(Shared, experts=Mlp, width=7, mix="gate")), [None], "with mix='gate' are"),
    ],
    ids=["router", "kind", "bias", "gate"],
)
def test_what_cannot_be_made_is_known_before_anything_is_measured(
    moe: partial, counts: list[int | None], why: str
) -> None:
    for count in counts:
        with pytest.raises(ValueError, match=why):
            check_shrinks(module_of(moe=moe), count)


@pytest.mark.parametrize("router", [Hash, Random, RoundRobin])
def test_routers_that_choose_by_number_are_refused(router: type) -> None:
    """Expert 5 of eight would be number 1 of those that stay, with the symbols of another."""
    module = module_of(moe=partial(MoELayer, router=router))
    found = measured(module)
    for call in (prune, merge):
        with pytest.raises(ValueError, match=f"{router.__name__} holds nothing for each expert"):
            call(module, 3, found)
    assert not to_dense(module, found).sparse_layers


def test_routers_whose_state_has_no_rows_are_refused() -> None:
    module = module_of(moe=partial(MoELayer, router=partial(Hash, table="balanced", vocab_size=V)))
    with pytest.raises(ValueError, match="the router Hash holds 'table', which cannot be told apart by expert"):
        prune(module, 3, measured(module))
