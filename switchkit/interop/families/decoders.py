"""What the families of causal decoders share: llama's block, with one option or another."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch import nn

from switchkit.attention import Attention
from switchkit.experts.feed_forward import GatedMlp
from switchkit.interop.config import REQUIRED, Config
from switchkit.interop.families.base import ACTIVATIONS, activation_word, refuse_changes, shape_of
from switchkit.layers import FeedForward, MoELayer
from switchkit.losses.balance import Balance
from switchkit.losses.base import Loss
from switchkit.models import Decoder
from switchkit.routing.token_choice import TopK

__all__ = [
    "balance",
    "balance_weight",
    "base_options",
    "context_of",
    "describe_decoder",
    "describe_llama",
    "describe_rope",
    "first_sparse",
    "gated",
    "llama",
    "normalized",
    "rope_base",
    "tied",
    "top_k",
    "window_of",
]


def tied(config: Config) -> bool:
    return config.flag("tie_word_embeddings", default=False)


# -- from config.json ------------------------------------------------------------------------------------------------


def base_options(config: Config, tied: bool, context: int | None, window: int | None = None) -> dict[str, Any]:
    """Options of `Decoder` that every decoder has but its attention."""
    refuse_changes(config)
    if config.number("attention_dropout", default=0.0):
        config.refuse("attention_dropout", "dropout of attention weights alone is not built here: set it to 0")
    for bias in ("attention_bias", "mlp_bias"):
        if config.flag(bias, default=False):
            config.refuse(bias, "there is no such bias here")
    config.only("moe_layer_freq", (1,), "dense blocks between sparse ones are not built here")
    return {
        "d_model": config.integer("hidden_size"),
        "num_layers": config.count("num_hidden_layers"),
        "num_heads": config.integer("num_attention_heads"),
        "d_ff": config.integer("intermediate_size"),
        "context": context_of(config, context, window),
        "sparse": [],
        "norm": "rms",
        "norm_eps": config.number("rms_norm_eps", default=REQUIRED),
        "tied": tied,
        "feed_forward": partial(FeedForward, gated=True, activation=config.word("hidden_act", **_SILU)),
    }


_SILU: dict[str, Any] = {"accepted": ACTIVATIONS, "default": "silu"}


def llama(
    config: Config,
    tied: bool,
    context: int | None,
    *,
    theta: float = 10_000.0,
    window: int | None = None,
    qk_norm: Literal["head", "whole"] | None = None,
    bias: bool = False,
    head_dim: int | None = None,
) -> dict[str, Any]:
    """Options of `Decoder` that make llama of it, and of those built like it."""
    found = base_options(config, tied, context, window)
    width = config.integer("head_dim", default=head_dim)
    if width is None and found["d_model"] % found["num_heads"]:
        config.refuse("num_attention_heads", f"does not divide hidden_size={found['d_model']}, and head_dim is absent")
    attention = partial(
        Attention,
        num_kv_heads=config.integer("num_key_value_heads", default=found["num_heads"]),
        head_width=found["d_model"] // found["num_heads"] if width is None else width,
        rope_base=rope_base(config, theta),
        qk_norm=qk_norm,
        norm_eps=found["norm_eps"],
        bias=bias,
    )
    return {**found, "attention": attention}


def context_of(config: Config, given: int | None, window: int | None) -> int:
    """The longest sequence: `given`, or the config's; a window of attention must not cut it."""
    longest = config.integer("max_position_embeddings")
    context = longest if given is None else given
    if not 1 <= context <= longest:
        config.refuse("max_position_embeddings", f"is the longest context; got context={context}")
    if window is not None and window < context:
        config.refuse(
            "sliding_window",
            f"tokens would see the last {window} only, which is not built here; shorter sequences never meet the "
            f"window: ask for a context of at most {window}",
        )
    return context


def window_of(config: Config) -> int | None:
    """The window of Qwen's attention, which a switch turns on; null: none."""
    kinds = config.values.get("layer_types") or []
    if not isinstance(kinds, list):
        config.refuse("layer_types", "must be a list of words")
    if not config.flag("use_sliding_window", default=False) and all(kind == "full_attention" for kind in kinds):
        return None
    return int(config.integer("sliding_window", default=4096))


