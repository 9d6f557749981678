"""The dense model that a sparse one is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from switchkit.attention import Attention
from switchkit.checks import one_of
from switchkit.counts import products
from switchkit.layers import MoELayer, moe_layers
from switchkit.models import Decoder, EncoderDecoder
from switchkit.registry import full_path
from switchkit.spec import build

__all__ = ["Match", "dense_spec", "net_of"]

Match = Literal["flops", "params"]

REPLACED = frozenset(
    ("num_experts", "expert_d_ff", "decoder_sparse", "sparse_attention", "attention_moe", "allow_leak", "decoder_d_ff")
)
"""Arguments of a model that a dense one has no use for, or that the twin's widths take the place of."""


def dense_spec(
    spec: Mapping[str, Any], *, match: Match = "flops", vocab_size: int, context: int | None = None
) -> dict[str, Any]:
    """The description of a language model's dense twin, from its own (`LanguageModule.spec`).

    Each mixture gives its place to the model's own kind of dense layer, so wide that both are equal; all else stays,
    the width of the other dense layers included. A model whose layers then differ in width has a list as `d_ff`.

    - "flops": equal in multiply-adds of one token, ``k * expert + shared experts`` against the dense layer. Routers,
      gates of shared experts and the padding of buffers have no counterpart and are left out. The load counts as even
      where experts differ in size.
    - "params": equal in parameters, routers included: a mixture of 8 becomes a dense layer about 8 times as wide.

    Where no whole width is exact, it is the nearest: `switchkit.counts.count` of both models says the difference.

    Args:
        spec: class_path and init_args, of which `net`, `moe` and `losses` are read and replaced.
        match: what is equal.
        vocab_size: symbols of the vocabulary.
        context: tokens among which experts choose theirs, where they do; null: as many as the model reads, or so many
            that rounding does not show.

    Raises:
        ValueError: a model that is dense already, no `Decoder` or `EncoderDecoder`, or one without such a twin: the
            cost of a token is not known beforehand, or is more than what attention can hold; another word for `match`.
    """
    one_of("match", match, ("flops", "params"))
    net = net_of(spec, vocab_size)
    if not isinstance(net, (Decoder, EncoderDecoder)):
        raise ValueError(f"a dense twin is made of a Decoder or an EncoderDecoder; this is a {type(net).__name__}")
    mixtures = [*moe_layers(net).values()]
    if not mixtures:
        raise ValueError("this model is dense already: give one with sparse layers")
    if match == "flops":
        _check_even(mixtures)
    _check_attention(net, match, context)
    arguments = dict(spec.get("init_args") or {})
    given = arguments.get("net") or {"class_path": full_path(Decoder)}
    kept = {name: value for name, value in (given.get("init_args") or {}).items() if name not in REPLACED}
    arguments["net"] = {**given, "init_args": {**kept, **_widths(net, match, context), "sparse": []}}
    return {**spec, "init_args": {**arguments, "moe": None, "losses": []}}


def net_of(spec: Mapping[str, Any], vocab_size: int) -> nn.Module:
    """The model of a description without its weights, on the meta device: shapes alone, at no cost.

    One that cannot be built so, as its constructor reads values, has them.
    """
    arguments = spec.get("init_args") or {}
    made = partial(build(arguments.get("net")) or Decoder, vocab_size=vocab_size, moe=build(arguments.get("moe")))
    try:
        with torch.device("meta"):
            return made()
    except (RuntimeError, NotImplementedError):
        # What has nothing to do with memory is raised again.
        with torch.random.fork_rng(devices=[]):
            return made()


def _widths(net: Decoder | EncoderDecoder, match: Match, context: int | None) -> dict[str, Any]:
    """The arguments that give each layer its width."""
    if isinstance(net, Decoder):
        return {"d_ff": _short(_stack(net, net.blocks, net.d_ff, match, context))}
    above = _short(_stack(net, net.encoder.blocks, net.encoder_d_ff, match, context))
    below = _short(_stack(net, net.decoder.blocks, net.decoder_d_ff, match, context))
    return {"d_ff": above} if above == below else {"d_ff": above, "decoder_d_ff": below}


def _stack(
    net: Decoder | EncoderDecoder, blocks: nn.ModuleList, widths: tuple[int, ...], match: Match, context: int | None
) -> list[int]:
    layers: list[Any] = [block.mlp for block in blocks]
    return [
        _width(net, layer, match, context) if isinstance(layer, MoELayer) else width
        for layer, width in zip(layers, widths, strict=True)
    ]


def _short(widths: list[int]) -> int | list[int]:
    return widths[0] if len(set(widths)) == 1 else widths


def _width(net: Decoder | EncoderDecoder, layer: MoELayer, match: Match, context: int | None) -> int:
    """Of the dense layer that is nearest to a mixture."""
    # What a dense layer has grows by the same with every unit of its width, whatever kind of layer it is.
    small, large = (_of_dense(net, width, match) for width in (8, 16))
    unit = Fraction(large - small, 8)
    wanted = _products(net, layer, context) if match == "flops" else sum(p.numel() for p in layer.parameters())
    if unit <= 0:
        raise ValueError(f"{net.dense} does not grow with d_ff, so no width of it equals a mixture")
    width = round((wanted - small) / unit + 8)
    if width < 1:
        raise ValueError(
            f"a mixture of this model does less than a dense layer of width 1 ({float(wanted):.3g} against "
            f"{float(unit):.3g} multiply-adds of a token): give a model of larger experts"
        )
    return width


def _of_dense(net: Decoder | EncoderDecoder, width: int, match: Match) -> int:
    """Multiply-adds of one token, or parameters."""
    with torch.device("meta"):
        layer = net.dense(d_model=net.d_model, d_ff=width, dropout=0.0)
    if match == "params":
        return sum(p.numel() for p in layer.parameters())
    return sum(part.weight.numel() for part in layer.modules() if isinstance(part, nn.Linear))


def _products(net: Decoder | EncoderDecoder, layer: MoELayer, context: int | None) -> Fraction:
    # Far beyond any sequence, the last token of an expert is no matter.
    longest = net.context if isinstance(net, Decoder) else 1024 * layer.num_experts
    routed, shared = products(layer, context or longest)
    return routed + shared


def _check_even(mixtures: list[MoELayer]) -> None:
    why = next((layer.router.uneven for layer in mixtures if layer.router.uneven), None)
    if why is not None:
        raise ValueError(f"{why}, so no dense model has its FLOPs: match parameters instead, or take another router")


def _check_attention(net: nn.Module, match: Match, context: int | None) -> None:
    """Refuses sparse projections that one dense matrix does not equal."""
    for part in net.modules():
        if not (isinstance(part, Attention) and isinstance(part.qkv, nn.ModuleList)):
            continue
        if match == "params":
            raise ValueError(
                "sparse_attention: a dense model has no place for the parameters of sparse projections: match flops, "
                "or set sparse_attention to null"
            )
        dense = 3 * part.out.in_features * part.out.out_features
        sparse = sum(_products(net, layer, context) for layer in part.qkv)  # type: ignore[arg-type, misc]
        if sparse != dense:
            raise ValueError(
                f"sparse_attention: the sparse projections take {float(sparse / dense):.3g} times the multiply-adds of "
                "dense ones, and dense attention has no width to make up for it: set k=1 there, or leave it out"
            )
