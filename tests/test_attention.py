"""Attention against loops over pairs of tokens, and against Hugging Face's where it has the same."""

from __future__ import annotations

import math
import random
from functools import partial

import oracle
import pytest
import torch
from properties import EXACT
from torch import Tensor, nn

from switchkit.attention import Attention, CrossAttention, KeyValues, LatentAttention, RelativeBias, attend, rotate
from switchkit.attention.scores import seen


def tokens(batch: int = 2, size: int = 5, width: int = 8) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(batch, size, width, dtype=torch.float64, requires_grad=True)


def pairs(q: Tensor, k: Tensor, v: Tensor, sees: list[list[list[int]]], scale: float, bias: Tensor | None = None):
    """Head by head, query by query: softmax over what it sees. q [B, H, S, W], k and v [B, KV, K, W]."""
    batch, heads, size, _ = q.shape
    rows = []
    for b in range(batch):
        for h in range(heads):
            own = h * k.shape[1] // heads
            for t in range(size):
                scores = [
                    (q[b, h, t] * k[b, own, s]).sum() * scale + (0 if bias is None else bias[h, t, s])
                    for s in sees[b][t]
                ]
                shares = torch.stack(scores).softmax(0)
                rows.append(sum(p * v[b, own, s] for p, s in zip(shares, sees[b][t], strict=True)))
    return torch.stack(rows).view(batch, heads, size, v.shape[-1])


