"""Parameters and floating-point operations of a model, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from switchkit.attention import Attention, CrossAttention, LatentAttention
from switchkit.experts.null import Null
from switchkit.experts.shared import Shared
from switchkit.layers import MoELayer, moe_layers
from switchkit.models import Decoder, EncoderDecoder
from switchkit.routing.soft import Soft

__all__ = ["Counts", "buffered", "count", "products"]


@dataclass(frozen=True)
class Counts:
    """Sizes of a model. Operations are those of one token's forward pass, a multiply-add counting as two.

    For an encoder-decoder they are those of one token of the source and one of the target together.
    """

    parameters: int
    active: int
    """Parameters that one token meets: all but those of the experts it is not sent to."""
    experts: int
    """Operations in routed experts: the load even, every assignment kept, no padding of buffers."""
    routers: int
    """Operations of the choice: routers, gates of shared and constant experts, mixing tokens into slots and back."""
    attention: int
    """Scores and weighted values over a full context, not halved for causality (the math kernel computes them all)."""
    other: int
    """Every other matrix product: projections, dense feed-forward layers, shared experts, the output layer."""

    @property
    def flops(self) -> int:
        return self.experts + self.routers + self.attention + self.other

    @property
    def matched(self) -> int:
        """What a FLOP-matched dense twin has to equal: everything but the routers."""
        return self.flops - self.routers


def count(model: nn.Module, context: int) -> Counts:
    """Sizes of `model`, with attention over `context` tokens; where experts choose, they do so among as many."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = attention = shared = 0
    experts = routers = Fraction(0)
    routed: set[int] = set()
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            k, every = layer.router.k, layer.num_experts
            always = {id(parameter) for parameter in layer.experts.always_parameters()}
            everyones = always | _common(layer.experts)
            held = sum(p.numel() for p in layer.experts.parameters() if id(p) not in everyones)
            idle += held - held * k // every
            in_routed, in_shared = products(layer, context)
            experts += in_routed
            shared += in_shared
            routers += _choosing(layer, context)
            routed |= {id(p) for part in (layer.experts, layer.router) for p in part.parameters()}
        elif isinstance(layer, (Attention, CrossAttention)):
            attention += 4 * context * layer.out.in_features
        elif isinstance(layer, LatentAttention):
            keys = layer.num_heads * (layer.nope_width + layer.rope_width)
            attention += 2 * context * (keys + layer.out.in_features)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) not in routed)
    # An output layer of its own is one of the matrices above.
    head = model.embed.weight.numel() if isinstance(model, (Decoder, EncoderDecoder)) and model.head is None else 0
    return Counts(
        parameters=total,
        active=total - idle,
        experts=round(2 * experts),
        routers=round(2 * routers),
        attention=attention,
        other=2 * (linear + head + shared),
    )


def buffered(model: nn.Module, context: int) -> int:
    """Operations of one token in routed experts whose buffers are filled to their capacity in training, as a
    dispatcher with buffers of one size computes them; where nothing limits them, those of the even load."""
    total = Fraction(0)
    for layer in moe_layers(model).values():
        rows, limit, size = _rows(layer, context)
        buffers = rows if limit is None or layer.router.full else min(limit, size) * layer.num_experts
        total += products(layer, context)[0] * Fraction(buffers, rows)
    return round(2 * total)


def products(layer: MoELayer, context: int) -> tuple[Fraction, int]:
    """Multiply-adds of one token in the routed experts, the load being even, and in those that every token meets.

    Counted are stacked weights [E, in, out] and those of `nn.Linear`, as experts hold them: one in a list of modules
    is one expert's, any other is met by every row. The first is a mean: experts that choose take whole tokens of a
    group of `context` (or of the layer's own `group`) in training.
    """
    rows, _, size = _rows(layer, context)
    always = {id(parameter) for parameter in layer.experts.always_parameters()}
    linear = {id(part.weight) for part in layer.experts.modules() if isinstance(part, nn.Linear)}
    gates = {id(gate) for gate in _constant_gates(layer)}
    matrices = [p for p in layer.experts.parameters() if (p.dim() == 3 or id(p) in linear) and id(p) not in gates]
    shared = sum(p.numel() for p in matrices if id(p) in always)
    every_row = _common(layer.experts)
    for_rows = sum(p.numel() for p in matrices if id(p) in every_row and id(p) not in always)
    routed = sum(p.numel() for p in matrices) - shared - for_rows
    return Fraction(routed * rows, size * layer.num_experts) + Fraction(for_rows * rows, size), shared


def _common(experts: nn.Module) -> set[int]:
    """The ids of the parameters that experts of one's own share (a base under low-rank ones): those of every
    `nn.Linear` that is in no list of modules."""
    lists = (part for part in experts.modules() if isinstance(part, (nn.ModuleList, nn.ModuleDict)))
    listed = {id(parameter) for part in lists for parameter in part.parameters()}
    linear = (part for part in experts.modules() if isinstance(part, nn.Linear))
    return {id(parameter) for part in linear for parameter in part.parameters()} - listed


def _choosing(layer: MoELayer, context: int) -> Fraction:
    """Multiply-adds of one token for the choice."""
    rows, _, size = _rows(layer, context)
    found = Fraction(sum(p.numel() for p in layer.router.parameters() if p.dim() > 1))
    if isinstance(layer.experts, Shared) and layer.experts.mix_weight is not None:
        found += layer.experts.mix_weight.numel()
    # Constant experts weigh the token against their vector, which is computed on every row.
    found += sum(Fraction(gate[0].numel() * rows, size) for gate in _constant_gates(layer))
    if isinstance(layer.router, Soft):
        # Every token into every slot, and every slot's output into every token.
        found += 2 * layer.num_experts * layer.router.slots * layer.d_model
    return found


def _rows(layer: MoELayer, context: int) -> tuple[int, int | None, int]:
    """Rows that experts compute for a group in training, the capacity, and the tokens of the group: of a batch those of
    one of its sequences, as nobody knows its size."""
    size = layer.group if isinstance(layer.group, int) else context
    limit = layer.capacity.limit(size, layer.num_experts, layer.router.k, training=True)
    return layer.router.rows(size, limit), limit, size


def _constant_gates(layer: MoELayer) -> list[nn.Parameter]:
    return [part.gate for part in layer.experts.modules() if isinstance(part, Null) and part.gate is not None]
