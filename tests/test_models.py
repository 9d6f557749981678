"""Decoders of dense and sparse blocks."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import oracle
import pytest
import torch
from properties import EXACT
from torch import nn

from switchkit import (
    Balance,
    Decoder,
    EncoderDecoder,
    Factor,
    Hash,
    Linear,
    MoELayer,
    RouterZ,
    Switch,
    TopK,
    every,
    last,
)
from switchkit.attention import Attention, LatentAttention
from switchkit.layers import FeedForward
from switchkit.models import Cache, Output, sparse_layers
from switchkit.models.base import causal_layers, evaluating
from switchkit.models.inputs import check_inputs, kind_of_data

SIZES = {"d_model": 8, "num_layers": 4, "num_heads": 2, "d_ff": 12, "num_experts": 3, "context": 10}
TIGHT = partial(MoELayer, router=partial(TopK, k=2), capacity=partial(Factor, 0.5, 0.5))


def decoder(**options: object) -> Decoder:
    torch.manual_seed(0)
    return Decoder(11, **{**SIZES, **options}).double()


def ids(batch: int = 3, length: int = 10) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 11, (batch, length))


@pytest.mark.parametrize(
    ("placement", "layers", "expected"),
    [
        ("every(1)", 4, (0, 1, 2, 3)),
        ("every(2)", 6, (1, 3, 5)),
        ("every(2)", 5, (1, 3)),
        ("every(4)", 4, (3,)),
        ("last(1)", 4, (3,)),
        ("last(3)", 4, (1, 2, 3)),
        ([2, 0], 4, (0, 2)),
        ([1, 1], 4, (1,)),
        ([], 4, ()),
        (every(3), 6, (2, 5)),
        (last(2), 6, (4, 5)),
    ],
)
def test_placements(placement: str | list[int], layers: int, expected: tuple[int, ...]) -> None:
    assert sparse_layers(placement, layers) == expected


@pytest.mark.parametrize(
    ("placement", "says"),
    [
        ("every(0)", "sparse='every(0)' needs n from 1 to num_layers=4"),
        ("every(5)", "sparse='every(5)' needs n from 1 to num_layers=4"),
        ("last(9)", "sparse='last(9)' needs n from 1 to num_layers=4"),
        ("some", "sparse must be 'every(n)', 'last(n)' or a list of layers; got 'some'"),
        ("every(-1)", "got 'every(-1)'"),
        ([4], "sparse names layer 4, but layers are 0 to 3"),
        ([-1], "sparse names layer -1, but layers are 0 to 3"),
    ],
)
def test_placements_that_do_not_exist_are_refused(placement: str | list[int], says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        decoder(sparse=placement)
    assert says in str(caught.value)


@pytest.mark.parametrize("sparse", ["every(2)", "last(1)", [0, 3], "every(1)"])
def test_one_record_per_sparse_layer_in_order(sparse: str | list[int]) -> None:
    model = decoder(sparse=sparse)
    out = model(ids())
    assert isinstance(out, Output)
    assert out.logits.shape == (3, 10, 11)
    places = [i for i, block in enumerate(model.blocks) if isinstance(block.mlp, MoELayer)]
    assert tuple(places) == model.sparse == sparse_layers(sparse, 4)
    seen = []
    for place in places:
        model.blocks[place].mlp.register_forward_hook(lambda _, args, result: seen.append(result[1]))
    again = model(ids())
    assert [id(r) for r in again.routings] == [id(r) for r in seen]
    assert all(r.batch == 3 for r in out.routings)


def test_records_of_sparse_attention_come_before_those_of_its_block() -> None:
    """Two blocks, attention sparse in the second: its three layers, then the feed-forward one."""
    model = Decoder(7, d_model=8, num_layers=2, num_heads=2, d_ff=6, num_experts=4, sparse=[1], sparse_attention=[1])
    names = [name for name, part in model.named_modules() if isinstance(part, MoELayer)]
    assert names == ["blocks.1.attention.qkv.0", "blocks.1.attention.qkv.1", "blocks.1.attention.qkv.2", "blocks.1.mlp"]
    said = {}
    for name in names:
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda _, given, out, name=name: said.update({name: out[1]}))
    routings = model(torch.randint(0, 7, (2, 5))).routings
    assert len(routings) == 4
    assert all(routing is said[name] for name, routing in zip(names, routings, strict=True))
    load = sum(r.load.sum() for r in routings)
    assert load == 4 * 10
    grads = torch.autograd.grad(
        sum(r.weight.sum() for r in routings), [m.router.weight for m in model.modules() if isinstance(m, MoELayer)]
    )
    assert all(grad.norm() > 0 for grad in grads)
    loud = partial(MoELayer, experts=Linear, capacity=partial(Factor, order="probability"))
    with pytest.raises(ValueError, match="a causal model would see the future"):
        Decoder(7, d_model=8, num_heads=2, sparse=[], sparse_attention="every(1)", attention_moe=loud)


def test_what_attention_was_given_counts() -> None:
    """Its own dropout stays; what goes against the model's positions, or stands nowhere, is refused."""
    own = {"num_heads": 2, "dropout": 0.25}
    assert [block.attention.dropout for block in decoder(**own).blocks] == [0.25] * 4
    given = decoder(**own, attention=partial(Attention, dropout=0.5)).blocks[0]
    assert (given.attention.dropout, given.dropout) == (0.5, 0.25)
    assert decoder(attention=partial(Attention, rotary=True)).blocks[0].attention.rotary
    for rotary, positions in ((False, "rotary"), (True, "learned")):
        with pytest.raises(ValueError, match=f"attention has rotary={rotary}, and positions={positions!r}: leave"):
            decoder(attention=partial(Attention, rotary=rotary), positions=positions)
    for nowhere in (None, []):
        with pytest.raises(ValueError, match="attention_moe does nothing without sparse_attention: say which blocks"):
            decoder(sparse_attention=nowhere, attention_moe=partial(MoELayer, experts=Linear))


