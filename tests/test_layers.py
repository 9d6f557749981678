"""The sparse layer's own options, and the blocks around it. What its parts must keep is in the contract."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import oracle
import pytest
import torch
from properties import EXACT, Case, run
from shapes import unchecked
from torch import Tensor, nn

from switchkit import (
    CapacityPolicy,
    Cosine,
    Dropless,
    Einsum,
    ExpertChoice,
    Experts,
    Factor,
    GatedMlp,
    Hash,
    Linear,
    Mlp,
    MoELayer,
    NoisyTopK,
    NoTokenLeftBehind,
    Router,
    Rows,
    Soft,
    Sorted,
    Switch,
    TopK,
)
from switchkit.attention import Attention, rotate
from switchkit.blocks import Block
from switchkit.layers import FeedForward, moe_layers
from switchkit.routing.base import token_choice


def test_defaults() -> None:
    layer = MoELayer(8, 4, d_ff=6)
    parts = (layer.router, layer.capacity, layer.experts, layer.dispatcher)
    assert tuple(type(part) for part in parts) == (Switch, Dropless, Mlp, Sorted)
    assert (layer.group, layer.dropped, layer.leaks) == ("sequence", "zero", None)


def test_each_layer_has_parts_of_its_own() -> None:
    factory = partial(MoELayer, 8, 4, d_ff=6, router=partial(TopK, k=2), capacity=Factor)
    first, second = factory(), factory()
    assert first.router is not second.router
    assert first.capacity is not second.capacity


def test_the_sparse_layers_of_a_model_by_name() -> None:
    """Wherever they stand, dense ones left out, one that stands in two places once."""
    one, inner, shared = (MoELayer(8, 2, d_ff=4) for _ in range(3))
    net = nn.ModuleDict({"b": shared, "dense": FeedForward(8, 4), "a": nn.Sequential(one, shared), "c": nn.Module()})
    net["c"].wrapped = inner
    assert list(moe_layers(net).items()) == [("b", shared), ("a.0", one), ("c.wrapped", inner)]
    assert moe_layers(one) == {"": one}
    assert moe_layers(net["dense"]) == {}


def test_a_routers_k_is_what_capacity_is_asked_with() -> None:
    asked = []

    class Spy(CapacityPolicy):
        def limit(self, S, E, K, *, training):
            asked.append((S, E, K, training))

    layer = MoELayer(8, 4, d_ff=6, router=partial(TopK, k=3), capacity=Spy, group=5)
    layer(torch.randn(2, 4, 8))
    layer.eval()(torch.randn(2, 4, 8))
    assert asked == [(5, 4, 3, True), (5, 4, 3, False)]


def test_shared_experts_are_mixed_in_once_after_the_routed_ones() -> None:
    """An expert that is always on: its output goes to every token, dropped ones included."""

    class WithShared(Mlp):
        def __init__(self, d_model: int, d_ff: int, num_experts: int) -> None:
            super().__init__(d_model, d_ff, num_experts)
            self.shared = FeedForward(d_model, d_ff)

        def always(self, x: Tensor) -> Tensor:
            return self.shared(x)

        def mix(self, routed: Tensor, always: Tensor, x: Tensor) -> Tensor:
            return 0.5 * routed + 0.25 * always

    layer = MoELayer(8, 4, d_ff=6, experts=WithShared, capacity=partial(Factor, 0.3, 0.3)).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    y, routing = layer(x)
    assert not routing.kept.all()
    alone = MoELayer(8, 4, d_ff=6, experts=Mlp, capacity=partial(Factor, 0.3, 0.3)).double()
    alone.experts.load_state_dict({name: getattr(layer.experts, name) for name in ("w1", "w2")})
    expected = 0.5 * oracle.outputs(alone, x, routing) + 0.25 * layer.experts.shared(x)
    oracle.assert_same({"y": y}, {"y": expected}, EXACT)


class ById(Router):
    """Routes by the token's id alone."""

    needs_ids = True

    def forward(self, tokens, limit, valid, ids=None):
        expert = (ids % self.num_experts).unsqueeze(-1)
        logits = torch.zeros(*tokens.shape[:2], self.num_experts, dtype=tokens.dtype)
        weight = torch.ones_like(expert, dtype=tokens.dtype)
        return token_choice(logits, logits.softmax(-1), expert, weight, valid)


