"""The transformer block, dense or sparse."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from switchkit.attention import CrossAttention, KeyValues
from switchkit.layers import MoELayer
from switchkit.records import Routing

__all__ = ["Block", "Norm", "Past", "make_norm"]

Norm = Literal["layer", "rms"]


def make_norm(kind: Norm, width: int, eps: float | None = None) -> nn.Module:
    """A layer norm without bias (eps 1e-5), or an RMS norm (eps 1e-6, as T5 and llama have)."""
    if kind == "layer":
        return nn.LayerNorm(width, eps=1e-5 if eps is None else eps, bias=False)
    if kind == "rms":
        return nn.RMSNorm(width, eps=1e-6 if eps is None else eps)
    raise ValueError(f"norm must be 'layer' or 'rms'; got {kind!r}")


@dataclass(frozen=True)
class Past:
    """What a block keeps of the tokens it has seen, and of the encoder's where it attends to them."""

    attention: KeyValues = field(default_factory=KeyValues)
    cross: KeyValues | None = None

    def select(self, index: Int[Tensor, "rows"]) -> Past:
        """That of some rows of the batch, in that order."""
        return Past(self.attention.select(index), None if self.cross is None else self.cross.select(index))


class Block(nn.Module):
    """Pre-norm transformer block; `mlp` is a dense layer or a sparse one, `cross` attends to an encoder's output.

    Returns the records of its sparse layers, and what it keeps where `past` is given. The encoder's output, `memory`,
    is looked at only where `past` does not hold it.
    """

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        d_model: int,
        *,
        cross: CrossAttention | None = None,
        dropout: float = 0.0,
        norm: Norm = "layer",
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = make_norm(norm, d_model, norm_eps)
        self.attention = attention
        if cross is not None:
            self.cross_norm = make_norm(norm, d_model, norm_eps)
        self.cross = cross
        self.mlp_norm = make_norm(norm, d_model, norm_eps)
        self.mlp = mlp
        self.dropout = dropout

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        valid: Bool[Tensor, "B S"] | None = None,
        ids: Int[Tensor, "B S"] | None = None,
        *,
        see: Bool[Tensor, "#B 1 S K"] | None = None,
        bias: Float[Tensor, "1 H S K"] | None = None,
        memory: Float[Tensor, "B M D"] | None = None,
        memory_see: Bool[Tensor, "B 1 1 M"] | None = None,
        past: Past | None = None,
        places: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Float[Tensor, "B S D"], tuple[Routing, ...], Past | None]:
        before = None if past is None else past.attention
        # Attention without rotary positions need not know of them.
        more = {} if places is None else {"places": places}
        h, routings, now = self.attention(self.attention_norm(x), valid, ids, see=see, bias=bias, past=before, **more)
        x = x + self._drop(h)
        kept = None if past is None else past.cross
        if self.cross is not None:
            if kept is None:
                assert memory is not None
                kept = self.cross.key_values(memory)
            x = x + self._drop(self.cross(self.cross_norm(x), kept, memory_see))
        h = self.mlp_norm(x)
        if isinstance(self.mlp, MoELayer):
            h, routing = self.mlp(h, valid, ids)
            routings = (*routings, routing)
        else:
            h = self.mlp(h)
        return x + self._drop(h), routings, None if past is None else Past(now, kept)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x