def test_token_ids_reach_every_sparse_layer() -> None:
    """Hash layers of one seed decide alike: those of attention, of blocks, and of either side of an encoder-decoder."""
    hashed = partial(MoELayer, router=Hash)
    options = {"moe": hashed, "sparse": "every(1)"}
    model = decoder(sparse_attention=[1], attention_moe=partial(hashed, experts=Linear), **options)
    alone = Hash(8, 3)
    wanted = alone(torch.zeros(3, 10, 8), None, torch.ones(3, 10, dtype=torch.bool), ids()).expert
    assert [torch.equal(r.expert, wanted) for r in model(ids()).routings] == [True] * 7
    sizes = {"d_model": 8, "encoder_layers": 1, "num_heads": 2, "d_ff": 12, "num_experts": 3}
    both = EncoderDecoder(11, **sizes, **options)(ids()[:, 4:], source=ids()).routings
    assert [torch.equal(r.expert, e) for r, e in zip(both, (wanted, wanted[:, 4:]), strict=True)] == [True] * 2


def test_a_dense_model_has_no_records_and_no_losses() -> None:
    model = decoder(sparse=[])
    out = model(ids())
    assert out.routings == ()
    assert all(isinstance(block.mlp, FeedForward) for block in model.blocks)
    assert Balance()(out.routings) + RouterZ()(out.routings) == 0


def test_every_sparse_layer_adds_to_the_losses() -> None:
    """All layers sparse, one layer sparse: the router of each gets a gradient from the routing losses alone."""
    for sparse in ("every(1)", [2]):
        model = decoder(sparse=sparse)
        routings = model(ids()).routings
        loss = Balance()(routings) + RouterZ()(routings)
        wanted = {n: p for n, p in model.named_parameters() if n.endswith("router.weight")}
        assert len(wanted) == len(routings)
        assert all(grad.norm() > 0 for grad in oracle.gradients(loss, **wanted).values())


