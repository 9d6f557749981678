"""Whether a model can read some data, found before the first batch."""

from __future__ import annotations

from typing import Any, Literal

from switchkit.models.decoder import Decoder
from switchkit.models.encoder_decoder import EncoderDecoder

__all__ = ["check_inputs", "kind_of_data"]


def kind_of_data(net: Any, tokenizer: Any) -> Literal["TextData", "SpanData", "PairData"]:
    """The data that a model reads, where it belongs to none: an encoder a text with holes, if the vocabulary has
    sentinels for them (without a `tokenizer` it is taken to), or else pairs."""
    if not isinstance(net, EncoderDecoder):
        return "TextData"
    return "SpanData" if tokenizer is None or tokenizer.sentinels else "PairData"


def check_inputs(net: Any, data: Any) -> None:
    """Refuse data whose batches a `Decoder` or `EncoderDecoder` cannot read; of other models and data nothing is known.

    Args:
        net: the model.
        data: a data module, whose very class may say whether its batches `have_sources`, or leave it to the object. A
            subclass, which may make others of them, and any that says nothing are left alone.

    Raises:
        ValueError: sources without an encoder, an encoder without sources, windows longer than the decoder's context,
            a vocabulary that begins the decoder's input otherwise than generation does.
    """
    name = type(data).__name__
    sources = data.have_sources if "have_sources" in vars(type(data)) else None
    if sources is None:
        return
    if isinstance(net, Decoder) and sources is True:
        raise ValueError(
            f"data {name}: its batches have a source for an encoder, and model.net is a Decoder: take TextData, or "
            "EncoderDecoder as model.net"
        )
    if isinstance(net, EncoderDecoder) and sources is False:
        raise ValueError(
            f"data {name}: its batches have no source for the encoder of model.net: take SpanData or PairData, or "
            "Decoder as model.net"
        )
    start = getattr(getattr(data, "tokenizer", None), "start_id", None)
    if isinstance(net, EncoderDecoder) and start is not None and start != net.start_id:
        raise ValueError(
            f"data {name}: with its tokenizer the decoder's input begins with id {start}, and model.net begins with "
            f"start_id {net.start_id} what it generates: set model.net.start_id to {start}"
        )
    windows = getattr(data, "context", None)
    if isinstance(net, Decoder) and isinstance(windows, int) and windows > net.context:
        raise ValueError(
            f"data.context {windows} is longer than model.net.context {net.context}: set data.context to "
            f"{net.context} at most, or build the model for {windows} tokens"
        )