@pytest.mark.parametrize("group", ["sequence", "batch", 4])
def test_ids_are_grouped_as_tokens_are(group: str | int) -> None:
    layer = MoELayer(8, 4, d_ff=6, router=ById, group=group)
    ids = torch.randint(0, 100, (3, 5))
    _, routing = layer(torch.randn(3, 5, 8), None, ids)
    chosen = routing.expert[routing.chosen]
    assert chosen.tolist() == [int(i) % 4 for i in ids.flatten()]


@pytest.mark.parametrize(("group", "shape"), [(4, (3, 4)), (5, (3, 5)), (6, (2, 6)), (12, (1, 12)), (13, (1, 13))])
def test_there_are_as_many_groups_as_tokens_fill(group: int, shape: tuple[int, int]) -> None:
    _, routing = MoELayer(8, 4, d_ff=6, group=group)(torch.randn(3, 4, 8))
    assert routing.valid.shape == shape
    assert routing.valid.flatten().tolist() == [True] * 12 + [False] * (routing.valid.numel() - 12)


def test_granularity_cuts_experts_into_pieces() -> None:
    layer = MoELayer(8, 4, d_ff=6, granularity=3, router=partial(TopK, k=6))
    assert (layer.num_experts, layer.d_ff, layer.router.num_experts) == (12, 2, 12)
    assert sum(p.numel() for p in layer.experts.parameters()) == 4 * 2 * 8 * 6
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=f"granularity must be at least 1 and divide d_ff=6; got {wrong}"):
            MoELayer(8, 4, d_ff=6, granularity=wrong)


def test_no_valid_means_all_are_real() -> None:
    case = Case(k=2)
    layer, (x, _, _) = case.layer(), case.inputs()
    ones = torch.ones(x.shape[:2], dtype=torch.bool)
    assert torch.equal(run(layer, x)[0], run(layer, x, ones)[0])


@pytest.mark.parametrize("dropped", ["input", "weighted_input"])
@pytest.mark.parametrize("training", [True, False])
def test_groups_of_one_token_bring_back_what_was_dropped(dropped: str, training: bool) -> None:
    """As in generation, token by token, of several sequences at once."""
    layer = MoELayer(8, 4, d_ff=6, router=partial(TopK, k=2), dropped=dropped).train(training)
    x = torch.randn(3, 1, 8)
    valid = torch.tensor([[True], [False], [True]])
    y, _ = layer(x, valid)
    alone = torch.cat([layer(x[[0]])[0], torch.zeros(1, 1, 8), layer(x[[2]])[0]])
    torch.testing.assert_close(y, alone)


def test_a_dropped_choice_comes_back_with_its_own_weight() -> None:
    """Not with its weight over that of the kept ones, which may be many times the token."""

    class Nothing(Experts):
        def forward(self, rows):
            return torch.zeros_like(rows.x)

    build = partial(MoELayer, 8, 4, d_ff=6, router=partial(TopK, k=2, normalize="after"), experts=Nothing)
    free, tight = build(), build(capacity=partial(Factor, train=0.3), dropped="weighted_input")
    tight.router.load_state_dict(free.router.state_dict())
    x = torch.randn(1, 9, 8)
    y, r = tight(x)
    weight = free(x)[1].weight.masked_fill(r.kept, 0).view(1, 9, 2).sum(-1, keepdim=True)
    torch.testing.assert_close(y, weight * x)


def test_a_random_order_is_for_training() -> None:
    """Where capacity binds in evaluation too, it is served by arrival there, and all of it is certain."""
    layer = MoELayer(8, 4, d_ff=6, capacity=partial(Factor, 0.5, 0.5, order="random"))
    x = torch.randn(2, 40, 8)
    kept = [layer.train()(x)[1].kept for _ in range(2)]
    assert not torch.equal(*kept)
    by_arrival = MoELayer(8, 4, d_ff=6, capacity=partial(Factor, 0.5, 0.5))
    by_arrival.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x)[1].kept, by_arrival.eval()(x)[1].kept)