def split(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


CAUSAL = [[[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]] * 2
ALL = [[[0, 1, 2, 3, 4]] * 5] * 2


@pytest.mark.parametrize("norm", [None, "head", "whole"])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_grouped_queries_share_keys_and_values(kv: int, norm: str | None) -> None:
    """Query head h reads the keys of head h * KV // H, normalised within the head or over all of them."""
    options = {"num_kv_heads": kv, "head_width": 6, "qk_norm": norm, "bias": True, "scale": 0.7}
    attention = Attention(8, 4, **options).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    x = tokens()
    q, k, v = (x @ attention.qkv.weight.t() + attention.qkv.bias).split((24, 6 * kv, 6 * kv), -1)
    q, k, v = split(q, 4), split(k, kv), split(v, kv)
    if norm is not None:
        rms = [(z.pow(2).mean((-1,) if norm == "head" else (1, 3), keepdim=True) + 1e-6).rsqrt() * z for z in (q, k)]
        gains = [attention.q_norm.weight, attention.k_norm.weight]
        q, k = (z * (g if norm == "head" else g.view(-1, 1, 6)) for z, g in zip(rms, gains, strict=True))
    expected = pairs(q, k, v, CAUSAL, 0.7).transpose(1, 2).flatten(2) @ attention.out.weight.t()
    got, _, past = attention(x)
    assert past is None
    loss = torch.randn_like(got)
    named = {"x": x, **dict(attention.named_parameters())}
    oracle.assert_same(
        {"y": got, **oracle.gradients((got * loss).sum(), **named)},
        {"y": expected, **oracle.gradients((expected * loss).sum(), **named)},
        EXACT,
    )


@pytest.mark.parametrize("q_rank", [None, 5])
@pytest.mark.parametrize("interleaved", [True, False])
def test_latent_attention_is_its_equations(q_rank: int | None, interleaved: bool) -> None:
    sizes = {"kv_rank": 6, "nope_width": 3, "rope_width": 4, "v_width": 5, "q_rank": q_rank}
    attention = LatentAttention(8, 2, **sizes, interleaved=interleaved).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    x = tokens()

    def norm(z: Tensor, part: nn.Module) -> Tensor:
        return z * (z.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * part.weight

    def turn(z: Tensor) -> Tensor:
        """[B, S, H, 4]: pairs (0, 1), (2, 3) or (0, 2), (1, 3) turned by position * 10000 ** (-2 i / 4)."""
        first, second = (z[..., 0::2], z[..., 1::2]) if interleaved else (z[..., :2], z[..., 2:])
        angle = torch.arange(5.0).double().view(-1, 1, 1) * torch.tensor([1.0, 1e-2], dtype=torch.float64)
        both = torch.complex(first, second) * torch.exp(1j * angle)
        return torch.cat([both.real, both.imag], -1)

    q = x @ attention.q.weight.t() if q_rank is None else None
    if q is None:
        q = norm(x @ attention.q_down.weight.t(), attention.q_norm) @ attention.q_up.weight.t()
    q = q.view(2, 5, 2, 7)
    latent, shared = (x @ attention.kv_down.weight.t()).split((6, 4), -1)
    kv = (norm(latent, attention.kv_norm) @ attention.kv_up.weight.t()).view(2, 5, 2, 8)
    queries = torch.cat([q[..., :3], turn(q[..., 3:])], -1).transpose(1, 2)
    keys = torch.cat([kv[..., :3], turn(shared.unsqueeze(2)).expand(2, 5, 2, 4)], -1).transpose(1, 2)
    expected = pairs(queries, keys, kv[..., 3:].transpose(1, 2), CAUSAL, 7**-0.5)
    expected = expected.transpose(1, 2).flatten(2) @ attention.out.weight.t()
    oracle.assert_same({"y": attention(x)[0]}, {"y": expected}, EXACT)


def test_cross_attention_looks_at_real_tokens_of_the_other_sequence() -> None:
    cross = CrossAttention(8, 2, scale=1.0).double()
    x, memory = tokens(), tokens(2, 4).detach()
    valid = torch.tensor([[True] * 4, [True, False, True, False]])
    k, v = (memory @ cross.kv.weight.t()).split(8, -1)
    sees = [[[0, 1, 2, 3]] * 5, [[0, 2]] * 5]
    expected = pairs(split(x @ cross.q.weight.t(), 2), split(k, 2), split(v, 2), sees, 1.0)
    got = cross(x, cross.key_values(memory), valid.view(2, 1, 1, 4))
    oracle.assert_same({"y": got}, {"y": expected.transpose(1, 2).flatten(2) @ cross.out.weight.t()}, EXACT)


@pytest.mark.parametrize("scale", [1.0, 0.3, None])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("learns", [True, False], ids=["bias learns", "fixed bias"])
def test_a_bias_is_added_to_the_scores(learns: bool, padded: bool, scale: float | None) -> None:
    """Both ways that a CPU takes, gradient of the bias included."""
    q, k, v = (split(tokens() @ torch.randn(8, 8, dtype=torch.float64), 2) for _ in range(3))
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=learns)
    valid = torch.tensor([[True] * 5, [True, True, False, True, False]]) if padded else None
    sees = (
        ALL
        if valid is None
        else [[sorted({*valid[b].nonzero().flatten().tolist(), t}) for t in range(5)] for b in (0, 1)]
    )
    see = seen(5, valid, causal=False)
    got, expected = attend(q, k, v, see=see, bias=bias, scale=scale), pairs(q, k, v, sees, scale or 0.5, bias[0])
    results = [{"y": got}, {"y": expected}]
    if learns:
        loss = torch.randn_like(got)
        for result in results:
            result["bias"] = torch.autograd.grad((result["y"] * loss).sum(), bias, retain_graph=True)[0]
    oracle.assert_same(results[0], results[1], EXACT)


def test_a_bias_learns_beside_grouped_queries() -> None:
    """Four heads of queries, two of keys and values: PyTorch falls back to what gives a mask its gradient."""
    q, bias = split(tokens(), 4), torch.randn(1, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    k, v = (split(torch.randn(2, 5, 4, dtype=torch.float64), 2) for _ in range(2))
    results = [{"y": attend(q, k, v, bias=bias)}, {"y": pairs(q, k, v, ALL, 0.5**0.5, bias[0])}]
    for result in results:
        (result["bias"],) = torch.autograd.grad(result["y"].square().sum(), bias, retain_graph=True)
    oracle.assert_same(*results, EXACT)


@pytest.mark.parametrize("learns", [False, True, None], ids=["fixed bias", "bias learns", "no bias"])
def test_dropout_falls_on_the_shares(learns: bool | None) -> None:
    """Even shares of a fifth: of a half of them nothing is left, and the others are twice as large."""
    q = k = torch.zeros(3, 2, 5, 4, dtype=torch.float64)
    v = torch.eye(5, dtype=torch.float64).expand(3, 2, 5, 5)
    bias = None if learns is None else torch.zeros(1, 2, 5, 5, dtype=torch.float64, requires_grad=learns)
    found = attend(q, k, v, bias=bias, dropout=0.5).detach()
    dropped = found == 0
    assert 0.3 < dropped.double().mean() < 0.7
    oracle.assert_same({"y": found}, {"y": torch.full_like(found, 0.4).masked_fill(dropped, 0)}, EXACT)


@pytest.mark.parametrize(
    "build",
    [
        partial(Attention, 8, 2),
        partial(LatentAttention, 8, 2, kv_rank=6, nope_width=3, rope_width=4, v_width=5),
        partial(CrossAttention, 8, 2),
    ],
    ids=["heads", "latent", "cross"],
)
def test_dropout_is_for_training(build: partial) -> None:
    wet, dry, x = build(dropout=0.5), build(), tokens().float()
    dry.load_state_dict(wet.state_dict())

    def y(attention: nn.Module) -> Tensor:
        return attention(x, attention.key_values(x)) if isinstance(attention, CrossAttention) else attention(x)[0]

    assert torch.equal(y(wet.eval()), y(dry))
    assert not torch.equal(y(wet.train()), y(dry))


@pytest.mark.parametrize("learns", [False, True])
def test_a_bias_does_not_open_the_future(learns: bool) -> None:
    attention, x = Attention(8, 2, causal=True).double().eval(), tokens()
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=learns)
    (grad,) = torch.autograd.grad(attention(x, bias=bias)[0][:, :3].square().sum(), x)
    assert (grad[:, :3] != 0).any(-1).all()
    assert (grad[:, 3:] == 0).all()
    valid = torch.tensor([[True] * 5, [True, False, True, True, True]])
    q, k, v = (split(tokens(), 2) for _ in range(3))
    both = attend(q, k, v, see=seen(5, valid, causal=False), bias=bias, causal=True)
    oracle.assert_same({"y": both}, {"y": attend(q, k, v, see=seen(5, valid, causal=True), bias=bias)}, EXACT)


def test_a_query_that_sees_nothing_stays_finite() -> None:
    q = k = v = tokens(1, 3, 4).unsqueeze(1)
    for bias in (torch.zeros(1, 1, 3, 3).double(), torch.zeros(1, 1, 3, 3).double().requires_grad_()):
        y = attend(q, k, v, see=torch.zeros(1, 1, 3, 3, dtype=torch.bool), bias=bias)
        oracle.assert_same({"y": y}, {"y": v.mean(2, keepdim=True).expand_as(y)}, EXACT)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (8, 20), (6, 64)])
