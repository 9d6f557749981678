"""The held-out text on which models of several checkpoints can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from switchkit import checkpoints
from switchkit.data.base import ResumableData
from switchkit.data.span_data import SpanData
from switchkit.data.stream_data import StreamData
from switchkit.data.text import TextData
from switchkit.data.tokenizers import Tokenizer
from switchkit.models import Decoder
from switchkit.models.inputs import kind_of_data
from switchkit.module import LanguageModule
from switchkit.spec import build
from switchkit.twins import net_of

__all__ = ["Opened", "check_alike", "data_of", "load_module", "open_all"]


@dataclass(frozen=True)
class Opened:
    """A checkpoint without its weights: what has to agree with others."""

    path: Path
    tokenizer: Tokenizer | None
    data: Mapping[str, Any] | None
    source: Mapping[str, Any] | None
    model: Mapping[str, Any]


def open_all(paths: Sequence[str | Path]) -> list[Opened]:
    """The settings of some checkpoints.

    Raises:
        ValueError: see `checkpoints.read`.
    """
    found = []
    for path in map(Path, paths):
        settings = checkpoints.read_settings(path)
        tokenizer = (settings["model"].get("init_args") or {}).get("tokenizer")
        made = build(tokenizer)() if tokenizer is not None else None
        found.append(Opened(path, made, settings["data"], settings["source"], settings["model"]))
    return found


def check_alike(opened: Sequence[Opened], *, same_text: bool) -> None:
    """Refuses checkpoints whose losses do not compare.

    Args:
        opened: the first is what the others are held to.
        same_text: they must have been trained on the same text too, so that none has learned what others are tested on.

    Raises:
        ValueError: another vocabulary, another kind of data, another text, or one that does not say.
    """
    first = opened[0]
    for other in opened[1:]:
        if other.tokenizer != first.tokenizer:
            raise ValueError(
                f"{other.path} reads {_words(other.tokenizer)} and {first.path} {_words(first.tokenizer)}: losses per "
                "token compare within one vocabulary only"
            )
        if not same_text:
            continue
        for one in (first, other):
            if one.data is None or one.source is None:
                raise ValueError(f"{one.path} does not say what it was trained on: name the text by --text")
        kinds = [one.data["class_path"] for one in (first, other) if one.data]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"{other.path} was trained on {kinds[1]} and {first.path} on {kinds[0]}: their tasks differ"
            )
        texts = [_text(one.source or {}) for one in (first, other)]
        if texts[0] != texts[1]:
            names = [(one.source or {}).get("description") for one in (first, other)]
            raise ValueError(
                f"{other.path} was trained on another text ({names[1]}) than {first.path} ({names[0]}), and may have "
                "read what is held out there: compare models of one text, or give one that none has read by --text"
            )


def data_of(
    opened: Opened,
    text: str | None = None,
    option: str = "--text",
    *,
    stage: str = "validate",
    stride: int | None = None,
    draws: int | None = None,
    context: int | None = None,
) -> ResumableData:
    """The data module of a checkpoint, set up; on another text where one is named.

    Args:
        opened: whose data.
        text: instead of its own; null: its own.
        option: what an error calls the one that names the text.
        stage: what it is set up for.
        stride: of windows that begin at multiples of it; null: of one as long as a window, for "fit", where the data
            are windows.
        draws: ways in which each window with holes is read; null: its own, or for "fit" 8 where its holes would be
            drawn anew in each epoch: with one alone a student of many epochs would learn these holes by heart.
        context: tokens of a window of text; null: its own, or, where it has no data, as many as `TextData` takes
            and the model reads.

    Raises:
        ValueError: it has none, or none that reads one text, or that the model reads.
    """
    if opened.data is None:
        if text is None:
            raise ValueError(f"{opened.path} does not say what it was trained on: name a text ({option})")
        data: Any = _data_for(opened, text)
    else:
        factory = build(opened.data)
        arguments = dict(factory.keywords)
        if text is not None:
            if "path" not in arguments:
                raise ValueError(f"{text}: the data of {opened.path}, {factory.func.__name__}, are no single text")
            arguments["path"] = text
            if stage != "fit" and issubclass(factory.func, StreamData):
                arguments |= {"validation_path": text, "hub": None}  # it has no part of its path that is held out
                for name in ("hub_config", "split", "validation_split"):  # of a dataset of the Hub
                    arguments.pop(name, None)
        tokenizer = arguments.get("tokenizer")
        arguments["tokenizer"] = tokenizer() if isinstance(tokenizer, partial) else tokenizer
        data = factory.func(**arguments)
    if not isinstance(data, ResumableData):
        raise ValueError(
            f"{opened.path}: {type(data).__name__} is no data module of switchkit, and says not what is held out"
        )
    kind = type(data).__name__
    if stride is not None and not isinstance(data, (TextData, SpanData)):
        raise ValueError(f"--stride {stride}: the data of {opened.path}, {kind}, are no windows of a text")
    if draws is not None and not isinstance(data, SpanData):
        raise ValueError(f"--draws {draws}: the data of {opened.path}, {kind}, have no holes that are drawn")
    if context is not None:
        if not isinstance(data, TextData):
            raise ValueError(f"--context {context}: the data of {opened.path}, {kind}, are no windows of one text")
        data.context = context
    if isinstance(data, TextData):
        data.stride = stride or data.stride or (data.context if stage == "fit" else None)
    if isinstance(data, SpanData):
        if stage == "fit":
            data.draws = draws or (8 if data.stride is None else data.draws)
        data.stride = stride or data.stride or (data.raw_length if stage == "fit" else None)
    data.prepare_data()
    data.setup(stage)
    return data


def _data_for(opened: Opened, text: str) -> TextData | SpanData:
    """A text as the model of a checkpoint without data reads it."""
    if opened.tokenizer is None:
        raise ValueError(
            f"{opened.path} has no vocabulary to read {text} with: train it on data with one first (fit --init_from)"
        )
    size = (opened.model.get("init_args") or {}).get("vocab_size")
    net = net_of(opened.model, opened.tokenizer.vocab_size if size is None else size)
    kind = kind_of_data(net, opened.tokenizer)
    if kind == "TextData":
        data = TextData(text, tokenizer=opened.tokenizer)
        data.context = min(data.context, net.context) if isinstance(net, Decoder) else data.context
        return data
    if kind == "PairData":
        raise ValueError(
            f"the vocabulary of {opened.path} has no sentinels, with which its encoder could read {text} with holes: "
            "train it on pairs first (fit --ckpt_path, --data PairData)"
        )
    return SpanData(text, tokenizer=opened.tokenizer)


def load_module(path: Path, device: str) -> LanguageModule:
    """The model of a checkpoint, in evaluation mode."""
    return LanguageModule.load_from_checkpoint(path, map_location=device).eval()


def _text(source: Mapping[str, Any]) -> Any:
    """What tells texts apart: their sum, or of a stream, which nobody has read to its end, where it comes from."""
    return source.get("sha256") or (source.get("description"), source.get("origin"))


def _words(tokenizer: Tokenizer | None) -> str:
    return "no text" if tokenizer is None else f"{type(tokenizer).__name__} of {tokenizer.vocab_size} symbols"