@pytest.mark.parametrize("router", [Switch, partial(TopK, k=2)])
@pytest.mark.parametrize("dropped", ["zero", "input"])
def test_valid_may_lie_in_memory_as_it_likes(router: object, dropped: str) -> None:
    layer = MoELayer(8, 4, d_ff=6, router=router, capacity=partial(Factor, 0.5), dropped=dropped)
    x, real = torch.randn(3, 5, 8), torch.arange(5) < 3
    for valid in (real.expand(3, 5), real.expand(3, 5).t().contiguous().t()):
        torch.testing.assert_close(layer(x, valid)[0], layer(x, valid.contiguous())[0])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("router", [Switch, Cosine, NoisyTopK, Soft])
def test_the_meta_device_knows_the_shapes(router: type[Router]) -> None:
    layer = MoELayer(8, 4, d_ff=6, router=router, experts=GatedMlp).to("meta")
    y, routing = layer(torch.empty(2, 5, 8, device="meta"))
    y.sum().backward()
    assert (y.shape, routing.probs.shape) == ((2, 5, 8), (2, 5, 4))
    assert layer.experts.w1.grad.is_meta


def test_a_printed_layer_says_its_sizes_and_options() -> None:
    class Own(TopK):
        def __init__(self, *sizes: int, temperature: float = 2.0, **more: Any) -> None:
            super().__init__(*sizes, **more)
            self.temperature = temperature

    layer = MoELayer(8, 4, d_ff=16, router=partial(TopK, jitter=0.1), capacity=partial(Factor, train=1.0), group=64)
    told = repr(layer)
    for part in (
        "d_model=8, num_experts=4, d_ff=16, group=64, capacity=Factor, dispatcher=Sorted",
        "(router): TopK(d_model=8, num_experts=4, jitter=0.1, k=2,",
        "(experts): Mlp(d_model=8, d_ff=16, num_experts=4,",
    ):
        assert part in told, told
    assert "Own(d_model=8, num_experts=4, k=3, normalize='never', top_groups=1, temperature=1.5)" in repr(
        Own(8, 4, k=3, normalize="never", temperature=1.5)
    )


def test_leaks_are_those_of_the_parts() -> None:
    class Open(Switch):
        leaks = "looks ahead"

    class Greedy(Dropless):
        def leaks(self, k: int) -> str | None:
            return f"serves the best of {k} first"

    assert MoELayer(8, 4, d_ff=6, router=Open).leaks == "looks ahead"
    assert MoELayer(8, 4, d_ff=6, capacity=Greedy).leaks == "serves the best of 1 first"
    late = partial(MoELayer, 8, 4, d_ff=6, capacity=partial(Factor, order="first_choices"))
    assert late().leaks is None
    assert "second choices" in late(router=TopK).leaks


def test_one_bad_token_stays_alone_in_sorted() -> None:
    """NaN in one real token reaches no other token of a dropless layer (an einsum would spread it: 0 * NaN)."""
    layer = MoELayer(8, 4, d_ff=6, router=partial(TopK, k=2)).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected, _ = layer(x)
    x[1, 2] = float("nan")
    y, _ = layer(x)
    assert y[1, 2].isnan().all()
    y = y.index_put((torch.tensor(1), torch.tensor(2)), expected[1, 2])
    oracle.assert_same({"y": y}, {"y": expected}, EXACT)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"group": "tokens"}, "group must be 'sequence', 'batch' or a number of tokens >= 1; got 'tokens'"),
        ({"group": 0}, "got 0"),
        ({"group": -3}, "got -3"),
        ({"dropped": "copy"}, "dropped must be 'zero', 'input' or 'weighted_input'; got 'copy'"),
        ({"router": partial(TopK, k=9)}, "k must be from 1 to num_experts=4"),
        ({"d_ff": 0}, "d_ff must be at least 1; got 0"),
        ({"d_ff": 6.0}, "d_ff must be an integer; got 6.0"),
        ({"num_experts": 4.0}, "num_experts must be an integer; got 4.0"),
        ({"granularity": "2"}, "granularity must be an integer; got '2'"),
    ],
)
def test_bad_options_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        MoELayer(**{"d_model": 8, "num_experts": 4, "d_ff": 6, **options})
    assert says in str(caught.value)


