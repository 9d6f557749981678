"""The decoder: a causal language model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from switchkit.attention import Attention, AttentionFactory, LatentAttention, visible
from switchkit.blocks import Block, Norm, make_norm
from switchkit.checks import at_least, from_0_below_1, one_of
from switchkit.experts.linear import Linear
from switchkit.layers import FeedForward, FeedForwardFactory, MoEFactory, MoELayer
from switchkit.models.base import (
    Cache,
    Output,
    check_cache,
    dense_layer,
    layer_widths,
    leak,
    own_options,
    sparse_layers,
    through,
    uncacheable,
)

__all__ = ["Decoder"]


class Decoder(nn.Module):
    """A causal language model of pre-norm blocks, some of them sparse.

    The llama family is `norm` "rms", `tied` as the checkpoint has it, `feed_forward` `FeedForward` with gated true and
    activation silu, and `attention` `Attention` with its options (grouped queries, norm of queries and keys), or
    `LatentAttention` (DeepSeek).

    Args:
        vocab_size: symbols of the vocabulary.
        d_model: width of a token.
        num_layers: blocks.
        num_heads: attention heads of a block, a divisor of d_model.
        d_ff: hidden width of a dense block; a list: of each block's dense layer.
        num_experts: experts of a sparse block.
        expert_d_ff: hidden width of one expert; null: d_ff of its block.
        context: longest sequence, in tokens.
        sparse: which blocks are sparse: "every(n)", "last(n)" or a list of indices; [] makes the model dense.
        sparse_attention: which blocks have sparse layers in place of their query, key and value matrices, said as
            `sparse` is; null: none. Attention of another kind takes them as an argument `projection`, as `Attention`.
        positions: "rotary" (turned queries and keys) or "learned" (an embedding per position).
        dropout: on embeddings, attention (unless `attention` is given its own) and the outputs of sublayers; on hidden
            activations only what is given with `feed_forward`. Expert dropout is the experts' own option.
        norm: "layer" (without bias) or "rms".
        norm_eps: added to the variance; null: 1e-5 for "layer", 1e-6 for "rms".
        tied: the output layer shares the weights of the embedding.
        attention: builds the attention; null: `Attention` with its defaults.
        feed_forward: builds the dense layers; null: `FeedForward` with its defaults.
        moe: builds the sparse layers; null: `MoELayer` with its defaults.
        attention_moe: builds those in attention, with d_ff = d_model; null: `MoELayer` with experts `linear`.
        allow_leak: accept a part that lets the model see the future (its training loss then means little).

    Raises:
        ValueError: sizes that do not fit, a placement that does not exist, attention without a place for sparse layers,
            or with positions of its own, attention_moe without a place, a part that sees the future.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        d_model: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        d_ff: int | list[int] = 512,
        num_experts: int = 8,
        expert_d_ff: int | None = None,
        context: int = 128,
        sparse: str | list[int] = "every(2)",
        sparse_attention: str | list[int] | None = None,
        positions: Literal["rotary", "learned"] = "rotary",
        dropout: float = 0.0,
        norm: Norm = "layer",
        norm_eps: float | None = None,
        tied: bool = True,
        attention: AttentionFactory | None = None,
        feed_forward: FeedForwardFactory | None = None,
        moe: MoEFactory | None = None,
        attention_moe: MoEFactory | None = None,
        allow_leak: bool = False,
    ) -> None:
        super().__init__()
        at_least(1, vocab_size=vocab_size, d_model=d_model, num_layers=num_layers, num_heads=num_heads, context=context)
        if expert_d_ff is not None:
            at_least(1, expert_d_ff=expert_d_ff)
        one_of("positions", positions, ("rotary", "learned"))
        from_0_below_1(dropout=dropout)
        self.vocab_size, self.d_model, self.context, self.num_experts = vocab_size, d_model, context, num_experts
        self.dense: FeedForwardFactory = feed_forward or FeedForward
        self.d_ff = layer_widths(d_ff, num_layers)
        self.sparse = sparse_layers(sparse, num_layers)
        self.sparse_attention = sparse_layers(sparse_attention or [], num_layers)
        project = partial(
            attention_moe or partial(MoELayer, experts=Linear), d_model=d_model, num_experts=num_experts, d_ff=d_model
        )
        if attention_moe is not None and not self.sparse_attention:
            raise ValueError(
                "attention_moe does nothing without sparse_attention: say which blocks have sparse attention, such as "
                "every(2), or leave it out"
            )
        rotary = positions == "rotary"
        own = own_options(attention)
        if own.get("rotary", rotary) != rotary:
            raise ValueError(
                f"attention has rotary={own['rotary']}, and positions={positions!r}: leave rotary out, which follows "
                "positions"
            )
        build = partial(
            attention or Attention,
            d_model=d_model,
            num_heads=num_heads,
            dropout=own.get("dropout", dropout),
            rotary=rotary,
        )
        if self.sparse_attention and not _takes_projections(build):
            name = getattr(build.func, "__name__", type(build.func).__name__)
            raise ValueError(
                f"sparse_attention={sparse_attention!r} takes the place of the matrices of `Attention`, by its option "
                f"projection; {name} has none: leave sparse_attention out, or take `Attention`"
            )
        self.embed = nn.Embedding(vocab_size, d_model)
        self.position = nn.Embedding(context, d_model) if positions == "learned" else None
        self.blocks = nn.ModuleList()
        for index, wide in enumerate(self.d_ff):
            mlp = (
                (moe or MoELayer)(d_model=d_model, num_experts=num_experts, d_ff=expert_d_ff or wide)
                if index in self.sparse
                else dense_layer(self.dense, d_model, wide, 0.0)
            )
            if index in self.sparse_attention:
                build_sparse: Callable[..., nn.Module] = partial(build, projection=project)
                heads = build_sparse()
            else:
                heads = build()
            self.blocks.append(Block(heads, mlp, d_model, dropout=dropout, norm=norm, norm_eps=norm_eps))
        # Attention of one's own that does not say is taken to be causal: it is given which tokens to see.
        self.causal = all(getattr(block.attention, "causal", True) for block in self.blocks)
        self.allow_leak = allow_leak
        if not allow_leak and (why := leak(self) or self._sees_later) is not None:
            raise ValueError(f"{why}: a causal model would see the future. Choose another part, or say allow_leak")
        self.norm = make_norm(norm, d_model, norm_eps)
        self.head = None if tied else nn.Linear(d_model, vocab_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        # The output layer may share these weights, so they start at the scale of one.
        for table in (self.embed, self.position, self.head):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    @property
    def uncacheable(self) -> str | None:
        """Why a cache would change what the model computes; None: it would not."""
        return uncacheable(self) or self._sees_later

    @property
    def _sees_later(self) -> str | None:
        return None if self.causal else "attention with causal false lets each token see later ones"

    def forward(
        self, tokens: Int[Tensor, "B S"], valid: Bool[Tensor, "B S"] | None = None, cache: Cache | None = None
    ) -> Output:
        """Logits of the next token at every place. `valid`: True for real tokens, which alone are seen and counted.

        With `cache`, ``Cache()`` at first, the tokens follow those that it holds, and the output has one that holds
        these too.

        Raises:
            ValueError: a sequence longer than the context; a cache for a model that would compute something else with
                it (see `uncacheable`).
        """
        size = tokens.shape[1]
        start = 0 if cache is None else cache.length
        if start + size > self.context:
            raise ValueError(f"the sequence has {start + size} tokens, but context={self.context}: shorten it")
        check_cache(self.uncacheable if cache is not None and not cache.layers else None)
        known = valid if cache is None else cache.with_valid(valid, len(tokens), size)
        x = self.embed(tokens)
        if self.position is not None:
            place = torch.arange(start, start + size, device=tokens.device)
            if known is not None:
                place = (known.cumsum(-1) - 1)[:, start:]
            x = x + self.position(place.clamp(min=0))
        see = None
        if known is not None or (start and size > 1):
            see = visible(size, known, causal=self.causal, past=start, device=tokens.device)
        x = self.dropout(x)
        # The blocks' attention is alike: where tokens stand is worked out once.
        first = self.blocks[0].attention
        places = first.places(x, start) if isinstance(first, (Attention, LatentAttention)) else None
        x, routings, layers = through(self.blocks, x, valid, tokens, cache, see=see, places=places)
        x = self.norm(x)
        logits = x @ self.embed.weight.t() if self.head is None else self.head(x)
        return Output(logits, routings, None if cache is None else Cache(layers, known))


def _takes_projections(attention: Callable[..., nn.Module]) -> bool:
    parameters = inspect.signature(attention).parameters
    return "projection" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
