"""What the forward pass keeps for the backward pass: bytes on one device for one micro-batch.

The closed forms follow the code of the layers, operation by operation: a product keeps its input, a norm its input and
two numbers a token, an activation what it lets through, attention its queries, keys, values, outputs and one number a
head (arXiv 2205.14135, section 3: no scores). `bench.memory.saved_bytes` of the same model is what tests hold them to.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from switchkit.attention import Attention, CrossAttention, LatentAttention
from switchkit.blocks import Block
from switchkit.dispatch.einsum import Einsum
from switchkit.dispatch.padded import Padded
from switchkit.experts.base import Experts
from switchkit.experts.feed_forward import GatedMlp, Mlp
from switchkit.experts.linear import Linear
from switchkit.experts.shared import Shared
from switchkit.layers import FeedForward, MoELayer, moe_layers
from switchkit.models import EncoderDecoder
from switchkit.plan.hardware import Precision

__all__ = ["Activations", "activations", "rows_of"]


@dataclass(frozen=True)
class Activations:
    """Bytes on one device. A block's input is the first of what it keeps."""

    blocks: tuple[int, ...]
    """Kept by each block."""
    inputs: tuple[int, ...]
    """Of them, the inputs: all that is kept where blocks are computed again in the backward pass."""
    records: int
    """What the sparse layers decided, until the losses have read it."""
    output: int
    """Kept by the last norm, the output layer and the cross-entropy."""
    loss: int
    """More that the logits take while the loss and its gradient are computed."""

    def kept(self, checkpointing: bool) -> int:
        """What autograd holds when the backward pass begins."""
        return sum(self.inputs if checkpointing else self.blocks) + self.output

    def most(self, checkpointing: bool) -> int:
        """The largest sum at any time: at the loss, or with the largest block computed again."""
        again = max(self.blocks, default=0) if checkpointing else 0
        return self.kept(checkpointing) + self.records + max(self.loss, again)


def activations(
    model: nn.Module, batch: int, context: int, precision: Precision, imbalance: float = 1.0
) -> Activations:
    """What a model keeps of `batch` sequences of `context` tokens; of an encoder-decoder's, on both sides.

    `imbalance` is how many times the mean number of rows the experts of this device get.
    """
    tokens = batch * context
    found = [part for part in model.modules() if isinstance(part, Block)]
    width, vocabulary = _width(model), int(getattr(model, "vocab_size", 0))
    blocks = tuple(_block(block, batch, context, precision, imbalance, model) for block in found)
    records = sum(tokens * (4 * layer.num_experts + 40 * layer.router.k) for layer in moe_layers(model).values())
    norm = tokens * (precision.stream * width + 8)
    ends = 2 if isinstance(model, EncoderDecoder) else 1
    half = precision.product < 4
    return Activations(
        blocks=blocks,
        inputs=(precision.stream * tokens * width,) * len(found),
        records=records,
        # In float32: log-probabilities are what the cross-entropy keeps.
        output=ends * norm + tokens * (precision.product * width + 4 * vocabulary),
        loss=tokens * vocabulary * (precision.product + (4 if half else 0)),
    )


def rows_of(layer: MoELayer, batch: int, context: int) -> int:
    """Rows that the experts of a layer get from `batch` sequences, drops not taken off.

    A dispatcher with buffers fills them up to the capacity (`Padded` on a GPU; without a capacity to all assignments).
    Where experts choose, or work on mixtures, each has as many rows as the next: these fill the buffers already.
    """
    _, groups, rows, limit = _routed(layer, batch, context)
    if isinstance(layer.dispatcher, (Padded, Einsum)) and not layer.router.full:
        rows = layer.num_experts * (rows if limit is None else min(rows, limit))
    return groups * rows


