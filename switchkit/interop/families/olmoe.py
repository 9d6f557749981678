"""OLMoE: all blocks sparse with many small experts, RMS norms over the whole of queries and keys."""

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

__all__ = ["FAMILY"]


def plan(config: Config, tied: bool, context: int | None) -> Plan:
    config.only("clip_qkv", (), "queries, keys and values that are clipped are not built here")
    window = config.integer("sliding_window", default=None)
    options = decoders.llama(config, tied, context, window=window, qk_norm="whole")
    router = decoders.top_k(
        config,
        normalize=config.flag("norm_topk_prob", default=False),
        k=config.integer("num_experts_per_tok", default=8),
    )
    net = partial(
        Decoder,
        **{
            **options,
            "sparse": list(range(options["num_layers"])),
            "num_experts": config.count("num_experts", "num_local_experts"),
        },
    )
    moe = partial(MoELayer, router=router, capacity=Dropless, experts=decoders.gated(config))
    loss = decoders.balance(config.number("router_aux_loss_coef", default=0.01))
    return Plan(config.integer("vocab_size"), net, moe, [loss])


def keys(net: nn.Module) -> Iterator[Keys]:
    yield from tables.decoder_keys(net)
    yield from tables.attention_keys(net)
    yield from tables.experts_keys(net)


def describe(net: nn.Module, losses: Sequence[Loss]) -> dict[str, Any]:
    layer, router = decoders.first_sparse(net, "olmoe", TopK)
    found = decoders.describe_llama(net, "olmoe")
    return {
        **{name: value for name, value in found.items() if name != "head_dim"},
        "intermediate_size": layer.d_ff,
        "num_experts": layer.num_experts,
        "num_experts_per_tok": router.k,
        "norm_topk_prob": decoders.normalized(router),
        "router_aux_loss_coef": decoders.balance_weight(losses, 0.01),
        "output_router_logits": False,
        "attention_bias": False,
        "clip_qkv": None,
    }


FAMILY = Family("olmoe", "OlmoeForCausalLM", plan, Decoder, keys, describe, decoders.tied)
