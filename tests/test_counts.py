"""Operations and parameters against formulas written here, and against what torch counts while the model runs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from switchkit import (
    Attention,
    Decoder,
    EncoderDecoder,
    ExpertChoice,
    Experts,
    Factor,
    FeedForward,
    GatedMlp,
    LatentAttention,
    Linear,
    Mixed,
    Mlp,
    MoELayer,
    Null,
    RoundRobin,
    Router,
    Rows,
    Shared,
    Soft,
    TopK,
    named,
)
from switchkit.counts import Counts, buffered, count, products
from switchkit.experts.grouped import grouped_linear

V, D, H, F, E, S = 11, 16, 2, 24, 4, 8
TWO = partial(TopK, k=2)
EVEN = partial(RoundRobin, k=2)


def decoder(moe: Any = None, **more: Any) -> Decoder:
    sizes = {"d_model": D, "num_layers": 3, "num_heads": H, "d_ff": F, "num_experts": E, "context": S}
    return Decoder(V, moe=moe, **{"sparse": [0, 2], **sizes, **more})


def both(moe: Any = None, **more: Any) -> EncoderDecoder:
    sizes = {"d_model": D, "encoder_layers": 2, "decoder_layers": 1, "num_heads": H, "d_ff": F, "num_experts": E}
    return EncoderDecoder(V, moe=moe, **{"sparse": [0], **sizes, **more})


def layer(**parts: Any) -> Any:
    return partial(MoELayer, **parts)


def run(model: nn.Module) -> int:
    """What torch counts of one token: in float64 experts take the loop, which it sees; it misses grouped products."""
    tokens = torch.randint(V, (2, S))
    given = {"source": tokens} if isinstance(model, EncoderDecoder) else {}
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.eval().double()(tokens, **given)
    found = counter.get_total_flops()
    assert found % tokens.numel() == 0
    return int(found // tokens.numel())


class LowRank(Experts):
    """One base for all experts, and to each a product of rank 3 of its own; or experts in a list of modules."""

    def __init__(self, d_model: int, d_ff: int, num_experts: int, *, listed: bool = False) -> None:
        super().__init__(d_model, d_ff, num_experts)
        self.base = None if listed else nn.Linear(d_model, d_model)
        self.listed = nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(num_experts if listed else 0))
        self.down = nn.Parameter(torch.zeros(num_experts, d_model, 3))
        self.up = nn.Parameter(torch.zeros(num_experts, 3, d_model))

    def forward(self, rows: Rows) -> Tensor:
        low = grouped_linear(grouped_linear(rows.x, rows, self.down), rows, self.up)
        if self.base is not None:
            return low + self.base(rows.x)
        parts = rows.x.split(rows.load.tolist())
        return low + torch.cat([one(part) for one, part in zip(self.listed, parts, strict=True)])


# Multiply-adds of a token, by hand: (experts, router and gates) of one sparse layer.
MLP, GATED = 2 * D * F, 3 * D * F
LAYERS = {
    "one": (layer(), MLP, E * D),
    "two": (layer(router=TWO), 2 * MLP, E * D),
    "gated": (layer(router=TWO, experts=GatedMlp), 2 * GATED, E * D),
    "biases": (layer(router=TWO, experts=partial(Mlp, bias=True)), 2 * MLP, E * D),
    "cut in four": (layer(router=partial(TopK, k=8), granularity=4), 8 * MLP // 4, 4 * E * D),
    "shared": (layer(router=TWO, experts=Shared), 3 * GATED, E * D),
    "two shared, narrow": (layer(experts=partial(Shared, experts=Mlp, num_shared=2, width=5)), MLP + 2 * D * 10, E * D),
    "shared with biases": (layer(experts=partial(Shared, experts=partial(Mlp, bias=True))), 2 * MLP, E * D),
    "shared, gate": (layer(router=TWO, experts=partial(Shared, mix="gate")), 3 * GATED, E * D + D),
    "shared, learned": (layer(router=TWO, experts=partial(Shared, mix="learned")), 3 * GATED, E * D + 2 * D),
    "mixed, even load": (layer(router=EVEN, experts=partial(Mixed, widths=[[1, 4], [3, 12]])), D * (4 + 3 * 12), 0),
    "null, even load": (layer(router=EVEN, experts=partial(Null, zero=1, copy=1)), 2 * MLP * 2 // 4, 0),
    "constant, even load": (layer(router=EVEN, experts=partial(Null, zero=0, copy=0, constant=1)), MLP * 3 // 2, 4 * D),
    "linear": (layer(router=TWO, experts=Linear), 2 * D * D, E * D),
    "low rank": (layer(router=TWO, experts=LowRank), 2 * (D * D + 2 * 3 * D), E * D),
    "modules": (layer(router=TWO, experts=partial(LowRank, listed=True)), 2 * (D * D + 2 * 3 * D), E * D),
    "expert choice": (layer(router=ExpertChoice, capacity=None), 2 * MLP, E * D),
    "expert choice, one and a half": (layer(router=partial(ExpertChoice, capacity_factor=1.5)), MLP * 3 // 2, E * D),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())
def test_sparse_layers_in_a_decoder(case: tuple[Any, int, int]) -> None:
    moe, experts, router = case
    model = decoder(moe, allow_leak=True)
    found = count(model, S)
    rest = 3 * (4 * D * D) + MLP + V * D
    attention = 3 * 2 * S * D
    assert found.matched == 2 * (rest + attention + 2 * experts)
    assert found.routers == 2 * 2 * router
    assert found.attention == 2 * attention
    assert run(model) == found.flops


def test_what_experts_share_is_active_once() -> None:
    shared, listed = (count(decoder(layer(router=TWO, experts=partial(LowRank, listed=x))), S) for x in (False, True))
    one = 2 * 3 * D
    assert shared.parameters - shared.active == 2 * (E - 2) * one
    assert listed.parameters - listed.active == 2 * (E - 2) * (one + D * D + D)


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())
def test_sparse_layers_in_an_encoder_decoder(case: tuple[Any, int, int]) -> None:
    moe, experts, router = case
    model = both(moe, allow_leak=True)
    found = count(model, S)
    # Three blocks with attention to themselves, one with attention to the source too; an encoder's block is dense.
    rest = 4 * (4 * D * D) + MLP + V * D
    attention = 4 * 2 * S * D
    assert found.matched == 2 * (rest + attention + 2 * experts)
    assert found.routers == 2 * 2 * router
    assert run(model) == found.flops


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            decoder(norm="rms", tied=False, feed_forward=partial(FeedForward, gated=True),
                    attention=partial(Attention, num_kv_heads=1, head_width=6, qk_norm="head", bias=True)),
            3 * (D * 4 * 6 + 12 * D + 2 * S * 12) + GATED + 2 * (MLP + E * D) + V * D,
        ),
        (
            decoder(attention=partial(LatentAttention, kv_rank=6, nope_width=3, rope_width=4, v_width=5)),
            3 * (D * 14 + D * 10 + 6 * H * 8 + 10 * D + S * (14 + 10)) + MLP + 2 * (MLP + E * D) + V * D,
        ),
        (
            decoder(attention=partial(LatentAttention, kv_rank=6, nope_width=3, rope_width=4, v_width=5, q_rank=7)),
            3 * (D * 7 + 7 * 14 + D * 10 + 6 * H * 8 + 10 * D + S * (14 + 10)) + MLP + 2 * (MLP + E * D) + V * D,
        ),
        (
            decoder(sparse_attention=[1]),
            3 * (4 * D * D + 2 * S * D) + 3 * E * D + MLP + 2 * (MLP + E * D) + V * D,
        ),
        (
            decoder(sparse_attention=[1, 2], attention_moe=layer(router=TWO, experts=Linear)),
            3 * (4 * D * D + 2 * S * D) + 2 * (3 * D * D + 3 * E * D) + MLP + 2 * (MLP + E * D) + V * D,
        ),
        (
            decoder(d_ff=[4, 8, 12], sparse=[1], expert_d_ff=5, positions="learned"),
            3 * (4 * D * D + 2 * S * D) + 2 * D * (4 + 12 + 5) + E * D + V * D,
        ),
        (
            both(head_width=6, tied=False, d_ff=[4, 8], decoder_d_ff=12, decoder_sparse=[]),
            4 * (4 * D * 12 + 2 * S * 12) + 2 * D * (4 + 8 + 12) + E * D + V * D,
        ),
    ],
    ids=["llama", "latent", "latent queries", "sparse attention", "two in attention", "widths", "sides"],
)  # fmt: skip
def test_models_by_hand(model: nn.Module, expected: int) -> None:
    assert count(model, S).flops == 2 * expected
    assert run(model) == 2 * expected


@pytest.mark.parametrize("name", sorted(set(named(Router)) - {"relu"}))
def test_every_router(name: str) -> None:
    """Without `relu`, whose cost is not known beforehand."""
    router = named(Router)[name]
    if not router.__module__.startswith("switchkit."):
        pytest.skip("of another test")
    model = decoder(layer(router=router), allow_leak=True)
    assert run(model) == count(model, S).flops


def test_slots_are_as_many_for_any_length() -> None:
    found = count(decoder(layer(router=partial(Soft, slots=3)), allow_leak=True), S)
    assert found.experts == 2 * 2 * MLP * E * 3 // S
    assert found.routers == 2 * 2 * 3 * (E * 3 * D)


def test_experts_choose_whole_tokens() -> None:
    """Of 8 tokens with a factor of 1.2 each of 4 experts takes 3, and of 10 as well: more than 1.2 in the mean."""
    model = decoder(layer(router=partial(ExpertChoice, capacity_factor=1.2)), allow_leak=True)
    assert count(model, 8).experts == 2 * 2 * MLP * 12 // 8
    assert count(model, 10).experts == round(2 * 2 * MLP * 12 / 10)
    assert run(model) == count(model, S).flops


def test_active_parameters() -> None:
    sizes = [(p.numel(), "experts" in name) for name, p in decoder(layer(router=TWO)).named_parameters()]
    found = count(decoder(layer(router=TWO)), S)
    assert found.parameters == sum(size for size, _ in sizes)
    assert found.active == sum(size * 2 // E if routed else size for size, routed in sizes)


def test_full_buffers() -> None:
    """A factor of 1.5 holds 3 of 8 tokens for each of 4 experts; nothing holds more tokens than there are."""
    for capacity, rows in ((None, 8), (partial(Factor, train=1.5), 12), (partial(Factor, train=100.0), 32)):
        assert buffered(decoder(layer(capacity=capacity)), S) == 2 * 2 * MLP * rows // 8
    soft = decoder(layer(router=Soft, capacity=partial(Factor, train=1.5)), allow_leak=True)
    assert buffered(soft, S) == count(soft, S).experts


def test_all_but_routers_is_matched() -> None:
    found = Counts(parameters=1, active=1, experts=2, routers=30, attention=400, other=5000)
    assert (found.flops, found.matched) == (5432, 5402)


@pytest.mark.parametrize(("group", "rows"), [("sequence", 16 / 10), (8, 12 / 8)])
def test_experts_choose_among_the_tokens_of_their_group(group: Any, rows: float) -> None:
    """Four experts, each of ceil(10 * 1.5 / 4) = 4 tokens of a sequence of 10, or of ceil(8 * 1.5 / 4) = 3 of 8."""
    router = partial(ExpertChoice, capacity_factor=1.5)
    layer = MoELayer(6, 4, d_ff=5, router=router, group=group)
    assert products(layer, 10) == (pytest.approx(rows * 2 * 6 * 5), 0)
