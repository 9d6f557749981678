"""Sizes and operations in the tables, held to torch's own counter."""

from __future__ import annotations

from functools import partial
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from switchkit import (
    Attention,
    Decoder,
    Einsum,
    EncoderDecoder,
    Factor,
    FeedForward,
    GatedMlp,
    LanguageModule,
    LatentAttention,
    MoELayer,
    Padded,
    RoundRobin,
    TopK,
)
from switchkit.report import count
from switchkit.report.tables import loads, model_table, twin_rows

CONTEXT = 8


def decoder(**more: object) -> Decoder:
    sizes = {"d_model": 16, "num_layers": 3, "num_heads": 2, "d_ff": 24, "num_experts": 4, "context": CONTEXT}
    return Decoder(11, **{**sizes, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "moe",
    [
        partial(MoELayer, router=partial(TopK, k=2), dispatcher=Padded),
        partial(MoELayer, router=partial(TopK, k=1), dispatcher=Padded, experts=GatedMlp),
        partial(MoELayer, router=partial(RoundRobin, k=2), dispatcher=Padded),
    ],
)
def test_flops_equal_those_that_torch_counts(moe: partial[MoELayer]) -> None:
    """With an even load nothing is padded, so the padded products are the very rows that were sent."""
    model = decoder(sparse=[0, 2], moe=moe).eval()
    for layer in model.modules():
        if isinstance(layer, MoELayer) and not isinstance(layer.router, RoundRobin):
            torch.nn.init.zeros_(layer.router.weight)
    tokens = torch.randint(11, (2, CONTEXT))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        rows = [r.load.sum(0) for r in model(tokens).routings]
    sizes = count(model, CONTEXT)
    # The counter sees the padded buffers: take what they hold beyond the rows that were sent off again.
    layer = next(m for m in model.modules() if isinstance(m, MoELayer))
    per_row = 2 * sum(p[0].numel() for p in layer.experts.parameters())
    padding = sum(int(r.max() * len(r) - r.sum()) for r in rows) * per_row
    assert counter.get_total_flops() - padding == sizes.flops * tokens.numel()


@pytest.mark.parametrize(
    "model",
    [
        decoder(tied=False, sparse=[], attention=partial(Attention, num_kv_heads=1, head_width=6)),
        decoder(sparse=[], attention=partial(LatentAttention, kv_rank=6, nope_width=3, rope_width=4, v_width=5)),
        decoder(sparse=[], feed_forward=partial(FeedForward, gated=True)),
        EncoderDecoder(11, d_model=16, encoder_layers=2, decoder_layers=1, num_heads=2, d_ff=24, sparse=[]),
        EncoderDecoder(11, d_model=16, encoder_layers=1, num_heads=2, head_width=6, d_ff=24, sparse=[], tied=False),
    ],
    ids=["grouped", "latent", "gated", "encoder-decoder", "untied"],
)
def test_flops_of_other_models_equal_those_that_torch_counts(model: torch.nn.Module) -> None:
    """Of an encoder-decoder for a source and a target of the same length, a token of each counted together."""
    tokens = torch.randint(11, (2, CONTEXT))
    given = {"source": tokens} if isinstance(model, EncoderDecoder) else {}
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.eval()(tokens, **given)
    assert counter.get_total_flops() == count(model, CONTEXT).flops * tokens.numel()


def test_the_table_names_parts_and_their_options() -> None:
    capacity = partial(Factor, 1.5, order="first_choices")
    moe = partial(MoELayer, router=TopK, capacity=capacity)
    model = decoder(sparse=[2], sparse_attention=[0], moe=moe, allow_leak=True)
    console = Console(width=160, file=StringIO())
    console.print(model_table(model, CONTEXT, []))
    shown = console.file.getvalue()
    for words in (
        "3, of which 1 sparse: [2]",
        "3 sparse layers for queries, keys and values, 4 experts (linear), router switch",
        "4 of width 24 (mlp), 2 per token",
        "factor (train 1.5, eval dropless, order first_choices), counted over the sequence",
    ):
        assert words in shown


def test_parameters_and_active_parameters() -> None:
    model = decoder(sparse=[1], moe=partial(MoELayer, router=partial(TopK, k=2)))
    sizes = count(model, CONTEXT)
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    idle = [p for n, p in model.named_parameters() if "experts" in n]
    assert sizes.active == sizes.parameters - sum(p[:2].numel() for p in idle)


def rows_of(moe: object = None, **more: object) -> dict[str, str]:
    sizes = {"d_model": 16, "num_layers": 3, "num_heads": 2, "d_ff": 24, "num_experts": 4, "context": CONTEXT}
    net = partial(Decoder, **{**sizes, **more})  # type: ignore[arg-type]
    return dict(twin_rows(LanguageModule(net, moe=moe, vocab_size=11), CONTEXT))  # type: ignore[arg-type]


def test_the_twin_of_a_table_is_that_of_dense_spec() -> None:
    rows = rows_of(sparse=[0, 2], expert_d_ff=12, moe=partial(MoELayer, router=partial(TopK, k=2)))
    assert f"{count(decoder(sparse=[]), CONTEXT).parameters:,}" in rows["  parameters"]
    assert "d_ff 24:" in rows["dense twin"]
    assert "d_ff [48, 24, 24]" in rows_of(sparse=[0], expert_d_ff=48)["dense twin"]


def test_what_has_no_twin_says_so() -> None:
    assert rows_of(sparse=[])["dense twin"].startswith("none: this model is dense already")
    assert dict(twin_rows(torch.nn.Linear(2, 2), CONTEXT)).keys() == {"dense twin"}


def test_load_bars() -> None:
    (name, text), _ = loads(torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.25] * 4]), ["a", "b"])
    assert name == "load a"
    assert text.startswith("█▄▄·  largest 50.0%, smallest 0.0%")


def test_einsum_counts_no_rows_twice() -> None:
    """The closed form does not depend on the dispatcher."""
    assert count(decoder(moe=partial(MoELayer, dispatcher=Einsum)), CONTEXT) == count(decoder(), CONTEXT)