# Shapes are the layer's own business here, so without the checks of `shapes.py`.
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("x", "valid", "says"),
    [
        ((2, 5, 7), None, "x must be [B, S, 8] (d_model=8); got [2, 5, 7]"),
        ((5, 8), None, "got [5, 8]"),
        ((2, 5, 8), torch.ones(2, 4, dtype=torch.bool), "valid must be a bool tensor of shape [2, 5]"),
        ((2, 5, 8), torch.ones(2, 5), "True for real tokens; got torch.float32 of [2, 5]"),
        ((2, 5, 8), torch.ones(2, 5, dtype=torch.long), "got torch.int64 of [2, 5]"),
    ],
)
def test_bad_inputs_are_refused(x: tuple[int, ...], valid: Tensor | None, says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        MoELayer(8, 4, d_ff=6)(torch.zeros(x), valid)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(1, 5, dtype=torch.long),
        torch.zeros(5, dtype=torch.long),
        torch.zeros(5, 3, dtype=torch.long),
        torch.zeros(3, 5),
        torch.zeros(3, 5, dtype=torch.bool),
    ],
    ids=lambda ids: f"{ids.dtype}-{list(ids.shape)}",
)
@pytest.mark.parametrize("group", ["sequence", "batch", 4])
def test_ids_of_another_shape_or_type_are_refused(ids: torch.Tensor, group: str | int) -> None:
    """Each of them would be broadcast, or cast, and route the tokens by the ids of others."""
    layer = MoELayer(8, 4, d_ff=8, router=Hash, group=group)
    says = f"ids must be an integer tensor of shape [3, 5], the token ids; got {ids.dtype} of {list(ids.shape)}"
    with unchecked(), pytest.raises(ValueError, match=re.escape(says)):
        layer(torch.zeros(3, 5, 8), None, ids)
    layer(torch.zeros(3, 5, 8), None, torch.zeros(3, 5, dtype=torch.int32))


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"router": TopK(8, 4)}, "router=TopK or router=partial(TopK, ...); got an instance of TopK"),
        ({"router": "top_k"}, "router=TopK or router=partial(TopK, ...); got the name 'top_k'"),
        ({"router": "best"}, "router=MyOwnRouter or router=partial(MyOwnRouter, ...); got the name 'best'"),
        ({"capacity": Factor(1.0)}, "capacity=Factor or capacity=partial(Factor, ...); got an instance of Factor"),
        ({"experts": Mlp(8, 8, 4)}, "experts=Mlp or experts=partial(Mlp, ...); got an instance of Mlp"),
        ({"dispatcher": Sorted()}, "dispatcher=Sorted or dispatcher=partial(Sorted, ...); got an instance of Sorted"),
        ({"capacity": 1.25}, "capacity=MyOwnCapacityPolicy or"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_a_part_in_place_of_what_builds_it_is_refused(part: dict, says: str) -> None:
    with pytest.raises(ValueError, match="must be what builds a .*, so that each layer has its own") as caught:
        MoELayer(8, 4, d_ff=8, **part)
    assert says in str(caught.value)


class Fraction(Switch):
    k = 1.5


class Pair(Switch):
    def forward(self, *given: object) -> object:
        routing = super().forward(*given)
        return routing.expert, routing.weight


class Unrounded(CapacityPolicy):
    def limit(self, S: int, E: int, K: int, *, training: bool) -> float:
        return 1.25 * S * K / E


class Narrow(Mlp):
    def forward(self, rows: Rows) -> Tensor:
        return super().forward(rows)[..., :2]


class Nothing(Mlp):
    def forward(self, rows: Rows) -> None:
        super().forward(rows)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("dispatcher", [Sorted, Einsum])
@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"router": Fraction}, "Fraction.k must be an integer; got 1.5"),
        ({"router": Pair}, "Pair.forward must return a Routing, as token_choice makes one; got tuple"),
        ({"capacity": Unrounded}, "Unrounded.limit must return an integer or None; got 2.5"),
        ({"experts": Narrow}, "Narrow.forward must return an output for each row, of shape"),
        ({"experts": Nothing}, "as rows.x is; got NoneType"),
    ],
)
def test_parts_that_return_something_else_are_told(part: dict, says: str, dispatcher: object) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        MoELayer(6, 4, d_ff=6, dispatcher=dispatcher, **part)(torch.randn(2, 8, 6))


