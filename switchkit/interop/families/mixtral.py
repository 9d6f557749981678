"""Mixtral: Mistral's blocks, all of them sparse, top-k weights that sum to one."""

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
    window = config.integer("sliding_window", default=None)
    options = decoders.llama(config, tied, context, theta=1e6, window=window)
    router = decoders.top_k(
        config,
        normalize=True,
        k=config.integer("num_experts_per_tok", default=2),
        jitter=config.number("router_jitter_noise", default=0.0),
    )
    net = partial(
        Decoder,
        **{
            **options,
            "sparse": list(range(options["num_layers"])),
            "num_experts": config.count("num_local_experts", "num_experts"),
        },
    )
    moe = partial(MoELayer, router=router, capacity=Dropless, experts=decoders.gated(config))
    loss = decoders.balance(config.number("router_aux_loss_coef", default=0.001))
    return Plan(config.integer("vocab_size"), net, moe, [loss])


def keys(net: nn.Module) -> Iterator[Keys]:
    yield from tables.decoder_keys(net)
    yield from tables.attention_keys(net)
    yield from tables.experts_keys(net, "block_sparse_moe", ("w1", "w3", "w2"))


def describe(net: nn.Module, losses: Sequence[Loss]) -> dict[str, Any]:
    layer, router = decoders.first_sparse(net, "mixtral", TopK)
    return {
        **decoders.describe_llama(net, "mixtral"),
        "intermediate_size": layer.d_ff,
        "num_local_experts": layer.num_experts,
        "num_experts_per_tok": router.k,
        "router_jitter_noise": router.jitter,
        "router_aux_loss_coef": decoders.balance_weight(losses, 0.001),
        "output_router_logits": False,
        "sliding_window": None,
    }


FAMILY = Family("mixtral", "MixtralForCausalLM", plan, Decoder, keys, describe, decoders.tied)
