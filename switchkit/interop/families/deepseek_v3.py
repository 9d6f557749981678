"""DeepSeek-V3: latent attention, dense blocks first, sigmoid routing in groups with a bias, shared experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

from switchkit.attention import LatentAttention
from switchkit.capacity.policies import Dropless
from switchkit.experts.shared import Shared
from switchkit.interop.config import Config
from switchkit.interop.families import decoder_tables as tables
from switchkit.interop.families import decoders
from switchkit.interop.families.base import Family, Plan, shape_of
from switchkit.interop.keys import Keys
from switchkit.layers import MoELayer
from switchkit.losses.base import Loss
from switchkit.models import Decoder
from switchkit.routing.sigmoid import Sigmoid

__all__ = ["FAMILY"]


def plan(config: Config, tied: bool, context: int | None) -> Plan:
    options = decoders.base_options(config, tied, context)
    config.only("num_key_value_heads", (options["num_heads"],), "latent attention has as many as num_attention_heads")
    attention = partial(
        LatentAttention,
        kv_rank=config.integer("kv_lora_rank"),
        nope_width=config.integer("qk_nope_head_dim"),
        rope_width=config.integer("qk_rope_head_dim"),
        v_width=config.integer("v_head_dim"),
        q_rank=config.integer("q_lora_rank", default=None),
        rope_base=decoders.rope_base(config, 10_000.0),
        interleaved=config.flag("rope_interleave", default=True),
        # Its latents are normalised with this, whatever rms_norm_eps says.
        norm_eps=1e-6,
    )
    k = config.integer("num_experts_per_tok", default=8)
    normalize = config.flag("norm_topk_prob", default=True)
    if normalize and k == 1:
        config.refuse("num_experts_per_tok", "with normalised weights every weight is 1, and the router learns nothing")
    router = partial(
        Sigmoid,
        k=k,
        scale=config.number("routed_scaling_factor", default=2.5, above=True),
        normalize=normalize,
        groups=config.integer("n_group", default=8),
        top_groups=config.integer("topk_group", default=4),
    )
    dense = config.integer("first_k_dense_replace", default=3, least=0)
    net = partial(
        Decoder,
        **{
            **options,
            "attention": attention,
            "sparse": list(range(dense, options["num_layers"])),
            "num_experts": config.count("n_routed_experts", "num_local_experts"),
            "expert_d_ff": config.integer("moe_intermediate_size"),
        },
    )
    experts = partial(
        Shared, experts=decoders.gated(config), num_shared=config.integer("n_shared_experts", default=1), mix="sum"
    )
    # It has no loss: its bias is moved from outside (UpdateRouterBias).
    return Plan(config.integer("vocab_size"), net, partial(MoELayer, router=router, capacity=Dropless, experts=experts))


_QUERIES = {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj"}
_REST = {
    "kv_down": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "kv_up": "kv_b_proj",
    "out": "o_proj",
}


def keys(net: Any) -> Iterator[Keys]:
    yield from tables.decoder_keys(net)
    yield from tables.dense_keys(net)
    yield from tables.experts_keys(net, ours="experts.routed")
    yield from tables.shared_keys(net, "shared_experts")
    for i, block in enumerate(net.blocks):
        queries = {"q": "q_proj"} if block.attention.q_rank is None else _QUERIES
        for ours, theirs in {**queries, **_REST}.items():
            yield Keys(f"blocks.{i}.attention.{ours}.weight", (f"model.layers.{i}.self_attn.{theirs}.weight",))
        if isinstance(block.mlp, MoELayer):
            name = f"model.layers.{i}.mlp.gate.e_score_correction_bias"
            yield Keys(f"blocks.{i}.mlp.router.bias", (name,))


def describe(net: nn.Module, losses: Sequence[Loss]) -> dict[str, Any]:
    layer, router = decoders.first_sparse(net, "deepseek_v3", Sigmoid)
    blocks: Any = net.blocks
    attention = shape_of(blocks[0].attention, "blocks.0.attention", LatentAttention, "deepseek_v3")
    experts = shape_of(layer.experts, "the experts", Shared, "deepseek_v3")
    return {
        **decoders.describe_decoder(net, "deepseek_v3"),
        **decoders.describe_rope(attention.rope_base),
        "num_key_value_heads": attention.num_heads,
        "kv_lora_rank": attention.kv_rank,
        "q_lora_rank": attention.q_rank,
        "qk_nope_head_dim": attention.nope_width,
        "qk_rope_head_dim": attention.rope_width,
        "v_head_dim": attention.v_width,
        "rope_interleave": attention.interleaved,
        "attention_bias": False,
        "first_k_dense_replace": next(i for i, block in enumerate(blocks) if block.mlp is layer),
        "moe_intermediate_size": layer.d_ff,
        "n_routed_experts": layer.num_experts,
        "n_shared_experts": max(1, experts.shared.d_ff // layer.d_ff),
        "num_experts_per_tok": router.k,
        "norm_topk_prob": router.normalize,
        "routed_scaling_factor": router.scale,
        "n_group": router.groups,
        "topk_group": router.top_groups,
        "num_nextn_predict_layers": 0,
    }


def ignored(config: Config) -> list[str]:
    """The layers that predict tokens further ahead, which transformers leaves unread too."""
    first = config.integer("num_hidden_layers")
    ahead = config.integer("num_nextn_predict_layers", "num_mtp_layers", default=0, least=0)
    return [rf"model\.layers\.{first + i}\..*" for i in range(min(ahead, 64))]


FAMILY = Family("deepseek_v3", "DeepseekV3ForCausalLM", plan, Decoder, keys, describe, decoders.tied, ignored)