def test_a_router_that_needs_ids_says_so() -> None:
    with pytest.raises(ValueError, match="ById routes by token ids: call layer"):
        MoELayer(8, 4, d_ff=6, router=ById)(torch.zeros(1, 2, 8))


def test_feed_forward_is_one_expert() -> None:
    dense, experts = FeedForward(8, 6).double(), Mlp(8, 6, 1).double()
    dense.up.weight.data.copy_(experts.w1[0].t())
    dense.down.weight.data.copy_(experts.w2[0].t())
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    expected = torch.stack([oracle.one_expert(experts, 0, token) for token in x.flatten(0, 1)]).view_as(x)
    oracle.assert_same({"y": dense(x)}, {"y": expected}, EXACT)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_a_loop_over_pairs(padded: bool) -> None:
    """softmax of q k / sqrt(d) over the real tokens up to one's own place, per head."""
    attention = Attention(8, 2).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    valid = torch.tensor([[True] * 5, [False, True, True, True, False]]) if padded else None
    y, _, _ = attention(x, valid)
    q, k, v = attention.qkv(x).split(8, dim=-1)
    expected = torch.zeros_like(x)
    for b in range(2):
        for t in range(5):
            seen = [s for s in range(t + 1) if valid is None or valid[b, s] or s == t]
            for head in (slice(0, 4), slice(4, 8)):
                scores = torch.stack([(q[b, t, head] * k[b, s, head]).sum() / 2 for s in seen]).softmax(0)
                expected[b, t, head] = sum(p * v[b, s, head] for p, s in zip(scores, seen, strict=True))
    oracle.assert_same({"y": y}, {"y": attention.out(expected)}, EXACT)


@pytest.mark.parametrize("padded", [False, True])
def test_sparse_projections_with_equal_experts_are_matrices(padded: bool) -> None:
    """Each of queries, keys and values: the token's probability times its one matrix; three records, in this order."""
    layer = partial(MoELayer, 8, 4, d_ff=8, experts=Linear)
    sparse, dense = Attention(8, 2, projection=layer).double(), Attention(8, 2).double()
    dense.out.load_state_dict(sparse.out.state_dict())
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    valid = torch.tensor([[True] * 5, [True, True, True, False, False]]) if padded else None
    parts = []
    for projection in sparse.qkv:
        with torch.no_grad():
            projection.experts.weight.copy_(projection.experts.weight[:1].expand(4, 8, 8))
        best = torch.softmax(x @ projection.router.weight.t(), -1).amax(-1, keepdim=True)
        parts.append(best * (x @ projection.experts.weight[0]))
    dense.qkv = Fixed(torch.cat(parts, -1))
    y, routings, _ = sparse(x, valid)
    expected, none, _ = dense(x, valid)
    real = torch.ones(2, 5, dtype=torch.bool) if valid is None else valid
    oracle.assert_same({"y": y[real]}, {"y": expected[real]}, EXACT)
    assert (len(routings), none) == (3, ())
    for routing, projection in zip(routings, sparse.qkv, strict=True):
        again = projection(x, valid)[1]
        assert torch.equal(routing.expert, again.expert)


