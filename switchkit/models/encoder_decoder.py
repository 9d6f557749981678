"""The encoder-decoder of T5, dense or sparse."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from switchkit.attention import Attention, CrossAttention, RelativeBias, visible
from switchkit.blocks import Block, make_norm
from switchkit.checks import at_least, finite_above, from_0_below_1
from switchkit.experts.base import init_linear
from switchkit.layers import FeedForward, FeedForwardFactory, MoEFactory, MoELayer
from switchkit.models.base import (
    Cache,
    Output,
    check_cache,
    dense_layer,
    layer_widths,
    leak,
    sparse_layers,
    through,
    uncacheable,
)
from switchkit.records import Routing

__all__ = ["EncoderDecoder", "Stack"]


class Stack(nn.Module):
    """Blocks that share one relative bias, and a norm at the end: T5's encoder, or with `cross` its decoder."""

    def __init__(
        self,
        d_ff: tuple[int, ...],
        *,
        d_model: int,
        num_heads: int,
        head_width: int | None,
        num_experts: int,
        expert_d_ff: int | None,
        sparse: tuple[int, ...],
        causal: bool,
        dropout: float,
        norm_eps: float,
        buckets: int,
        max_distance: int,
        feed_forward: FeedForwardFactory,
        moe: MoEFactory,
    ) -> None:
        super().__init__()
        self.relative = RelativeBias(num_heads, buckets=buckets, max_distance=max_distance, causal=causal)
        nn.init.normal_(self.relative.weight, std=d_model**-0.5)
        self.blocks = nn.ModuleList()
        for index, wide in enumerate(d_ff):
            # T5 leaves the scores unscaled.
            attention = Attention(d_model, num_heads, head_width=head_width, dropout=dropout, scale=1.0, causal=causal)
            cross = (
                CrossAttention(d_model, num_heads, head_width=head_width, dropout=dropout, scale=1.0)
                if causal
                else None
            )
            mlp = (
                moe(d_model=d_model, num_experts=num_experts, d_ff=expert_d_ff or wide)
                if index in sparse
                else dense_layer(feed_forward, d_model, wide, dropout)
            )
            block = Block(attention, mlp, d_model, cross=cross, dropout=dropout, norm="rms", norm_eps=norm_eps)
            self.blocks.append(block)
        self.norm = make_norm("rms", d_model, norm_eps)
        self.dropout, self.causal = dropout, causal

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        valid: Bool[Tensor, "B S"] | None,
        ids: Int[Tensor, "B S"],
        *,
        memory: Float[Tensor, "B M D"] | None = None,
        memory_see: Bool[Tensor, "B 1 1 M"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Tensor, "B S D"], tuple[Routing, ...], Cache | None]:
        size, start = x.shape[1], 0 if cache is None else cache.length
        known = valid if cache is None else cache.with_valid(valid, len(x), size)
        bias = self.relative(size, start)
        see = None
        if known is not None or (self.causal and size > 1):
            see = visible(size, known, causal=self.causal, past=start, device=x.device)
        x = F.dropout(x, self.dropout, self.training)
        given = {"see": see, "bias": bias, "memory": memory, "memory_see": memory_see}
        x, routings, layers = through(self.blocks, x, valid, ids, cache, **given)
        x = F.dropout(self.norm(x), self.dropout, self.training)
        return x, routings, None if cache is None else Cache(layers, known, memory_see)


