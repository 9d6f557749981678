"""The encoder-decoder: what reaches what, padding, records, cache, sizes."""

from __future__ import annotations

from functools import partial

import oracle
import pytest
import torch
from properties import EXACT

from switchkit import Balance, EncoderDecoder, ExpertChoice, Factor, MoELayer, RoundRobin, RouterZ, TopK
from switchkit.layers import FeedForward
from switchkit.models import Cache

SIZES = {"d_model": 8, "encoder_layers": 2, "num_heads": 2, "d_ff": 12, "num_experts": 3}
TIGHT = partial(MoELayer, router=partial(TopK, k=2), capacity=partial(Factor, 0.5, 0.5))
V11 = {"tied": False, "head_width": 6, "feed_forward": partial(FeedForward, gated=True, activation="gelu_tanh")}


def model(**options: object) -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(11, **{**SIZES, **options}).double()


def ids(batch: int = 3, length: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 11, (batch, length), generator=torch.Generator().manual_seed(seed))


SOURCE, TARGET = ids(3, 7, 2), ids(3, 6, 3)


def test_one_record_per_sparse_layer_the_encoder_first() -> None:
    found = model(encoder_layers=4, decoder_layers=3, sparse="every(2)", decoder_sparse=[0, 2])
    assert (found.encoder_sparse, found.decoder_sparse) == ((1, 3), (0, 2))
    out = found(TARGET, source=SOURCE)
    assert out.logits.shape == (3, 6, 11)
    assert [tuple(r.valid.shape) for r in out.routings] == [(3, 7)] * 2 + [(3, 6)] * 2
    routers = {n: p for n, p in found.named_parameters() if n.endswith("router.weight")}
    loss = Balance()(out.routings) + RouterZ()(out.routings)
    assert all(grad.norm() > 0 for grad in oracle.gradients(loss, **routers).values())
    assert model(sparse=[])(TARGET, source=SOURCE).routings == ()


@pytest.mark.parametrize("moe", [None, TIGHT], ids=["dropless", "tight"])
def test_the_target_is_seen_up_to_now_and_the_source_whole(moe: object) -> None:
    net = model(moe=moe)
    before = net(TARGET, source=SOURCE).logits
    for t in range(5):
        later = TARGET.clone()
        later[:, t + 1 :] = (later[:, t + 1 :] + 1 + t) % 11
        assert oracle.error(net(later, source=SOURCE).logits[:, : t + 1], before[:, : t + 1]) <= EXACT
    for place in range(7):
        other = SOURCE.clone()
        other[:, place] = (other[:, place] + 3) % 11
        assert oracle.error(net(TARGET, source=other).logits[:, 0], before[:, 0]) > 1e-6


@pytest.mark.parametrize("options", [{}, V11], ids=["v1.0", "v1.1"])
def test_padding_of_either_side_changes_nothing(options: dict) -> None:
    """Right of the source and of the target; on the left of them too, for distances are all that counts."""
    net = model(**options)
    expected = net(TARGET, source=SOURCE).logits
    filler, real = ids(3, 2, 4), torch.ones(3, 9, dtype=torch.bool)
    right, left = real.clone(), real.clone()
    right[:, 7:] = False
    left[:, :2] = False
    for source, valid in ((torch.cat([SOURCE, filler], 1), right), (torch.cat([filler, SOURCE], 1), left)):
        assert oracle.error(net(TARGET, source=source, source_valid=valid).logits, expected) <= EXACT
    after = net(torch.cat([TARGET, filler], 1), right[:, 1:], source=SOURCE)
    assert oracle.error(after.logits[:, :6], expected) <= EXACT
    before = net(torch.cat([filler, TARGET], 1), left[:, :8], source=SOURCE)
    assert oracle.error(before.logits[:, 2:], expected) <= EXACT


def test_nothing_but_padding_stays_finite() -> None:
    none = torch.zeros(3, 7, dtype=torch.bool)
    out = model()(TARGET, none[:, :6], source=SOURCE, source_valid=none)
    assert out.logits.isfinite().all()
    assert Balance()(out.routings) == 0