class Fixed(nn.Module):
    """Returns the same tensor whatever comes."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="num_heads=3 does not divide d_model=8: choose a divisor"):
        Attention(8, 3)


def test_a_block_adds_to_its_input() -> None:
    """With both sublayers silenced, nothing but the residual remains; the record comes from a sparse one only."""
    for mlp in (FeedForward(8, 6), MoELayer(8, 4, d_ff=6, dispatcher=Einsum)):
        block = Block(Attention(8, 2), mlp, 8)
        nn.init.zeros_(block.attention.out.weight)
        for name, parameter in mlp.named_parameters():
            if name in ("down.weight", "experts.w2"):
                nn.init.zeros_(parameter)
        x = torch.randn(2, 3, 8)
        y, routings, _ = block(x)
        assert torch.equal(y, x)
        assert len(routings) == isinstance(mlp, MoELayer)


def test_dropout_of_a_block_is_for_training() -> None:
    block = Block(Attention(8, 2, dropout=0.5), FeedForward(8, 6, dropout=0.5), 8, dropout=0.5)
    x = torch.randn(2, 3, 8)
    assert torch.equal(block.eval()(x)[0], block(x)[0])
    assert not torch.equal(block.train()(x)[0], block(x)[0])


class Says(nn.Module):
    """A sublayer that returns the same number whatever comes."""

    causal = True

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def key_values(self, memory: Tensor) -> Tensor:
        return memory

    def forward(self, x: Tensor, *given: object, **more: object) -> object:
        y = torch.full_like(x, self.value)
        return (y, (), None) if "past" in more else y


def test_dropout_of_a_block_falls_on_the_output_of_each_sublayer() -> None:
    """Three that say 1, 10 and 100: an entry gets twice the sum of those that were left to it, or of all of them."""
    block = Block(Says(1), Says(10), 8, cross=Says(100), dropout=0.5)
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    block.double()
    added = (block(x, memory=x)[0] - x).round().unique()
    assert added.tolist() == [0, 2, 20, 22, 200, 202, 220, 222]
    assert (block.eval()(x, memory=x)[0] - x).round().unique().tolist() == [111]


def test_rotary_positions_turn_pairs_as_complex_numbers() -> None:
    """Entries i and i + W/2 are one complex number; position p multiplies it by exp(1j * p * 10000 ** (-2 i / W))."""
    x = torch.randn(2, 5, 3, 8)
    half = torch.complex(x[..., :4], x[..., 4:])
    angle = torch.arange(5.0).view(-1, 1) * 10_000 ** (-2 * torch.arange(4.0) / 8)
    turned = half * torch.exp(1j * angle).view(5, 1, 4)
    torch.testing.assert_close(rotate(x), torch.cat([turned.real, turned.imag], -1))


def test_rotary_attention_knows_distances_only() -> None:
    """The same tokens three places later attend to each other as before; with one position swapped they do not."""
    torch.manual_seed(0)
    attention = Attention(8, 2, rotary=True).double()
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    later = torch.cat([torch.randn(1, 3, 8, dtype=torch.float64), x], 1)
    valid = torch.tensor([[False] * 3 + [True] * 7])
    y, _, _ = attention(x)
    oracle.assert_same({"y": attention(later, valid)[0][:, 3:]}, {"y": y}, EXACT)
    swapped = x[:, [1, 0, 2, 3, 4, 5, 6]]
    assert (attention(swapped)[0][:, 6] - y[:, 6]).abs().max() > 1e-4


def test_rotary_positions_need_heads_of_even_width() -> None:
    with pytest.raises(ValueError, match="heads of even width; got 3"):
        Attention(6, 2, rotary=True)


@pytest.mark.parametrize("router", [ExpertChoice, Soft])
@pytest.mark.parametrize(
    ("capacity", "told"),
    [
        (partial(Factor, order="probability"), "order='probability'"),
        (partial(NoTokenLeftBehind, rounds=2), "rounds=2"),
    ],
    ids=["factor", "overflow"],
)
def test_who_is_served_is_not_said_twice(router: type[Router], capacity: Any, told: str) -> None:
    """Where experts choose, no token queues: order and rounds had no effect, and nobody heard of it."""
    with pytest.raises(ValueError, match=f"{told} does nothing with {router.__name__}, .* take the capacity factor"):
        MoELayer(8, 4, d_ff=8, router=router, capacity=capacity)
    MoELayer(8, 4, d_ff=8, router=router, capacity=partial(Factor, train=1.0))