class EncoderDecoder(nn.Module):
    """A T5-style encoder-decoder, some of its blocks sparse: a Switch Transformer as published.

    RMS norms before each sublayer, relative positions by a learned bias that the layers of a stack share, scores
    without ``1 / sqrt(width)``. T5 v1.0 is the default; v1.1 is `feed_forward` `FeedForward` with gated true and
    activation gelu_tanh, and tied false.

    Args:
        vocab_size: symbols of the vocabulary, one for both sides.
        d_model: width of a token.
        encoder_layers: blocks of the encoder.
        decoder_layers: blocks of the decoder; null: as many.
        num_heads: attention heads of a block.
        head_width: width of a head; null: d_model / num_heads.
        d_ff: hidden width of a dense block; a list: of each block's dense layer in the encoder.
        decoder_d_ff: the same for the decoder; null: as the encoder.
        num_experts: experts of a sparse block.
        expert_d_ff: hidden width of one expert; null: d_ff of its block.
        sparse: which blocks are sparse: "every(n)", "last(n)" or a list of indices; [] makes the model dense.
        decoder_sparse: the same for the decoder; null: as the encoder.
        dropout: T5's one rate: on embeddings, attention, hidden activations of dense layers (unless `feed_forward` is
            given its own), outputs of sublayers and of the stacks. Expert dropout is the experts' own option.
        norm_eps: of the RMS norms.
        tied: the output layer shares the weights of the embedding.
        scale_output: multiply what goes into the output layer by ``d_model ** -0.5``; null: where it is tied (T5).
        buckets: of distances, in the relative bias.
        max_distance: from here on all share a bucket.
        embedding_std: standard deviation of the first embeddings; null: ``d_model ** -0.5``. T5 has 1.0, made for an
            optimizer whose steps grow with the weights (Adafactor). AdamW's do not: the blocks take long to be heard
            beside embeddings of 1 (0.58 bits of 2.8 after 375 steps of `t5_translate_dense`, docs/recipes.md).
        start_id: the token that a decoded sequence starts with, the `start_id` of the data's tokenizer; T5 takes that
            of padding, 0.
        feed_forward: builds the dense layers; null: `FeedForward` with its defaults.
        moe: builds the sparse layers; null: `MoELayer` with its defaults.
        allow_leak: accept a part in the decoder that lets it see the future (its training loss then means little).

    Raises:
        ValueError: sizes that do not fit, a placement that does not exist, a part of the decoder that sees the future.

    Source: arXiv 1910.10683, section 2.1; arXiv 2101.03961; the v1.1 changes are listed at google-research/
    text-to-text-transfer-transformer, released_checkpoints.md.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        d_model: int = 128,
        encoder_layers: int = 4,
        decoder_layers: int | None = None,
        num_heads: int = 4,
        head_width: int | None = None,
        d_ff: int | list[int] = 512,
        decoder_d_ff: int | list[int] | None = None,
        num_experts: int = 8,
        expert_d_ff: int | None = None,
        sparse: str | list[int] = "every(2)",
        decoder_sparse: str | list[int] | None = None,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
        tied: bool = True,
        scale_output: bool | None = None,
        buckets: int = 32,
        max_distance: int = 128,
        embedding_std: float | None = None,
        start_id: int = 0,
        feed_forward: FeedForwardFactory | None = None,
        moe: MoEFactory | None = None,
        allow_leak: bool = False,
    ) -> None:
        super().__init__()
        below = encoder_layers if decoder_layers is None else decoder_layers
        at_least(1, vocab_size=vocab_size, d_model=d_model, encoder_layers=encoder_layers, decoder_layers=below)
        at_least(1, num_heads=num_heads)
        if expert_d_ff is not None:
            at_least(1, expert_d_ff=expert_d_ff)
        from_0_below_1(dropout=dropout)
        if embedding_std is not None:
            finite_above(0, embedding_std=embedding_std)
        if not 0 <= start_id < vocab_size:
            raise ValueError(f"start_id must be a token, 0 to {vocab_size - 1}; got {start_id}")
        self.vocab_size, self.d_model, self.num_experts, self.start_id = vocab_size, d_model, num_experts, start_id
        self.dense: FeedForwardFactory = feed_forward or FeedForward
        self.encoder_d_ff = layer_widths(d_ff, encoder_layers)
        self.decoder_d_ff = layer_widths(d_ff if decoder_d_ff is None else decoder_d_ff, below, "decoder_d_ff")
        self.encoder_sparse = sparse_layers(sparse, encoder_layers)
        self.decoder_sparse = sparse_layers(sparse if decoder_sparse is None else decoder_sparse, below)
        self.embed = nn.Embedding(vocab_size, d_model)
        self.encoder, self.decoder = (
            Stack(
                widths,
                d_model=d_model,
                num_heads=num_heads,
                head_width=head_width,
                num_experts=num_experts,
                expert_d_ff=expert_d_ff,
                sparse=places,
                causal=causal,
                dropout=dropout,
                norm_eps=norm_eps,
                buckets=buckets,
                max_distance=max_distance,
                feed_forward=self.dense,
                moe=moe or MoELayer,
            )
            for widths, places, causal in (
                (self.encoder_d_ff, self.encoder_sparse, False),
                (self.decoder_d_ff, self.decoder_sparse, True),
            )
        )
        self.allow_leak = allow_leak
        if not allow_leak and (why := leak(self.decoder)) is not None:
            raise ValueError(f"{why}: the decoder would see the future. Choose another part, or say allow_leak")
        self.head = None if tied else nn.Linear(d_model, vocab_size, bias=False)
        self.output_scale = d_model**-0.5 if (tied if scale_output is None else scale_output) else 1.0
        nn.init.normal_(self.embed.weight, std=d_model**-0.5 if embedding_std is None else embedding_std)
        if self.head is not None:
            init_linear(self.head.weight, d_model)

    @property
    def uncacheable(self) -> str | None:
        """Why a cache would change what the decoder computes; None: it would not."""
        return uncacheable(self.decoder)

    def forward(
        self,
        tokens: Int[Tensor, "B S"],
        valid: Bool[Tensor, "B S"] | None = None,
        *,
        source: Int[Tensor, "B M"] | None = None,
        source_valid: Bool[Tensor, "B M"] | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Logits of the next token at every place of the decoder's input `tokens`, given the encoder's, `source`.

        The decoder's input begins with `start_id` and is the target shifted by one. `valid` and `source_valid` are True
        for real tokens. Records come from the encoder first. With `cache`, ``Cache()`` at first, the tokens follow
        those that it holds; the source is read by the first call, and later ones leave it out.

        Raises:
            ValueError: no source, or one beside a cache that holds one; a cache for a model that would compute
                something else with it (see `uncacheable`).
        """
        begun = cache is not None and bool(cache.layers)
        if (source is None) != begun:
            raise ValueError(
                "the cache holds the source already: leave source= out" if begun else "the encoder needs source="
            )
        check_cache(self.uncacheable if cache is not None and not begun else None)
        memory, routings, see = None, (), None
        if source is not None:
            memory, routings, _ = self.encoder(self.embed(source), source_valid, source)
            if source_valid is not None:
                # A sequence of nothing but padding is looked at evenly, and stays finite.
                see = (source_valid | ~source_valid.any(-1, keepdim=True)).view(len(source), 1, 1, -1)
        elif cache is not None:
            see = cache.memory_see
        x, more, cache = self.decoder(self.embed(tokens), valid, tokens, memory=memory, memory_see=see, cache=cache)
        x = x * self.output_scale
        logits = x @ self.embed.weight.t() if self.head is None else self.head(x)
        return Output(logits, (*routings, *more), cache)
