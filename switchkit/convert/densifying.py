"""The dense model of a sparse one: a feed-forward layer in place of each mixture, made of its experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from switchkit.convert.measuring import Measured
from switchkit.convert.merging import How, feed_forwards_of
from switchkit.convert.rebuilding import net_arguments, rebuilt
from switchkit.convert.shrinking import check_shrinks
from switchkit.experts.shared import Shared
from switchkit.layers import FeedForward
from switchkit.models import Decoder, EncoderDecoder
from switchkit.module import LanguageModule
from switchkit.spec import describe

__all__ = ["to_dense"]

OF_EXPERTS = frozenset(("num_experts", "expert_d_ff", "allow_leak"))
"""Arguments of a model that a dense one has no use for."""


def to_dense(module: LanguageModule, measured: Measured, *, how: How = "aligned") -> LanguageModule:
    """The dense model with one feed-forward layer, as wide as one expert, in place of each mixture.

    Its weights are those of the experts put together by `how`, and w2 is multiplied by what the router's weights come
    to on average (see `switchkit.convert.merging.feed_forward_of`). All else is copied. It computes what the mixture
    did only where all experts of a layer are the same: the loss rises, and training on brings it down again.

    Raises:
        ValueError: experts that no dense layer expresses, sparse attention, dense layers of another kind beside them, a
            model that is dense already.
        ImportError: "aligned" without SciPy.
    """
    arguments = net_arguments(module)
    layers = check_shrinks(module)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    widths: dict[str, int] = {}
    kinds: set[tuple[Any, bool]] = set()
    for name, weights in feed_forwards_of(module, measured, how).items():
        layer = layers[name]
        for key in [key for key in state if key.startswith(f"net.{name}.")]:
            del state[key]
        state |= {f"net.{name}.{key}": tensor for key, tensor in weights.items()}
        widths[name] = len(weights["up.weight"])
        routed = layer.experts.routed if isinstance(layer.experts, Shared) else layer.experts
        kinds.add((routed.activation, "gate.weight" in weights))
    for part in module.net.modules():
        if isinstance(part, FeedForward):
            kinds.add((part.activation, part.gate is not None))
    if len(kinds) > 1:
        told = ", ".join(sorted(f"{activation}{' gated' if gated else ''}" for activation, gated in kinds))
        raise ValueError(f"the experts and the dense layers beside them are of several kinds ({told}): a model has one")
    ((activation, gated),) = kinds
    known = (arguments.get("feed_forward") or {}).get("init_args") or {}
    feed_forward = describe(FeedForward)
    feed_forward["init_args"] = {**known, "activation": activation, "gated": gated}
    net = {
        **{name: value for name, value in arguments.items() if name not in OF_EXPERTS},
        **{"sparse": [], "feed_forward": feed_forward},
        **_widths(module, widths),
    }
    if isinstance(module.net, EncoderDecoder):
        net["decoder_sparse"] = []
    made = rebuilt(module, net, moe=None, losses=[])
    made.load_state_dict(state, assign=True)
    return made


def _widths(module: LanguageModule, new: Mapping[str, int]) -> dict[str, Any]:
    """`d_ff`, and `decoder_d_ff`, of the dense model."""
    net = module.net
    if isinstance(net, EncoderDecoder):
        stacks = [("encoder.", "d_ff", net.encoder_d_ff), ("decoder.", "decoder_d_ff", net.decoder_d_ff)]
    else:
        assert isinstance(net, Decoder)
        stacks = [("", "d_ff", net.d_ff)]
    return {
        name: [new.get(f"{where}blocks.{index}.mlp", wide) for index, wide in enumerate(widths)]
        for where, name, widths in stacks
    }
