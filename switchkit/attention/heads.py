"""Attention over the sequence itself, and over another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from switchkit.attention.positions import turned, turns
from switchkit.attention.scores import KeyValues, attend, attend_after
from switchkit.checks import at_least, one_of
from switchkit.experts.base import init_linear
from switchkit.layers import MoELayer
from switchkit.records import Routing

__all__ = ["Attention", "AttentionFactory", "CrossAttention"]

ROPE_BASE = 10_000.0


class AttentionFactory(Protocol):
    """Anything that builds self-attention for given sizes: a class, a `functools.partial`, a YAML part."""

    def __call__(self, *, d_model: int, num_heads: int, dropout: float = ..., rotary: bool) -> nn.Module: ...


class Attention(nn.Module):
    """Self-attention over H heads by PyTorch's scaled dot product.

    Args:
        d_model: width of a token, D.
        num_heads: heads of the queries.
        num_kv_heads: heads of keys and values, each shared by the same number of query heads (grouped-query attention,
            arXiv 2305.13245); null: as many as queries.
        head_width: width of a head; null: d_model / num_heads.
        dropout: of the attention weights.
        rotary: turn queries and keys by their positions (arXiv 2104.09864, equation 34).
        rope_base: base of the turning angles; 10,000 as in the paper.
        qk_norm: RMS norm of queries and keys before they are turned: within each "head" (Qwen3), or over the "whole"
            projection (OLMoE); null: none.
        norm_eps: of that norm.
        bias: add one to queries, keys and values (Qwen2).
        scale: of the scores; null: ``head_width ** -0.5``. T5 has 1.
        causal: a token sees itself and those before it; false: all of them (a `Decoder` needs `allow_leak` for it).
        init_scale: the matrices start as a truncated normal, std ``sqrt(init_scale / fan_in)``; 0.1 as in section 2.4
            of arXiv 2101.03961.
        projection: builds three sparse layers in place of the matrices for queries, keys and values (Switch attention,
            arXiv 2101.03961, appendix A).

    Raises:
        ValueError: head counts that do not divide, an odd head width with rotary positions, another word for qk_norm,
            a rope_base without rotary positions, a projection together with options it has no place for.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_width: int | None = None,
        dropout: float = 0.0,
        rotary: bool = False,
        rope_base: float = ROPE_BASE,
        qk_norm: Literal["head", "whole"] | None = None,
        norm_eps: float = 1e-6,
        bias: bool = False,
        scale: float | None = None,
        causal: bool = True,
        init_scale: float = 0.1,
        projection: Callable[[], MoELayer] | None = None,
    ) -> None:
        super().__init__()
        width = _head_width(d_model, num_heads, head_width)
        kv = num_heads if num_kv_heads is None else num_kv_heads
        if kv < 1 or num_heads % kv:
            raise ValueError(f"num_kv_heads={kv} does not divide num_heads={num_heads}: choose a divisor of it")
        if rope_base != ROPE_BASE and not rotary:
            raise ValueError(
                f"rope_base={rope_base} does nothing without rotary positions: leave it out, or set rotary=True (of a "
                "Decoder positions='rotary')"
            )
        if rotary and width % 2:
            raise ValueError(f"rotary positions need heads of even width; got {width}")
        one_of("qk_norm", qk_norm, (None, "head", "whole"))
        if projection is not None and (kv != num_heads or num_heads * width != d_model or bias):
            raise ValueError(
                "sparse projections of attention have d_model outputs each and no bias: "
                "leave num_kv_heads, head_width and bias out, or sparse_attention"
            )
        self.num_heads, self.num_kv_heads, self.head_width = num_heads, kv, width
        self.dropout, self.rotary, self.rope_base, self.scale, self.causal = dropout, rotary, rope_base, scale, causal
        self.qkv: nn.Module
        if projection is None:
            self.qkv = nn.Linear(d_model, (num_heads + 2 * kv) * width, bias=bias)
            init_linear(self.qkv.weight, d_model, init_scale)
            if bias:
                nn.init.zeros_(self.qkv.bias)
        else:
            self.qkv = nn.ModuleList(projection() for _ in range(3))
        self.out = nn.Linear(num_heads * width, d_model, bias=False)
        init_linear(self.out.weight, num_heads * width, init_scale)
        self.qk_norm = qk_norm
        if qk_norm is not None:
            whole = qk_norm == "whole"
            self.q_norm = nn.RMSNorm(num_heads * width if whole else width, eps=norm_eps)
            self.k_norm = nn.RMSNorm(kv * width if whole else width, eps=norm_eps)

    def places(self, x: Float[Tensor, "B S D"], start: int = 0) -> tuple[Tensor, Tensor] | None:
        """How queries and keys of the S tokens from place `start` turn; null: they do not."""
        return turns(x, self.head_width, self.rope_base, start) if self.rotary else None

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
        """The output, the records of sparse projections, and the keys and values of all tokens where `past` is given.

        `see`: which of the K tokens, past and present, each token may attend to; without it what `causal` and `valid`
        say. `bias` is added to the scores. `places` is what `places` gives, for layers alike to share.
        """
        routings: tuple[Routing, ...] = ()
        if isinstance(self.qkv, nn.ModuleList):
            results = [layer(x, valid, ids) for layer in self.qkv]
            routings = tuple(routing for _, routing in results)
            mixed = torch.cat([y for y, _ in results], dim=-1)
        else:
            mixed = self.qkv(x)
        width, heads, kv = self.head_width, self.num_heads, self.num_kv_heads
        both, v = mixed.split_with_sizes(((heads + kv) * width, kv * width), dim=-1)
        if self.qk_norm == "whole":
            q, k = both.split_with_sizes((heads * width, kv * width), dim=-1)
            both = torch.cat([self.q_norm(q), self.k_norm(k)], -1)
        both = both.view(*x.shape[:2], heads + kv, width)
        if self.qk_norm == "head":
            both = torch.cat([self.q_norm(both[:, :, :heads]), self.k_norm(both[:, :, heads:])], 2)
        start = 0 if past is None else past.length
        if self.rotary:
            # Queries and keys at once, and before the heads come first: less memory to walk through.
            both = turned(both, *(places or turns(x, width, self.rope_base, start)))
        q, k = both.transpose(1, 2).split_with_sizes((heads, kv), dim=1)
        v = v.view(*x.shape[:2], kv, width).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y, past = attend_after(
            q, k, v, past, valid, see=see, bias=bias, causal=self.causal, dropout=dropout, scale=self.scale
        )
        return self.out(y.transpose(1, 2).flatten(-2)), routings, past