def test_buckets_of_distances_are_those_of_t5(buckets: int, far: int, causal: bool) -> None:
    """Counted one distance at a time: exact ones, then a logarithm, then one for all the rest."""
    bias = RelativeBias(2, buckets=buckets, max_distance=far, causal=causal)
    expected = []
    for distance in range(-200, 201):
        each, first, away = buckets, 0, max(-distance, 0)
        if not causal:
            each, away = buckets // 2, abs(distance)
            first = each if distance > 0 else 0
        exact = each // 2
        if away >= exact:
            away = min(exact + int(math.log(away / exact) / math.log(far / exact) * (each - exact) + 1e-9), each - 1)
        expected.append(first + away)
    assert bias.bucket(torch.arange(-200, 201)).tolist() == expected
    transformers = pytest.importorskip("transformers.models.t5.modeling_t5")
    theirs = transformers.T5Attention._relative_position_bucket(torch.arange(-200, 201), not causal, buckets, far)
    assert bias.bucket(torch.arange(-200, 201)).tolist() == theirs.tolist()


def test_the_bias_of_later_tokens_is_that_of_the_last_rows() -> None:
    bias = RelativeBias(2, causal=True)
    nn.init.normal_(bias.weight)
    assert torch.equal(bias(2, past=5), bias(7)[:, :, 5:])


@pytest.mark.parametrize(
    "attention",
    [
        Attention(8, 2, rotary=True),
        Attention(8, 4, num_kv_heads=2, qk_norm="head", rotary=True),
        LatentAttention(8, 2, kv_rank=6, nope_width=3, rope_width=4, v_width=5),
    ],
    ids=["heads", "grouped", "latent"],
)
def test_token_by_token_equals_all_at_once(attention: nn.Module) -> None:
    attention, x = attention.double(), tokens(2, 9)
    past, outputs = KeyValues(), []
    for first, last in ((0, 2), (2, 3), (3, 6), (6, 7), (7, 9)):
        y, _, past = attention(x[:, first:last], past=past)
        outputs.append(y)
    assert past.length == 9
    results = [{"y": torch.cat(outputs, 1)}, {"y": attention(x)[0]}]
    for result in results:
        (result["x"],) = torch.autograd.grad(result["y"].square().sum(), x, retain_graph=True)
    oracle.assert_same(*results, EXACT)
    kept = past.select(torch.tensor([1, 1, 0]))
    assert torch.equal(kept.k, past.k[[1, 1, 0]])


