"""Qwen3-MoE: Qwen3's attention, and many small experts in the blocks that are sparse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

from switchkit.capacity.policies import Dropless
from switchkit.interop.config import Config
from switchkit.interop.families import decoder_tables as tables
from switchkit.interop.families import decoders
from switchkit.interop.families.base import Family, Plan
from switchkit.interop.keys import Keys
from switchkit.layers import MoELayer
from switchkit.losses.base import Loss
from switchkit.models import Decoder
from switchkit.routing.token_choice import TopK

__all__ = ["FAMILY", "describe_sparse", "sparse_options"]


def plan(config: Config, tied: bool, context: int | None) -> Plan:
    options = decoders.llama(config, tied, context, window=decoders.window_of(config), qk_norm="head")
    router = decoders.top_k(
        config,
        normalize=config.flag("norm_topk_prob", default=False),
        k=config.integer("num_experts_per_tok", default=8),
    )
    net = partial(Decoder, **{**options, **sparse_options(config, options["num_layers"])})
    moe = partial(MoELayer, router=router, capacity=Dropless, experts=decoders.gated(config))
    loss = decoders.balance(config.number("router_aux_loss_coef", default=0.001))
    return Plan(config.integer("vocab_size"), net, moe, [loss])


def sparse_options(config: Config, layers: int) -> dict[str, Any]:
    """Which blocks are sparse, and their sizes."""
    dense = set(config.integers("mlp_only_layers", below=layers))
    step = config.integer("decoder_sparse_step", default=1)
    return {
        "sparse": [layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0],
        "num_experts": config.count("num_experts", "num_local_experts"),
        "expert_d_ff": config.integer("moe_intermediate_size"),
    }


def keys(net: nn.Module) -> Iterator[Keys]:
    yield from tables.decoder_keys(net)
    yield from tables.attention_keys(net)
    yield from tables.dense_keys(net)
    yield from tables.experts_keys(net)


def describe(net: nn.Module, losses: Sequence[Loss]) -> dict[str, Any]:
    found = describe_sparse(net, losses, "qwen3_moe")
    # transformers 5 calls it so in this family.
    return {**found, "num_local_experts": found.pop("num_experts"), "attention_bias": False}


def describe_sparse(net: Any, losses: Sequence[Loss], family: str) -> dict[str, Any]:
    """What Qwen2-MoE and Qwen3-MoE say alike."""
    layer, router = decoders.first_sparse(net, family, TopK)
    return {
        **decoders.describe_llama(net, family),
        "moe_intermediate_size": layer.d_ff,
        "num_experts": layer.num_experts,
        "num_experts_per_tok": router.k,
        "norm_topk_prob": decoders.normalized(router),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, block in enumerate(net.blocks) if not isinstance(block.mlp, MoELayer)],
        "router_aux_loss_coef": decoders.balance_weight(losses, 0.001),
        "output_router_logits": False,
        "use_sliding_window": False,
        "sliding_window": None,
    }


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", plan, Decoder, keys, describe, decoders.tied)