def rope_base(config: Config, default: float) -> float:
    """The base of the rotary angles.

    Raises:
        ValueError: angles that are scaled, for some layers only, or over a part of a head.
    """
    base = config.number("rope_theta", default=default, above=True)
    # transformers reads one of the two: the older name, where it holds anything.
    name = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    rope = config.within(name)
    if any(isinstance(value, dict) for value in rope.values.values()):
        config.refuse(name, "angles that differ between layers are not built here")
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind != "default":
        config.refuse(name, f"scaled rotary angles (type {str(kind)[:20]!r}) are not built here")
    for part in (rope, config):
        part.only("partial_rotary_factor", (1, 1.0), "rotating a part of a head is not built here")
    return rope.number("rope_theta", default=base, above=True)


def top_k(config: Config, *, normalize: bool, k: int, **options: Any) -> partial[TopK]:
    """The router of the Mixtral family."""
    if normalize and k == 1:
        config.refuse("num_experts_per_tok", "with normalised weights every weight is 1, and the router learns nothing")
    return partial(TopK, k=k, softmax="before", normalize="before" if normalize else "never", **options)


def gated(config: Config) -> partial[GatedMlp]:
    """The experts of every family here."""
    return partial(GatedMlp, activation=config.word("hidden_act", **_SILU))


def balance(weight: float) -> partial[Balance]:
    """The loss of the Mixtral family: the tokens of all layers pooled, k when balanced."""
    return partial(Balance, weight=weight, layers="pooled", scale="k")


# -- to config.json --------------------------------------------------------------------------------------------------


def describe_decoder(net: nn.Module, family: str) -> dict[str, Any]:
    """What config.json says of a `Decoder` but its attention."""
    decoder: Any = shape_of(net, "the model", Decoder, family)
    if decoder.sparse_attention:
        raise ValueError(f"the model has sparse layers in attention, where {family} has none")
    if not hasattr(decoder.norm, "eps") or isinstance(decoder.norm, nn.LayerNorm):
        raise ValueError(f"the model has layer norms, where {family} has RMS norms")
    layers = [block.mlp for block in decoder.blocks]
    dense = next((layer for layer in layers if isinstance(layer, FeedForward)), None)
    sparse = next((layer for layer in layers if isinstance(layer, MoELayer)), None)
    if dense is None and sparse is None:
        raise ValueError(f"blocks.0.mlp is a {type(layers[0]).__name__}, which {family} has not")
    experts: Any = None if sparse is None else getattr(sparse.experts, "routed", sparse.experts)
    # Experts without one of their own are of a class that no family has, which `differences` tells.
    activation = getattr(experts, "activation", "silu") if dense is None else dense.activation
    return {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.d_model,
        "num_hidden_layers": len(decoder.blocks),
        "num_attention_heads": getattr(decoder.blocks[0].attention, "num_heads", None),
        "intermediate_size": experts.d_ff if dense is None else dense.up.out_features,
        "hidden_act": activation_word(activation),
        "max_position_embeddings": decoder.context,
        "rms_norm_eps": decoder.norm.eps,
        "tie_word_embeddings": decoder.head is None,
        "attention_dropout": 0.0,
    }


def describe_llama(net: nn.Module, family: str) -> dict[str, Any]:
    """What config.json says of a `Decoder` with the attention of llama."""
    found = describe_decoder(net, family)
    blocks: Any = net.blocks
    attention = shape_of(blocks[0].attention, "blocks.0.attention", Attention, family)
    return {
        **found,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_width,
        **describe_rope(attention.rope_base),
    }


def describe_rope(base: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": float(base), "rope_type": "default"}}


def first_sparse(net: nn.Module, family: str, router: type[nn.Module]) -> tuple[MoELayer, Any]:
    """A sparse layer, and its router, which must be of one class."""
    decoder: Any = shape_of(net, "the model", Decoder, family)
    layer = next((block.mlp for block in decoder.blocks if isinstance(block.mlp, MoELayer)), None)
    if layer is None:
        raise ValueError(f"the model has no sparse layer, where {family} has some")
    return layer, shape_of(layer.router, "the router", router, family)


def normalized(router: TopK) -> bool:
    """Whether a token's weights are divided by their sum where nothing is dropped; a softmax after the choice is."""
    return router.normalize != "never" or router.softmax == "after"


def balance_weight(losses: Sequence[Loss], default: float) -> float:
    """The weight of a balance loss in the family's form; the family's default if it was trained with another."""
    found = [loss for loss in losses if isinstance(loss, Balance) and (loss.layers, loss.scale) == ("pooled", "k")]
    return found[0].weight if found else default