@pytest.mark.parametrize(
    "attention",
    [
        Attention(8, 2, rotary=True, rope_base=20.0),
        LatentAttention(8, 2, kv_rank=6, nope_width=3, rope_width=4, v_width=5, rope_base=20.0),
    ],
    ids=["heads", "latent"],
)
def test_layers_alike_may_share_how_they_turn(attention: Attention | LatentAttention) -> None:
    attention, x = attention.double(), tokens(2, 7)
    alone = attention(x)[0]
    assert torch.equal(attention(x, places=attention.places(x))[0], alone)
    _, _, past = attention(x[:, :4], past=KeyValues())
    later = attention(x[:, 4:], past=past, places=attention.places(x[:, 4:], 4))[0]
    oracle.assert_same({"y": later}, {"y": alone[:, 4:]}, EXACT)
    attention.rope_base = 10_000.0
    assert oracle.error(attention(x)[0], alone) > 1e-4


def test_keys_and_values_stay_what_they_are() -> None:
    """Any of them may be gone on from, more than once and in any mode; none of the others changes by it."""
    torch.manual_seed(0)
    draw = random.Random(0)
    known = [(KeyValues(), torch.empty(2, 3, 0, 4), torch.empty(2, 3, 0, 5))]
    for _ in range(200):
        before, k, v = known[draw.choice([-1, -1, -1, draw.randrange(len(known))])]
        with draw.choice([torch.no_grad, *[torch.inference_mode] * 8, torch.enable_grad])():
            size = draw.choice([1, 1, 3])
            more_k, more_v = torch.randn(2, 3, size, 4), torch.randn(2, 3, size, 5)
            now = before.extended(more_k, more_v)
            known.append((now, torch.cat([k, more_k], 2), torch.cat([v, more_v], 2)))
    assert sum(past.room is not None for past, _, _ in known) > len({id(past.room) for past, _, _ in known}) > 2
    for past, k, v in known[1:]:
        assert torch.equal(past.k, k)
        assert torch.equal(past.v, v)


def test_matrices_start_by_their_own_fan_in() -> None:
    """With heads wider than d_model / num_heads, the output's is another than the width of a token."""
    wide = Attention(16, 4, head_width=64)
    for matrix, fan_in in ((wide.qkv, 16), (wide.out, 256)):
        std = (0.1 / fan_in) ** 0.5
        assert matrix.weight.abs().max() <= 2 * std
        assert abs(matrix.weight.std() / std - 0.88) < 0.05


def test_positions_go_on_where_they_stopped() -> None:
    x = torch.randn(2, 6, 3, 8)
    assert torch.equal(rotate(x[:, 4:], start=4), rotate(x)[:, 4:])
    assert not torch.equal(rotate(x[:, 4:]), rotate(x)[:, 4:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_late_places_in_half_precision_turn_by_their_own_angle(dtype: torch.dtype) -> None:
    """Bfloat16 has no number between 1000 and 1004: an angle in it would be off by radians, not by a rounding."""
    x = torch.randn(1, 9, 2, 8).to(dtype)
    found, exact = rotate(x, start=1000), rotate(x.double(), start=1000)
    assert found.dtype == dtype
    assert oracle.error(found.double(), exact) < 0.02


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Attention(8, 4, num_kv_heads=3), "num_kv_heads=3 does not divide num_heads=4"),
        (
            lambda: Attention(8, 4, rope_base=100.0),
            "rope_base=100.0 does nothing without rotary positions: leave it out",
        ),
        (lambda: Attention(8, 4, head_width=0), "head_width must be at least 1; got 0"),
        (lambda: Attention(8, 0), "num_heads must be at least 1; got 0"),
        (lambda: Attention(8, 2, qk_norm="both"), "qk_norm must be null, 'head' or 'whole'; got 'both'"),
        (lambda: LatentAttention(8, 2, kv_rank=4, nope_width=2, rope_width=3, v_width=2), "an even rope_width"),
        (lambda: LatentAttention(8, 2, kv_rank=0, nope_width=2, rope_width=2, v_width=2), "kv_rank must be at least 1"),
        (
            lambda: LatentAttention(8, 2, kv_rank=4, nope_width=2, rope_width=2, v_width=2, q_rank=0),
            "q_rank must be at least 1; got 0",
        ),
        (lambda: RelativeBias(2, buckets=3), "buckets must be at least 4"),
        (lambda: RelativeBias(2, max_distance=8), "max_distance larger than the exact ones"),
    ],
)
def test_bad_options_are_refused(build: object, says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        build()
    assert says in str(caught.value)