@pytest.mark.parametrize("options", [{}, V11, {"sparse": []}], ids=["v1.0", "v1.1", "dense"])
def test_token_by_token_equals_all_at_once(options: dict) -> None:
    net = model(**options).eval()
    valid = torch.ones(3, 7, dtype=torch.bool)
    valid[1, 4:] = False
    whole = net(TARGET, source=SOURCE, source_valid=valid).logits
    cache, outputs, given = Cache(), [], {"source": SOURCE, "source_valid": valid}
    for first, last in ((0, 1), (1, 3), (3, 6)):
        out = net(TARGET[:, first:last], cache=cache, **given)
        cache, given = out.cache, {}
        outputs.append(out.logits)
    assert cache.length == 6
    assert oracle.error(torch.cat(outputs, 1), whole) <= EXACT
    rows = torch.tensor([2, 2, 1])
    picked = net(TARGET[rows, :1], cache=cache.select(rows)).logits
    assert oracle.error(picked, net(TARGET[:, :1], cache=cache).logits[rows]) <= EXACT


@pytest.mark.parametrize(
    ("moe", "says"),
    [
        (TIGHT, "Factor limits the capacity in evaluation, and one token never fills it"),
        (partial(MoELayer, router=RoundRobin), "RoundRobin decides by the place of a token"),
    ],
)
def test_a_cache_that_would_change_the_routing_is_refused(moe: object, says: str) -> None:
    net = model(moe=moe)
    assert says in str(net.uncacheable)
    with pytest.raises(ValueError, match=says):
        net(TARGET, source=SOURCE, cache=Cache())
    assert model(moe=moe, decoder_sparse=[]).uncacheable is None


def test_the_encoder_may_see_all_and_the_decoder_not() -> None:
    moe = partial(MoELayer, router=ExpertChoice)
    with pytest.raises(ValueError, match="the decoder would see the future"):
        model(moe=moe)
    assert model(moe=moe, decoder_sparse=[])(TARGET, source=SOURCE).logits.isfinite().all()
    assert model(moe=moe, allow_leak=True).decoder_sparse == (1,)


def test_a_tied_output_layer_is_scaled_as_in_t5() -> None:
    tied = model()
    assert "head.weight" not in tied.state_dict()
    plain = model(scale_output=False)
    plain.load_state_dict(tied.state_dict())
    out, other = tied(TARGET, source=SOURCE).logits, plain(TARGET, source=SOURCE).logits
    assert oracle.error(out * 8**0.5, other) <= EXACT
    head = EncoderDecoder(300, **{**SIZES, "d_model": 40}, tied=False).head.weight
    assert head.abs().max() <= 2 * (0.1 / 40) ** 0.5
    assert abs(head.std() / (0.1 / 40) ** 0.5 - 0.88) < 0.03


def test_sizes_reach_both_stacks() -> None:
    options = {"sparse": [], "decoder_sparse": [1], "expert_d_ff": 5, "buckets": 12, "max_distance": 40}
    net = model(d_ff=[12, 10], decoder_d_ff=9, norm_eps=0.5, head_width=6, **options)
    assert [block.mlp.up.weight.shape[0] for block in net.encoder.blocks] == [12, 10]
    first, second = (block.mlp for block in net.decoder.blocks)
    assert (first.up.weight.shape[0], second.d_ff, second.num_experts) == (9, 5, 3)
    assert [block.mlp.up.weight.shape[0] for block in model(d_ff=[12, 10], sparse=[]).decoder.blocks] == [12, 10]
    for stack in (net.encoder, net.decoder):
        assert (stack.relative.buckets, stack.relative.max_distance) == (12, 40)
        assert {part.eps for part in stack.modules() if isinstance(part, torch.nn.RMSNorm)} == {0.5}
        assert {(block.attention.head_width, block.attention.scale) for block in stack.blocks} == {(6, 1)}
    assert {(block.cross.head_width, block.cross.scale) for block in net.decoder.blocks} == {(6, 1)}


def test_dropout_is_for_training() -> None:
    net = model(dropout=0.5)
    one, two = (net.train()(TARGET, source=SOURCE).logits for _ in range(2))
    assert oracle.error(one, two) > 1e-3
    one, two = (net.eval()(TARGET, source=SOURCE).logits for _ in range(2))
    assert torch.equal(one, two)