def _routed(layer: MoELayer, batch: int, context: int) -> tuple[int, int, int, int | None]:
    """Tokens of a group, groups, assignments of each, and the capacity."""
    tokens = batch * context
    size = tokens if layer.group == "batch" else layer.group if isinstance(layer.group, int) else context
    limit = layer.capacity.limit(size, layer.num_experts, layer.router.k, training=True)
    return size, -(-tokens // size), layer.router.rows(size, limit), limit


def _width(model: nn.Module) -> int:
    return int(getattr(model, "d_model", 0))


def _block(block: Block, batch: int, context: int, precision: Precision, imbalance: float, model: nn.Module) -> int:
    """Norms keep their inputs, which the residual stream is; then the parts."""
    tokens, stream, width = batch * context, precision.stream, _width(model)
    norms = 2 if block.cross is None else 3
    kept = norms * tokens * (stream * width + 8)
    if block.dropout:
        # A mask of one byte for each entry.
        kept += norms * tokens * width
    kept += _attention(block.attention, batch, context, precision, imbalance, width)
    if block.cross is not None:
        kept += _cross(block.cross, tokens, precision, width)
    if isinstance(model, EncoderDecoder):
        # The bias of the scores, which all sequences share.
        kept += precision.product * int(getattr(block.attention, "num_heads", 1)) * context**2
    if isinstance(block.mlp, MoELayer):
        return kept + _mixture(block.mlp, batch, context, precision, imbalance)
    return kept + _dense(block.mlp, tokens, precision, width)


def _attention(part: nn.Module, batch: int, context: int, precision: Precision, imbalance: float, width: int) -> int:
    tokens, product = batch * context, precision.product
    if isinstance(part, LatentAttention):
        query, key = part.num_heads * (part.nope_width + part.rope_width), part.num_heads * part.nope_width
        value = part.num_heads * part.v_width
        # The latents before and after their norms; queries and keys put together; values beside the keys they came
        # with; outputs.
        latents = 2 * (part.q_rank or 0) + 2 * part.kv_rank + part.rope_width
        return tokens * (product * (width + latents + 2 * query + key + 2 * value) + 4 * part.num_heads)
    if not isinstance(part, Attention):
        raise ValueError(f"the activations of {type(part).__name__} are not known: attention or latent attention are")
    heads, values = part.num_heads * part.head_width, part.num_kv_heads * part.head_width
    # All three side by side, of which values are a view; queries and keys once more where they are turned.
    mixed = heads + 2 * values
    turned = (heads + values) * (1 if part.rotary else 0) + (heads + values) * (1 if part.qk_norm else 0)
    kept = tokens * (product * (mixed + turned + heads) + 4 * part.num_heads)
    if isinstance(part.qkv, nn.ModuleList):
        layers = [layer for layer in part.qkv if isinstance(layer, MoELayer)]
        # In float32 already, the routers' input is one tensor for all of them.
        same = (len(layers) - 1) * tokens * 4 * width if precision.stream == 4 else 0
        return kept - same + sum(_mixture(layer, batch, context, precision, imbalance) for layer in layers)
    return kept + tokens * product * width


def _cross(part: CrossAttention, tokens: int, precision: Precision, width: int) -> int:
    heads = part.num_heads * part.head_width
    # Its input and the encoder's output; queries, keys, values, outputs.
    return tokens * (precision.product * (2 * width + 4 * heads) + 4 * part.num_heads)


def _dense(part: nn.Module, tokens: int, precision: Precision, width: int) -> int:
    if not isinstance(part, FeedForward):
        linear = [m for m in part.modules() if isinstance(m, nn.Linear)]
        return tokens * precision.product * sum(m.in_features + m.out_features for m in linear)
    hidden = part.up.out_features
    return tokens * _hidden(width, hidden, precision, part.activation, part.gate is not None, part.dropout)


def _hidden(width: int, hidden: int, precision: Precision, activation: str, gated: bool, dropout: float) -> int:
    """Of one row: the input and what lies between the two products. ReLU keeps what it lets through, which is the input
    of the second product; a gate keeps both halves, the activation and the product; others input and output."""
    between = 4 * hidden if gated else hidden if activation == "relu" else 2 * hidden
    masked = hidden * (precision.product + 1) if dropout else 0
    return precision.product * (width + between) + masked


def _mixture(layer: MoELayer, batch: int, context: int, precision: Precision, imbalance: float) -> int:
    """Indices of the choices; rows in and between; of a router that learns its input in float32 and its probabilities,
    and rows out, from which its weights have their gradient."""
    tokens, experts = batch * context, layer.experts
    rows = rows_of(layer, batch, context)
    kept = 32 * tokens * layer.router.k + round(rows * imbalance * _row(experts, precision))
    learns = next(layer.router.parameters(), None) is not None
    if learns:
        kept += tokens * (4 * layer.d_model + 4 * layer.num_experts) + rows * precision.product * layer.d_model
    if isinstance(experts, Shared):
        kept += tokens * (
            _row(experts.shared, precision) + (precision.product * layer.d_model if experts.how != "sum" else 0)
        )
    if isinstance(layer.dispatcher, Einsum):
        # Its two masks say for each token and each place whether they go together; from what the second is made of, a
        # row of ones and zeros for the token, the expert and the place of each assignment, weights have their gradient.
        size, groups, each, _ = _routed(layer, batch, context)
        made_of = each * (groups * (size + layer.num_experts) + rows // layer.num_experts) if learns else 0
        kept += precision.product * (2 * size * rows + made_of)
    return kept


def _row(experts: Experts, precision: Precision) -> int:
    """What experts keep of one row."""
    if isinstance(experts, Shared):
        experts = experts.routed
    if isinstance(experts, (Mlp, GatedMlp)):
        return _hidden(
            experts.d_model, experts.d_ff, precision, experts.activation, isinstance(experts, GatedMlp), experts.dropout
        )
    if isinstance(experts, Linear):
        return precision.product * experts.d_model
    stacks = [p for p in experts.parameters() if p.dim() == 3]
    each = sum(p.shape[0] * (p.shape[1] + p.shape[2]) for p in stacks)
    return round(precision.product * each / experts.num_experts)