class CrossAttention(nn.Module):
    """Attention of one sequence over another: queries from x, keys and values from `memory`. Options as `Attention`."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        head_width: int | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        width = _head_width(d_model, num_heads, head_width)
        self.num_heads, self.head_width, self.dropout, self.scale = num_heads, width, dropout, scale
        self.q = nn.Linear(d_model, num_heads * width, bias=False)
        self.kv = nn.Linear(d_model, 2 * num_heads * width, bias=False)
        self.out = nn.Linear(num_heads * width, d_model, bias=False)
        for matrix in (self.q, self.kv, self.out):
            init_linear(matrix.weight, matrix.in_features)

    def key_values(self, memory: Float[Tensor, "B P D"]) -> KeyValues:
        """Of the other sequence: the same for every token of this one."""
        kv = self.kv(memory).view(*memory.shape[:2], 2, self.num_heads, self.head_width)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return KeyValues(k, v)

    def forward(
        self, x: Float[Tensor, "B S D"], memory: KeyValues, see: Bool[Tensor, "B 1 1 P"] | None = None
    ) -> Float[Tensor, "B S D"]:
        """`see`: which tokens of the other sequence are real; null: all."""
        k, v = memory.both
        q = self.q(x).view(*x.shape[:2], self.num_heads, self.head_width).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, see=see, dropout=dropout, scale=self.scale)
        return self.out(y.transpose(1, 2).flatten(-2))


def _head_width(d_model: int, num_heads: int, head_width: int | None) -> int:
    at_least(1, num_heads=num_heads)
    if head_width is None:
        if d_model % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide d_model={d_model}: choose a divisor of it")
        return d_model // num_heads
    at_least(1, head_width=head_width)
    return head_width
