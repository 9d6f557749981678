"""Attention whose keys and values come from a latent of low rank."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from switchkit.attention.positions import turned, turns
from switchkit.attention.scores import KeyValues, attend_after
from switchkit.checks import at_least
from switchkit.experts.base import init_linear
from switchkit.records import Routing

__all__ = ["LatentAttention"]


class LatentAttention(nn.Module):
    """Multi-head latent attention: keys and values come from a latent of low rank (DeepSeek-V2 and V3).

    A head's query and key have a part without position and a rotated part; the rotated part of the key is one for all
    heads. The scores are scaled by ``(nope_width + rope_width) ** -0.5``.

    Args:
        d_model: width of a token, D.
        num_heads: heads.
        kv_rank: width of the latent of keys and values.
        nope_width: width of a head's part without position.
        rope_width: width of its rotated part.
        v_width: width of a head's value.
        q_rank: width of the latent of queries; null: none, one matrix.
        rope_base: base of the turning angles.
        interleaved: the pairs that turn are neighbours (DeepSeek's checkpoints), not half the width apart.
        norm_eps: of the norms of the latents.
        dropout: of the attention weights.
        rotary: must be true: the part without position alone could not tell the order of tokens.
        causal: a token sees itself and those before it; false: all of them (a `Decoder` needs `allow_leak` for it).

    Raises:
        ValueError: a size below 1, an odd rope_width, rotary false.

    Source: arXiv 2405.04434, equations 9 to 19.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        kv_rank: int,
        nope_width: int,
        rope_width: int,
        v_width: int,
        q_rank: int | None = None,
        rope_base: float = 10_000.0,
        interleaved: bool = True,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        rotary: bool = True,
        causal: bool = True,
    ) -> None:
        super().__init__()
        at_least(1, num_heads=num_heads, kv_rank=kv_rank, nope_width=nope_width, v_width=v_width, rope_width=rope_width)
        if q_rank is not None:
            at_least(1, q_rank=q_rank)
        if rope_width % 2 or not rotary:
            raise ValueError(
                f"latent attention needs rotary positions and an even rope_width; got positions "
                f"{'rotary' if rotary else 'other than rotary'} and rope_width {rope_width}"
            )
        self.num_heads, self.kv_rank, self.nope_width = num_heads, kv_rank, nope_width
        self.rope_width, self.v_width, self.rope_base = rope_width, v_width, rope_base
        self.interleaved, self.dropout, self.causal = interleaved, dropout, causal
        query = num_heads * (nope_width + rope_width)
        if q_rank is None:
            self.q = nn.Linear(d_model, query, bias=False)
        else:
            self.q_down = nn.Linear(d_model, q_rank, bias=False)
            self.q_norm = nn.RMSNorm(q_rank, eps=norm_eps)
            self.q_up = nn.Linear(q_rank, query, bias=False)
        self.q_rank = q_rank
        self.kv_down = nn.Linear(d_model, kv_rank + rope_width, bias=False)
        self.kv_norm = nn.RMSNorm(kv_rank, eps=norm_eps)
        self.kv_up = nn.Linear(kv_rank, num_heads * (nope_width + v_width), bias=False)
        self.out = nn.Linear(num_heads * v_width, d_model, bias=False)
        for part in self.children():
            if isinstance(part, nn.Linear):
                init_linear(part.weight, part.in_features)

    def places(self, x: Float[Tensor, "B S D"], start: int = 0) -> tuple[Tensor, Tensor]:
        """How the rotated parts of the S tokens from place `start` turn."""
        return turns(x, self.rope_width, self.rope_base, start)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        valid: Bool[Tensor, "B S"] | None = None,
        ids: Int[Tensor, "B S"] | None = None,
        *,
        see: Bool[Tensor, "#B 1 S K"] | None = None,
        bias: Float[Tensor, "1 H S K"] | None = None,
        past: KeyValues | None = None,
        places: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Float[Tensor, "B S D"], tuple[Routing, ...], KeyValues | None]:
        """As `Attention.forward`; there are no records."""
        batch, size, _ = x.shape
        start = 0 if past is None else past.length
        q = self.q(x) if self.q_rank is None else self.q_up(self.q_norm(self.q_down(x)))
        q = q.view(batch, size, self.num_heads, self.nope_width + self.rope_width)
        latent, shared = self.kv_down(x).split_with_sizes((self.kv_rank, self.rope_width), dim=-1)
        kv = self.kv_up(self.kv_norm(latent)).view(batch, size, self.num_heads, self.nope_width + self.v_width)
        k, v = kv.split_with_sizes((self.nope_width, self.v_width), dim=-1)
        q, q_turned = q.split_with_sizes((self.nope_width, self.rope_width), dim=-1)
        both = torch.cat([q_turned, shared.unsqueeze(2)], 2)
        if self.interleaved:
            both = both.view(*both.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2)
        both = turned(both, *(places or self.places(x, start)))
        q_turned, k_turned = both.split_with_sizes((self.num_heads, 1), dim=2)
        q = torch.cat([q, q_turned], -1).transpose(1, 2)
        k = torch.cat([k, k_turned.expand_as(q_turned)], -1).transpose(1, 2)
        v = v.transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y, past = attend_after(q, k, v, past, valid, see=see, bias=bias, causal=self.causal, dropout=dropout)
        return self.out(y.transpose(1, 2).flatten(-2)), (), past
