"""Scaled dot products, what may be seen, and the keys and values that are kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["KeyValues", "attend", "attend_after", "seen", "visible"]


@dataclass
class Room:
    """Memory for keys and values of more tokens than there are, of which `used` have been written."""

    k: Float[Tensor, "B KV R W"]
    v: Float[Tensor, "B KV R Wv"]
    used: int = 0

    def takes(self, start: int, end: int) -> bool:
        """Whether tokens `start` to `end` may be written here without a change to what another one reads."""
        # What inference mode has made it alone may change.
        ours = torch.is_inference_mode_enabled() or not self.k.is_inference()
        return ours and self.used == start and end <= self.k.shape[2]


@dataclass(frozen=True)
class KeyValues:
    """Keys [B, KV, P, W] and values [B, KV, P, Wv] of the P tokens that an attention layer has seen; none at first."""

    k: Float[Tensor, "B KV P W"] | None = None
    v: Float[Tensor, "B KV P Wv"] | None = None
    room: Room | None = field(default=None, repr=False, compare=False)
    """Where they lie, with room for the tokens that follow; null: no room."""

    @property
    def length(self) -> int:
        return 0 if self.k is None else self.k.shape[2]

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """Keys and values, of one token at least."""
        assert self.k is not None
        assert self.v is not None
        return self.k, self.v

    def extended(self, k: Float[Tensor, "B KV S W"], v: Float[Tensor, "B KV S Wv"]) -> KeyValues:
        """These and those of S more tokens.

        Without gradients they are written behind these where there is room, and room for as many again is made where
        there is none, so that a token does not cost a copy of all before it. These stay as they are: only the first to
        follow them finds the room behind them free.
        """
        if self.k is None:
            return KeyValues(k, v)
        keys, values = self.both
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return KeyValues(torch.cat([keys, k], 2), torch.cat([values, v], 2))
        start, end, room = self.length, self.length + k.shape[2], self.room
        if room is None or not room.takes(start, end):
            larger = [x.new_empty(*x.shape[:2], 2 * end, x.shape[3]) for x in (keys, values)]
            room = Room(larger[0], larger[1])
            room.k[:, :, :start], room.v[:, :, :start] = keys, values
        room.k[:, :, start:end], room.v[:, :, start:end] = k, v
        room.used = end
        return KeyValues(room.k[:, :, :end], room.v[:, :, :end], room)

    def select(self, index: Int[Tensor, "rows"]) -> KeyValues:
        """Those of some rows of the batch, in that order."""
        if self.k is None:
            return self
        keys, values = self.both
        return KeyValues(keys.index_select(0, index), values.index_select(0, index))


def attend(
    q: Float[Tensor, "B H S W"],
    k: Float[Tensor, "B KV K W"],
    v: Float[Tensor, "B KV K Wv"],
    *,
    see: Bool[Tensor, "#B 1 #S K"] | None = None,
    bias: Float[Tensor, "1 H S K"] | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Float[Tensor, "B H S Wv"]:
    """``softmax(scale q k^T + bias) v`` over what each query may see.

    One that sees nothing gets zeros, with a bias the mean of v.
    """
    grouped = q.shape[1] != k.shape[1]
    if bias is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=see, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    if causal:
        own = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        see = own if see is None else see & own
    bias = bias.to(q.dtype)
    # Not -inf: a row that sees nothing stays finite.
    mask = bias if see is None else bias.masked_fill(~see, torch.finfo(q.dtype).min)
    if q.device.type == "cpu" and mask.requires_grad and not grouped:
        # On a CPU the fused kernel gives a mask no gradient, and what PyTorch falls back to is slower than this.
        scores = torch.matmul(q if scale == 1 else q * (scale or q.shape[-1] ** -0.5), k.transpose(-1, -2)) + mask
        return F.dropout(scores.softmax(-1), dropout, dropout > 0) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=grouped)


def attend_after(
    q: Float[Tensor, "B H S W"],
    k: Float[Tensor, "B KV S W"],
    v: Float[Tensor, "B KV S Wv"],
    past: KeyValues | None,
    valid: Bool[Tensor, "B S"] | None,
    *,
    see: Bool[Tensor, "#B 1 S K"] | None,
    bias: Float[Tensor, "1 H S K"] | None,
    causal: bool,
    dropout: float,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H S Wv"], KeyValues | None]:
    """`attend` of S tokens over themselves and what came before, and the keys and values of all where `past` is given.

    `see` None: what `causal` and `valid` say, after real tokens.
    """
    start = 0 if past is None else past.length
    if past is not None:
        past = past.extended(k, v)
        k, v = past.both
    if see is None:
        see = seen(q.shape[2], valid, causal=causal, past=start, device=q.device)
    own = causal and see is None and not start
    return attend(q, k, v, see=see, bias=bias, causal=own, dropout=dropout, scale=scale), past


def visible(
    size: int,
    valid: Bool[Tensor, "B K"] | None,
    *,
    causal: bool,
    past: int = 0,
    device: torch.device | None = None,
) -> Bool[Tensor, "#B 1 S K"]:
    """Which of the K = past + size tokens each of the last `size` may attend to: real ones, and none after it."""
    see = torch.ones(size, past + size, dtype=torch.bool, device=device)
    own = torch.eye(size, dtype=torch.bool, device=device)
    if past:
        own = F.pad(own, (past, 0))
    if causal:
        see = see.tril(past)
    if valid is None:
        return see.view(1, 1, size, past + size)
    # A token may always see itself, so that padding has something to attend to and stays finite.
    return ((see & valid.unsqueeze(1)) | own).unsqueeze(1)


def seen(
    size: int, valid: Bool[Tensor, "B S"] | None, *, causal: bool, past: int = 0, device: torch.device | None = None
) -> Bool[Tensor, "#B 1 S K"] | None:
    """As `visible`, after `past` real tokens; null where the kernel's own causal mask, or none, says the same."""
    if valid is None:
        return visible(size, None, causal=True, past=past, device=device) if causal and past and size > 1 else None
    if past:
        valid = torch.cat([valid.new_ones(len(valid), past), valid], 1)
    return visible(size, valid, causal=causal, past=past, device=valid.device)
