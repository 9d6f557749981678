"""A dense model made of a sparse one."""

from __future__ import annotations

from functools import partial

from switchkit.convert.measuring import Measured
from switchkit.convert.merging import How, feed_forward_of
from switchkit.convert.rebuilding import moe_layers, net_arguments, rebuilt
from switchkit.experts.base import Activation
from switchkit.experts.feed_forward import GatedMlp, Mlp
from switchkit.experts.shared import Shared
from switchkit.layers import FeedForward, MoELayer
from switchkit.models import EncoderDecoder
from switchkit.module import LanguageModule
from switchkit.spec import describe

__all__ = ["to_dense"]


def to_dense(module: LanguageModule, *, measured: Measured, how: How = "aligned") -> LanguageModule:
    """The model with one feed-forward layer in place of each sparse one, made of its experts by `feed_forward_of`.

    All other weights stay. The model computes something else, unless all experts of a layer are the same: it is a start
    for training. Expert dropout, capacity and the losses on routing go with the routers.

    Args:
        module: stays as it is.
        measured: what the experts are used for, and with what weight, see `switchkit.convert.measuring`.
        how: see `switchkit.convert.merging.merge`.

    Raises:
        ValueError: a dense model; experts that a `FeedForward` cannot express, or of another kind or width than the
            dense layers that the model has; sparse layers in attention.
        ImportError: "aligned" without SciPy.
    """
    arguments, layers = net_arguments(module), moe_layers(module)
    if not layers:
        raise ValueError("the model is dense already")
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    width = 0
    for (name, layer), use in zip(layers.items(), measured.layers, strict=True):
        if not name.endswith(".mlp"):
            raise ValueError(f"{name} is a sparse layer in attention, which cannot be merged into a dense one")
        weights = feed_forward_of(layer, how, usage=use.load, gate=use.gate)
        width = weights["up.weight"].shape[0]
        for key in [key for key in state if key.startswith(f"net.{name}.")]:
            del state[key]
        state |= {f"net.{name}.{key}": weight for key, weight in weights.items()}
    activation, gated = _kind(next(iter(layers.values())))
    mixed = False
    for name, part in module.net.named_modules():
        if not name.endswith(".mlp") or isinstance(part, MoELayer):
            continue
        if type(part) is not FeedForward:
            raise ValueError(
                f"{name} is a {type(part).__name__}: only FeedForward layers can stand beside the merged ones"
            )
        mixed, theirs = True, (part.activation, part.gate is not None, part.up.out_features)
        if theirs != (activation, gated, width):
            raise ValueError(
                f"{name} is dense with (activation, gated, width) = {theirs}, the merged experts would have "
                f"{(activation, gated, width)}: a dense model has one kind of layer"
            )
    for word in ("num_experts", "expert_d_ff"):
        arguments.pop(word, None)
    arguments |= {"sparse": [], "d_ff": width}
    if isinstance(module.net, EncoderDecoder):
        arguments["decoder_sparse"] = []
    if not mixed:
        arguments["feed_forward"] = describe(partial(FeedForward, activation=activation, gated=gated))
    made = rebuilt(module, arguments, moe=None, losses=[])
    made.load_state_dict(state, assign=True)
    return made


def _kind(layer: MoELayer) -> tuple[Activation, bool]:
    """Activation of the experts, and whether they are gated."""
    routed = layer.experts.routed if isinstance(layer.experts, Shared) else layer.experts
    assert isinstance(routed, (Mlp, GatedMlp))
    return routed.activation, isinstance(routed, GatedMlp)