def test_sizes_reach_the_parts() -> None:
    model = decoder(expert_d_ff=5, sparse="every(2)")
    dense, sparse = model.blocks[0].mlp, model.blocks[1].mlp
    assert dense.up.weight.shape == (12, 8)
    assert (sparse.d_model, sparse.d_ff, sparse.num_experts) == (8, 5, 3)
    assert decoder().blocks[1].mlp.d_ff == 12
    assert sparse.router is not model.blocks[3].mlp.router
    projections = decoder(sparse_attention=[2], attention_moe=MoELayer).blocks[2].attention.qkv
    assert [(part.d_model, part.d_ff, part.num_experts) for part in projections] == [(8, 8, 3)] * 3
    norms = [part for part in decoder(norm="rms", norm_eps=0.5).modules() if isinstance(part, torch.nn.RMSNorm)]
    assert [norm.eps for norm in norms] == [0.5] * 9
    norms = [part for part in decoder(norm_eps=0.5).modules() if isinstance(part, nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [0.5] * 9


def test_only_the_encoder_of_what_reads_a_source_may_see_later_tokens() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = (nn.ModuleList([MoELayer(8, 2, d_ff=4)]) for _ in range(2))

    assert list(causal_layers(Own())) == ["encoder.0", "decoder.0"]
    model = EncoderDecoder(11, d_model=8, encoder_layers=1, num_heads=2, d_ff=8, sparse="every(1)")
    assert list(causal_layers(model)) == ["decoder.blocks.0.mlp"]


def test_tables_start_small_enough_for_an_output_layer() -> None:
    net = Decoder(300, d_model=32, num_layers=1, num_heads=2, context=300, sparse=[], positions="learned", tied=False)
    for table in (net.embed, net.position, net.head):
        assert abs(table.weight.std() / 0.02 - 1) < 0.03


def test_the_output_layer_is_the_embedding() -> None:
    model = decoder()
    assert "head" not in " ".join(model.state_dict())
    before = model(ids()).logits
    with torch.no_grad():
        model.embed.weight[3] = 0
    assert (model(ids()).logits[..., 3] == 0).all()
    assert not (before[..., 3] == 0).any()


@pytest.mark.parametrize("moe", [None, TIGHT, partial(TIGHT, group=4)], ids=["dropless", "tight", "groups of 4"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_future_changes_nothing(moe: object, padded: bool) -> None:
    """Editing the tokens after t changes no logits up to t, with dropped tokens and padding included."""
    model, tokens = decoder(moe=moe), ids()
    valid = torch.ones_like(tokens, dtype=torch.bool)
    if padded:
        valid[1, 7:] = False
        valid[2, :4] = False
    before = model(tokens, valid).logits
    for t in range(9):
        later = tokens.clone()
        later[:, t + 1 :] = (later[:, t + 1 :] + 1 + t) % 11
        if moe is not None and "group" in moe.keywords:
            later[:2] = tokens[:2]  # groups run over sequences: an earlier one reaches a later one
        after = model(later, valid).logits
        assert oracle.error(after[:, : t + 1], before[:, : t + 1]) <= EXACT


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("moe", [None, TIGHT], ids=["dropless", "tight"])
def test_padding_left_or_right_changes_nothing(moe: object, positions: str) -> None:
    """Positions count real tokens, attention and experts see no others."""
    model, tokens = decoder(moe=moe, positions=positions), ids(1, 6)
    filler = torch.full((1, 4), 7)
    real = torch.ones(1, 6, dtype=torch.bool)
    right = model(torch.cat([tokens, filler], 1), torch.cat([real, ~real[:, :4]], 1))
    left = model(torch.cat([filler, tokens], 1), torch.cat([~real[:, :4], real], 1))
    other = model(torch.cat([filler - 3, tokens], 1), torch.cat([~real[:, :4], real], 1))
    assert oracle.error(left.logits[:, 4:], right.logits[:, :6]) <= EXACT
    assert torch.equal(left.logits[:, 4:], other.logits[:, 4:])
    if moe is None:
        assert oracle.error(model(tokens).logits, right.logits[:, :6]) <= EXACT
    for loss in (Balance(), RouterZ()):
        assert oracle.error(loss(left.routings), loss(right.routings)) <= EXACT


def test_sequences_do_not_meet() -> None:
    model, tokens = decoder(moe=TIGHT), ids()
    together = model(tokens).logits
    alone = torch.cat([model(tokens[b : b + 1]).logits for b in range(3)])
    assert oracle.error(alone, together) <= EXACT


def test_batches_of_nothing_and_of_padding_stay_finite() -> None:
    model = decoder(moe=TIGHT)
    assert model(ids(0)).logits.shape == (0, 10, 11)
    assert model(ids(2, 0)).logits.shape == (2, 0, 11)
    out = model(ids(), torch.zeros(3, 10, dtype=torch.bool))
    assert out.logits.isfinite().all()
    assert Balance()(out.routings) == RouterZ()(out.routings) == 0


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_cache_that_began_without_padding_may_go_on_with_it(positions: str) -> None:
    """And the other way round: what is not said is real."""
    model, tokens = decoder(positions=positions).eval(), ids()
    for padded in (slice(5, 7), slice(1, 3)):
        valid = torch.ones_like(tokens, dtype=torch.bool)
        valid[1, padded] = False
        whole = model(tokens, valid).logits
        first = None if padded.start == 5 else valid[:, :4]
        cache = model(tokens[:, :4], first, cache=Cache()).cache
        later = model(tokens[:, 4:], valid[:, 4:] if first is None else None, cache=cache).logits
        real = valid[:, 4:]
        oracle.assert_same({"y": later[real]}, {"y": whole[:, 4:][real]}, EXACT)


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="has 11 tokens, but context=10: shorten it"):
        decoder()(ids(1, 11))
    cache = decoder()(ids(1, 8), cache=Cache()).cache
    with pytest.raises(ValueError, match="has 11 tokens, but context=10: shorten it"):
        decoder()(ids(1, 3), cache=cache)


LLAMA = {
    "norm": "rms",
    "tied": False,
    "attention": partial(Attention, num_kv_heads=1, qk_norm="head"),
    "feed_forward": partial(FeedForward, gated=True, activation="silu"),
}
LATENT = {"attention": partial(LatentAttention, kv_rank=6, nope_width=4, rope_width=2, v_width=4)}


@pytest.mark.parametrize(
    "options",
    [{}, {"positions": "learned"}, {"sparse_attention": [1]}, LLAMA, LATENT],
    ids=["default", "learned", "sparse attention", "llama", "latent"],
)
@pytest.mark.parametrize("padded", [False, True])
def test_token_by_token_equals_all_at_once(options: dict, padded: bool) -> None:
    """In pieces of 3, 1, 4 and 2 tokens; padding on the left of one sequence and in the middle of another."""
    model, tokens = decoder(**options).eval(), ids()
    valid = torch.ones_like(tokens, dtype=torch.bool)
    if padded:
        valid[1, :4] = False
        valid[2, 5:8] = False
    whole = model(tokens, valid if padded else None).logits
    cache, outputs = Cache(), []
    for start, end in ((0, 3), (3, 4), (4, 8), (8, 10)):
        out = model(tokens[:, start:end], valid[:, start:end] if padded else None, cache)
        cache = out.cache
        outputs.append(out.logits)
    assert cache.length == 10
    assert oracle.error(torch.cat(outputs, 1)[valid], whole[valid]) <= EXACT
    assert model(tokens).cache is None


def test_a_cache_that_would_change_the_routing_is_refused() -> None:
    model = decoder(moe=TIGHT)
    assert "Factor limits the capacity in evaluation" in str(model.uncacheable)
    with pytest.raises(ValueError, match="no cache with this model: Factor limits"):
        model(ids(), cache=Cache())
    assert decoder(moe=partial(MoELayer, capacity=partial(Factor, 0.5, None))).uncacheable is None


class Peek(Switch):
    """Adds the mean of the whole sequence to each token before deciding: it sees the future."""

    leaks = "Peek averages over the whole sequence"

    def logits(self, tokens):
        return super().logits(tokens + tokens.mean(1, keepdim=True))


def test_a_part_that_sees_the_future_is_refused() -> None:
    moe = partial(MoELayer, router=Peek)
    with pytest.raises(ValueError, match="Peek averages over the whole sequence: a causal model would see the future"):
        decoder(moe=moe)
    assert decoder(moe=moe, sparse=[]).sparse == ()


@pytest.mark.parametrize("attention", [Attention, LATENT["attention"]])
def test_attention_that_sees_the_future_is_refused(attention: object) -> None:
    """Allowed, it is the same model with padding marked and without, and keeps no cache."""
    options = {"attention": partial(attention, causal=False), "sparse": []}
    with pytest.raises(ValueError, match="causal false lets each token see later ones: a causal model would see"):
        decoder(**options)
    model, tokens = decoder(**options, allow_leak=True).eval(), ids()
    later = tokens.clone()
    later[:, -1] = (later[:, -1] + 5) % 11
    assert oracle.error(model(later).logits[:, 0], model(tokens).logits[:, 0]) > 1e-6
    whole = model(tokens, torch.ones_like(tokens, dtype=torch.bool)).logits
    assert oracle.error(whole, model(tokens).logits) < 1e-12
    with pytest.raises(ValueError, match="no cache with this model: attention with causal false"):
        model(tokens, cache=Cache())


def test_a_leak_that_is_allowed_does_leak() -> None:
    """The refusal is not for nothing: the first token's logits change with the last token."""
    model, tokens = decoder(moe=partial(MoELayer, router=Peek), allow_leak=True), ids()
    later = tokens.clone()
    later[:, -1] = (later[:, -1] + 5) % 11
    assert oracle.error(model(later).logits[:, 0], model(tokens).logits[:, 0]) > 1e-6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide d_model=8"),
        ({"num_layers": 0}, "num_layers must be at least 1; got 0"),
        ({"d_model": 0}, "d_model must be at least 1; got 0"),
        ({"d_ff": -1}, "d_ff must be at least 1; got -1"),
        ({"expert_d_ff": 0}, "expert_d_ff must be at least 1; got 0"),
        ({"context": 0}, "context must be at least 1; got 0"),
        ({"num_experts": 0}, "num_experts must be at least 1; got 0"),
        ({"dropout": 1.0}, "dropout must be in [0, 1); got 1.0"),
        ({"sparse_attention": [1], **LATENT}, "sparse_attention=[1] takes the place of the matrices of `Attention`"),
        ({"moe": partial(MoELayer, router=partial(TopK, k=4))}, "k must be from 1 to num_experts=3"),
    ],
)
def test_bad_sizes_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        decoder(**options)
    assert says in str(caught.value)


def test_an_empty_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least 1; got 0"):
        Decoder(0)


def test_keys_of_the_state_are_frozen() -> None:
    """What checkpoints are made of: adding is fine, renaming is a new format version."""
    block = ["attention_norm.weight", "attention.qkv.weight", "attention.out.weight", "mlp_norm.weight"]
    dense, sparse = ["mlp.up.weight", "mlp.down.weight"], ["mlp.router.weight", "mlp.experts.w1", "mlp.experts.w2"]
    blocks = [f"blocks.0.{key}" for key in block + dense] + [f"blocks.1.{key}" for key in block + sparse]
    assert list(decoder(num_layers=2).state_dict()) == ["embed.weight", *blocks, "norm.weight"]
    learned = decoder(num_layers=2, positions="learned").state_dict()
    assert list(learned) == ["embed.weight", "position.weight", *blocks, "norm.weight"]
    llama = ["embed.weight", "norm.weight", "head.weight"]
    for part in ("attention_norm", "attention.qkv", "attention.out", "attention.q_norm", "attention.k_norm"):
        llama.append(f"blocks.0.{part}.weight")
    llama += [f"blocks.0.{part}.weight" for part in ("mlp_norm", "mlp.up", "mlp.gate", "mlp.down")]
    assert sorted(decoder(num_layers=1, sparse=[], **LLAMA).state_dict()) == sorted(llama)
    latent = decoder(num_layers=1, sparse=[], attention=partial(LATENT["attention"], q_rank=3)).state_dict()
    parts = ("q_down", "q_norm", "q_up", "kv_down", "kv_norm", "kv_up", "out")
    own = {f"blocks.0.attention.{part}.weight" for part in parts}
    assert {key for key in latent if ".attention." in key} == own


@pytest.mark.parametrize(("says", "fits"), [(True, (False, True)), (False, (True, False)), (None, (True, True))])
def test_data_say_which_models_read_them(says: bool | None, fits: tuple[bool, bool]) -> None:
    """Those of a user's own that say nothing are left alone."""
    data = type("Data", (), {} if says is None else {"have_sources": says, "context": 4})()
    own = Decoder(5, d_model=8, num_heads=2, num_layers=1, d_ff=8, sparse=[], context=4)
    for net, fit in zip((own, EncoderDecoder(5, d_model=8, num_heads=2, d_ff=8, sparse=[])), fits, strict=True):
        with nullcontext() if fit else pytest.raises(ValueError, match="have (a|no) source"):
            check_inputs(net, data)
    with pytest.raises(ValueError, match="data.context 5 is longer than model.net.context 4"):
        check_inputs(own, type("Text", (), {"have_sources": False, "context": 5})())
    pairs = type("Pairs", (), {"have_sources": True, "tokenizer": SimpleNamespace(start_id=1)})()
    with pytest.raises(ValueError, match="set model.net.start_id to 1"):
        check_inputs(EncoderDecoder(5, d_model=8, num_heads=2, d_ff=8, sparse=[]), pairs)
    check_inputs(EncoderDecoder(5, d_model=8, num_heads=2, d_ff=8, sparse=[], start_id=1), pairs)
    # A subclass may make other batches.
    check_inputs(own, type("Mine", (type("Text", (), {"have_sources": True}),), {"context": 5})())


@pytest.mark.parametrize(
    ("sentinels", "wanted"), [(None, "SpanData"), (0, "PairData"), (100, "SpanData")], ids=["unknown", "none", "some"]
)
def test_the_data_of_a_model_that_belongs_to_none(sentinels: int | None, wanted: str) -> None:
    tokenizer = None if sentinels is None else SimpleNamespace(sentinels=sentinels)
    net = EncoderDecoder(5, d_model=8, num_heads=2, d_ff=8, sparse=[])
    assert (kind_of_data(net, tokenizer), kind_of_data(decoder(), tokenizer)) == (wanted, "TextData")


@pytest.mark.parametrize("frozen", [(), ("blocks.0",), ("",), ("blocks.0", "")])
def test_every_part_is_in_its_own_mode_after_an_evaluation(frozen: tuple[str, ...]) -> None:
    """A part alone, the model alone or all of it may be in evaluation mode before; and it may break off."""
    net = decoder().train()
    for name in frozen:
        net.get_submodule(name).training = False
    modes = [part.training for part in net.modules()]
    for error in (nullcontext(), pytest.raises(ZeroDivisionError)):
        with error, evaluating(net):
            assert not any(part.training for part in net.modules())
            assert isinstance(error, nullcontext) or 1 / 0
        assert [part.training for part in net.modules()] == modes


@pytest.mark.parametrize("net", [Decoder, partial(EncoderDecoder, encoder_layers=2)])
def test_dense_layers_have_the_dropout_that_they_are_given(net):
    """Nothing given: that of the model, which T5 has on hidden activations and a decoder has not."""
    sizes = {"d_model": 8, "num_heads": 2, "d_ff": 16, "sparse": [], "dropout": 0.25}
    for given, wanted in (({}, 0.0 if net is Decoder else 0.25), ({"dropout": 0.5}, 0.5)):
        made = net(11, feed_forward=partial(FeedForward, **given), **sizes)
        assert {part.dropout for part in made.modules() if isinstance(part, FeedForward)} == {wanted}


def silent(net: torch.nn.Module) -> torch.nn.Module:
    """With sublayers that add nothing, so that what comes into the last norm is the embeddings."""
    for name, parameter in net.named_parameters():
        if name.endswith(("out.weight", "down.weight", "w2")):
            torch.nn.init.zeros_(parameter)
    return net


def test_dropout_of_a_decoder_falls_on_embeddings_and_reaches_its_blocks() -> None:
    """Each entry is dropped or, with a half of them gone, twice as large."""
    net = silent(decoder(dropout=0.5, positions="learned"))
    found: list[torch.Tensor] = []
    net.norm.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    tokens = ids()
    net.train()(tokens)
    net.eval()(tokens)
    whole = net.embed(tokens) + net.position(torch.arange(10))
    assert torch.equal(found[1], whole)
    dropped = found[0] == 0
    assert 0.3 < dropped.double().mean() < 0.7
    oracle.assert_same({"x": found[0]}, {"x": 2 * whole.masked_fill(dropped, 0)}, EXACT)
    assert {(block.dropout, block.attention.dropout) for block in net.blocks} == {(0.5, 0.5)}