def test_dropout_falls_on_embeddings_and_outputs_of_both_stacks() -> None:
    """Each entry of them is dropped or, with a half of them gone, twice as large; and it reaches every sublayer."""
    net = model(dropout=0.5)
    for name, parameter in net.named_parameters():
        if name.endswith(("out.weight", "down.weight", "w2")):
            torch.nn.init.zeros_(parameter)  # what comes into the last norm is the embeddings
    for stack, ids in ((net.encoder, SOURCE), (net.decoder, TARGET)):
        seen: list[torch.Tensor] = []
        stack.norm.register_forward_hook(lambda _, given, out, seen=seen: seen.extend((given[0], out)))
        for training, times in ((True, 2), (False, 1)):
            seen.clear()
            y, _, _ = stack.train(training)(net.embed(ids), None, ids, memory=net.embed(SOURCE))
            for found, whole in ((seen[0], net.embed(ids)), (y, seen[1])):
                # Zeros of the embeddings stay zeros behind the norm.
                dropped = (found == 0) & (whole != 0)
                assert (dropped.double().mean() > 0.2) == training
                oracle.assert_same({"x": found}, {"x": times * whole.masked_fill(dropped, 0)}, EXACT)
        parts = [part for block in stack.blocks for part in (block, block.attention, block.cross) if part is not None]
        assert {part.dropout for part in parts} == {0.5}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: model()(TARGET), "the encoder needs source="),
        (lambda: model(start_id=11), "start_id must be a token, 0 to 10; got 11"),
        (lambda: model(embedding_std=0.0), "embedding_std must be a finite number > 0; got 0.0"),
        (lambda: model(dropout=1.0), "dropout must be in [0, 1); got 1.0"),
        (lambda: model(encoder_layers=0), "encoder_layers must be at least 1; got 0"),
        (lambda: model(decoder_layers=0), "decoder_layers must be at least 1; got 0"),
        (lambda: model(decoder_sparse="last(3)"), "needs n from 1 to num_layers=2"),
        (lambda: model(num_heads=3), "num_heads=3 does not divide d_model=8"),
    ],
)
def test_what_does_not_fit_is_refused(call: object, says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert says in str(caught.value)


def test_a_source_given_twice_is_refused() -> None:
    net = model().eval()
    cache = net(TARGET[:, :1], source=SOURCE, cache=Cache()).cache
    with pytest.raises(ValueError, match="the cache holds the source already"):
        net(TARGET[:, 1:2], source=SOURCE, cache=cache)


def test_keys_of_the_state_are_frozen() -> None:
    """What checkpoints are made of: adding is fine, renaming is a new format version."""
    keys = list(model(encoder_layers=1, sparse=[0], tied=False).state_dict())
    own = ["attention_norm.weight", "attention.qkv.weight", "attention.out.weight"]
    cross = ["cross_norm.weight", "cross.q.weight", "cross.kv.weight", "cross.out.weight"]
    mlp = ["mlp_norm.weight", "mlp.router.weight", "mlp.experts.w1", "mlp.experts.w2"]
    expected = ["embed.weight", "encoder.relative.weight"]
    expected += [f"encoder.blocks.0.{key}" for key in own + mlp]
    expected += ["encoder.norm.weight", "decoder.relative.weight"]
    expected += [f"decoder.blocks.0.{key}" for key in own + cross + mlp]
    assert sorted(keys) == sorted([*expected, "decoder.norm.weight", "head.weight"])


@pytest.mark.parametrize(("given", "expected"), [({}, 16**-0.5), ({"embedding_std": 1.0}, 1.0)])
def test_first_embeddings(given: dict[str, float], expected: float) -> None:
    torch.manual_seed(0)
    weight = EncoderDecoder(4000, d_model=16, encoder_layers=1, sparse=[], **given).embed.weight
    # 64,000 normal values: the standard deviation is known to about 0.3 %.
    assert abs(weight.std().item() / expected - 1) < 0.02


def test_first_biases() -> None:
    """Of the same deviation in both stacks, drawn for each."""
    net = EncoderDecoder(11, d_model=16, encoder_layers=1, num_heads=8, sparse=[], buckets=512, max_distance=1000)
    first, second = net.encoder.relative.weight, net.decoder.relative.weight
    assert not torch.equal(first, second)
    for weight in (first, second):
        # 4096 normal values: the standard deviation is known to about 1 %.
        assert abs(weight.std().item() * 4 - 1) < 0.05
