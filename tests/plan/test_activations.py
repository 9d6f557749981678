"""What autograd keeps of a model, counted and measured: within 1 % of each other."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from switchkit import (
    Decoder,
    Einsum,
    EncoderDecoder,
    ExpertChoice,
    Factor,
    FeedForward,
    GatedMlp,
    Hash,
    LanguageModule,
    MoELayer,
    RoundRobin,
    Router,
    Routing,
    Shared,
    Sigmoid,
    Soft,
    Sorted,
    Switch,
    TopK,
)
from switchkit.attention import Attention, LatentAttention
from switchkit.bench.memory import saved_bytes
from switchkit.dispatch.padded import Padded
from switchkit.plan import PRECISIONS, activations
from switchkit.plan.activations import rows_of

BATCH, CONTEXT, VOCABULARY = 4, 32, 50
NET = partial(
    Decoder, d_model=64, num_layers=2, num_heads=4, d_ff=160, num_experts=8, context=CONTEXT, sparse="last(1)"
)
TOP2 = partial(MoELayer, router=partial(TopK, k=2))
LATENT = partial(LatentAttention, kv_rank=24, nope_width=16, rope_width=8, v_width=24, q_rank=32)

CASES: dict[str, tuple[Any, Any]] = {
    "dense": (partial(NET, sparse=[]), None),
    "gated": (
        partial(NET, sparse=[], feed_forward=partial(FeedForward, gated=True, activation="silu"), tied=False),
        None,
    ),
    "gelu": (partial(NET, sparse=[], feed_forward=partial(FeedForward, activation="gelu")), None),
    "switch": (NET, partial(MoELayer, router=Switch, capacity=partial(Factor, train=1.25))),
    "not learned": (NET, partial(MoELayer, router=partial(RoundRobin, k=2))),
    "hashed": (NET, partial(MoELayer, router=partial(Hash, k=2))),
    "many experts": (partial(NET, num_experts=64), TOP2),
    "gated experts": (NET, partial(TOP2, experts=GatedMlp)),
    "shared": (NET, partial(MoELayer, router=partial(Sigmoid, k=4), experts=partial(Shared, num_shared=2))),
    "grouped queries": (partial(NET, attention=partial(Attention, num_kv_heads=2), positions="learned"), TOP2),
    "sparse attention": (partial(NET, sparse_attention=[0]), TOP2),
    "einsum": (NET, partial(TOP2, dispatcher=Einsum, capacity=partial(Factor, train=1.25))),
    "einsum, not learned": (
        NET,
        partial(MoELayer, router=partial(RoundRobin, k=2), dispatcher=Einsum, capacity=partial(Factor, train=1.0)),
    ),
    "einsum over groups": (NET, partial(TOP2, dispatcher=Einsum, capacity=Factor, group=64)),
    "keys and queries normed": (partial(NET, attention=partial(Attention, qk_norm="whole")), TOP2),
}


def measured(net: Any, moe: Any, precision: str) -> int:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    module = LanguageModule(net, moe=moe, vocab_size=VOCABULARY).to(dtype)
    ids = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1))
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:]}

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False):
            out, learned, _ = module._learn(batch)
            return learned + sum(term.weight * term(out.routings) for term in module.losses if out.routings)

    return saved_bytes(forward, [*module.parameters(), *batch.values()])


def counted(net: Any, moe: Any, precision: str) -> int:
    with torch.device("meta"):
        model = net(vocab_size=VOCABULARY, moe=moe)
    return activations(model, BATCH, CONTEXT, PRECISIONS[precision]).kept(False)


@pytest.mark.parametrize("name", CASES)
def test_in_full_precision(name: str) -> None:
    assert counted(*CASES[name], "32-true") == pytest.approx(measured(*CASES[name], "32-true"), rel=0.01)


@pytest.mark.parametrize("name", ["dense", "gated experts", "shared"])
def test_in_half_precision(name: str) -> None:
    assert counted(*CASES[name], "bf16-true") == pytest.approx(measured(*CASES[name], "bf16-true"), rel=0.015)


def test_gated_shared_experts_keep_their_output() -> None:
    """More than those whose outputs are added."""
    summed, gated = ((NET, partial(TOP2, experts=partial(Shared, mix=mix))) for mix in ("sum", "gate"))
    more = measured(*gated, "32-true") - measured(*summed, "32-true")
    assert counted(*gated, "32-true") - counted(*summed, "32-true") == pytest.approx(more, rel=0.02)


def test_dropout_keeps_masks_of_a_byte() -> None:
    """As on a GPU (a CPU keeps four): behind attention and feed-forward layer, and between the products, of which the
    second has what was dropped as its input."""
    dense = partial(NET, num_layers=1, sparse=[])
    (plain,), (dropped,) = (
        activations(net(vocab_size=VOCABULARY), BATCH, CONTEXT, PRECISIONS["32-true"]).blocks
        for net in (dense, partial(dense, dropout=0.1, feed_forward=partial(FeedForward, dropout=0.1)))
    )
    assert dropped - plain == BATCH * CONTEXT * (2 * 64 + 160 * (4 + 1))


def test_records_and_the_loss_beside_what_is_kept() -> None:
    """Logits, and 40 bytes of each choice; the gradient of the logits, and in half precision the logits in full too."""
    net = partial(NET, sparse="every(1)")(vocab_size=VOCABULARY, moe=TOP2)
    full, half = (activations(net, BATCH, CONTEXT, PRECISIONS[name]) for name in ("32-true", "bf16-true"))
    tokens, choices, layers = BATCH * CONTEXT, 2, 2
    assert full.records == half.records == layers * tokens * (4 * 8 + 40 * choices)
    assert (full.loss, half.loss) == (tokens * VOCABULARY * 4, tokens * VOCABULARY * (2 + 4))
    assert full.most(False) == full.kept(False) + full.records + full.loss


def test_the_bias_of_positions_grows_with_the_square_of_the_context() -> None:
    """One for all sequences, of each head and block: half as many of twice the length have as many tokens."""
    net = EncoderDecoder(VOCABULARY, d_model=64, encoder_layers=2, num_heads=4, d_ff=160, sparse=[])
    one, other = (activations(net, 64 // size, size, PRECISIONS["32-true"]) for size in (16, 32))
    more = 4 * 4 * (32**2 - 16**2)
    assert [b - a for a, b in zip(one.blocks, other.blocks, strict=True)] == [more] * 4
    # Each side ends in a norm.
    assert one.output == other.output == 2 * 64 * (4 * 64 + 8) + 64 * 4 * (64 + VOCABULARY)


def test_autocast_keeps_copies_of_matrices() -> None:
    """Beside the activations: 2 bytes for each number of a matrix that a product takes."""
    model = NET(vocab_size=VOCABULARY, moe=TOP2)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "router" not in n)
    whole = counted(NET, TOP2, "bf16-mixed") + 2 * matrices
    assert whole == pytest.approx(measured(NET, TOP2, "bf16-mixed"), rel=0.01)


def test_rms_norms_without_a_kernel_keep_their_outputs_too() -> None:
    """On a CPU; a GPU has a kernel that keeps what is counted."""
    net = partial(NET, sparse=[], norm="rms")
    norms, latents = 5, 2
    more = 4 * norms * BATCH * CONTEXT * 64
    assert counted(net, None, "32-true") + more == pytest.approx(measured(net, None, "32-true"), rel=0.01)
    net = partial(NET, sparse=[], attention=LATENT)
    more = 4 * latents * BATCH * CONTEXT * (24 + 32)
    assert counted(net, None, "32-true") + more == pytest.approx(measured(net, None, "32-true"), rel=0.01)


def test_recomputed_blocks_keep_their_inputs() -> None:
    net = NET(vocab_size=VOCABULARY, moe=TOP2)
    found = activations(net, BATCH, CONTEXT, PRECISIONS["32-true"])
    stream = 4 * BATCH * CONTEXT * 64
    assert found.kept(True) == 2 * stream + found.output
    assert found.kept(False) == sum(found.blocks) + found.output
    # The largest block is whole while it is computed again.
    assert found.most(True) == found.kept(True) + found.records + max(found.loss, max(found.blocks))
    twice = activations(net, 2 * BATCH, CONTEXT, PRECISIONS["32-true"])
    assert twice == replace(found, **{name: _twice(getattr(found, name)) for name in vars(found)})


def _twice(value: Any) -> Any:
    return tuple(2 * each for each in value) if isinstance(value, tuple) else 2 * value


class FirstTokens(Router):
    """Every expert takes the first three tokens of a group."""

    leaks = "a token's experts depend on its place in the group"
    full = True

    def forward(self, tokens: Any, limit: Any, valid: Any, ids: Any = None) -> Routing:
        groups, size, _ = tokens.shape
        every = (groups, 3 * self.num_experts)
        logits = torch.zeros(groups, size, self.num_experts)
        place = torch.arange(every[1])
        chosen = valid.gather(1, (place % 3).expand(every))
        return Routing(
            logits=logits,
            probs=logits.softmax(-1),
            token=(place % 3).expand(every),
            expert=(place // 3).expand(every),
            weight=torch.ones(every),
            chosen=chosen,
            valid=valid,
            capacity=3,
            slot=(place % 3).expand(every),
            kept=chosen,
            load=chosen.view(groups, self.num_experts, 3).sum(-1),
        )

    def rows(self, size: int, limit: int | None) -> int:
        return self.num_experts * 3


def test_rows() -> None:
    def layer(**options: Any) -> MoELayer:
        return MoELayer(8, 4, d_ff=16, **options)

    top2 = partial(TopK, k=2)
    assert rows_of(layer(router=top2), 3, 10) == 60
    # Drops are not taken off, but buffers have no more places than their capacity: ceil(10 * 2 / 4 * 1.3) = 7.
    capacity = partial(Factor, train=1.3)
    assert rows_of(layer(router=top2, capacity=capacity), 3, 10) == 60
    assert rows_of(layer(router=top2, capacity=capacity, dispatcher=Padded), 3, 10) == 3 * 4 * 7
    # Without one each expert could get every choice.
    assert rows_of(layer(router=top2, dispatcher=Padded), 3, 10) == 3 * 4 * 20
    # Nor do they get more of a capacity than there are.
    assert rows_of(layer(router=top2, capacity=partial(Factor, train=100.0), dispatcher=Padded), 3, 10) == 3 * 4 * 20
    # Three groups of 16 tokens, the last one filled up.
    assert rows_of(layer(router=top2, group=16), 4, 10) == 3 * 32


@pytest.mark.parametrize("dispatcher", [Einsum, Padded, Sorted])
@pytest.mark.parametrize(("router", "each"), [(ExpertChoice, 5), (partial(Soft, slots=2), 2), (FirstTokens, 3)])
def test_full_experts_have_the_same_rows_with_any_dispatcher(router: Any, each: int, dispatcher: Any) -> None:
    """ceil(10 * 2 / 4) tokens of a sequence, or its slots; a router of one's own says that it fills its experts."""
    layer = MoELayer(8, 4, d_ff=16, router=router, dispatcher=dispatcher)
    tokens = torch.randn(3, 10, 8)
    computed = layer.dispatcher.dispatch(tokens, layer(tokens)[1]).x.flatten(0, -2)
    assert rows_of(layer, 3, 10) == len(computed) == 3 * 4 * each


def test_a_busy_device_has_more_rows() -> None:
    net = NET(vocab_size=VOCABULARY, moe=TOP2)
    even, busy = (activations(net, BATCH, CONTEXT, PRECISIONS["32-true"], x) for x in (1.0, 1.5))
    rows = 2 * BATCH * CONTEXT
    assert busy.blocks[0] == even.blocks[0]
    assert busy.blocks[1] - even.blocks[1] == rows // 2 * 4 * (64 + 160)


def test_an_attention_that_is_not_known_is_refused() -> None:
    net = NET(vocab_size=VOCABULARY, moe=TOP2)
    net.blocks[0].attention = torch.nn.Identity()
    with pytest.raises(ValueError, match="the activations of Identity are not known"):
        activations(net, BATCH, CONTEXT, PRECISIONS["32-true"])
