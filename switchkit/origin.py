"""Where a model comes from: what imported files said that it does not know itself, and the text it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from switchkit.data.tokenizers import Tokenizer
from switchkit.spec import build, describe_object, described_data

__all__ = ["SPECIAL_IDS", "begin_ids", "carried", "end_ids", "generation_of", "tell_of_another_text"]

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What belongs to the vocabulary, by the names that config.json and generation_config.json have for it."""


def end_ids(origin: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The ids that end a text: those of generation_config.json, or else config.json, that are below `vocab_size`.

    `origin` is ``{"config": {...}, "generation": {...}}`` as `carried` gives it; one id or a list of them. Instruction
    models name several.
    """
    for part in (generation_of(origin), origin.get("config") or {}):
        given = part.get("eos_token_id")
        ids = given if isinstance(given, list) else [given]
        found = tuple(i for i in ids if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size)
        if found:
            return found
    return ()


def begin_ids(origin: Mapping[str, Any], tokenizer: Tokenizer | None, ends: Sequence[int] = ()) -> tuple[int, ...]:
    """The id that begins each text, where the files name it and the vocabulary's own file puts it there; else none.

    `ends`: the ids that end a text, one of which may stand first in an empty one.
    """
    first = None if tokenizer is None else tokenizer.first_id
    named = [part.get("bos_token_id") for part in (generation_of(origin), origin.get("config") or {})]
    return (first,) if first is not None and first in named and first not in ends else ()


def generation_of(origin: Mapping[str, Any]) -> Mapping[str, Any]:
    """What generation_config.json said; empty where there was none."""
    return origin.get("generation") or {}


def carried(settings: Mapping[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The origin that the settings of a checkpoint tell, for a model that goes on with `tokenizer`.

    The ids of special tokens are left out where that is another vocabulary than the checkpoint's: they would stand for
    other tokens. Of a checkpoint without a vocabulary they stay where the new one ends a text with the same id.

    Args:
        settings: the entry "switchkit" of the checkpoint.
        tokenizer: the vocabulary of the model that goes on; None: it has none.

    Raises:
        ValueError: the vocabulary of the checkpoint is a class that is not imported.
    """
    known = settings.get("hugging_face")
    parts = known.items() if isinstance(known, Mapping) else ()
    origin = {name: dict(part) for name, part in parts if isinstance(part, Mapping)}
    if not origin or _same_vocabulary(settings, origin, tokenizer):
        return origin
    return {name: {k: v for k, v in part.items() if k not in SPECIAL_IDS} for name, part in origin.items()}


def tell_of_another_text(settings: Mapping[str, Any], data: Any) -> None:
    """Warn where the data are called what the checkpoint's are called, and hold another text.

    A file was edited, say, or one has come to be at hand in whose place a generated text was taken.

    Args:
        settings: the entry "switchkit" of the checkpoint.
        data: the data module that goes on; None: none.
    """
    then = settings.get("source") or {}
    if data is None or then.get("sha256") is None or not hasattr(data, "source_info"):
        return
    now = data.source_info()
    if now.get("sha256") in (None, then["sha256"]):
        return
    if now.get("origin") == then.get("origin") or described_data(data) == settings["data"]:
        rank_zero_warn(
            f"the text is not the one that the checkpoint was trained on: {now.get('description')} (sha256 "
            f"{now['sha256'][:8]}) now, {then.get('description')} ({then['sha256'][:8]}) then. What is held out "
            "here it may have read, and its place in the training data means another one: bring the text back, or "
            "name this one by --data.path and begin from the weights (--init_from)"
        )


def _same_vocabulary(settings: Mapping[str, Any], origin: Mapping[str, Any], tokenizer: Tokenizer | None) -> bool:
    known = ((settings.get("model") or {}).get("init_args") or {}).get("tokenizer")
    if tokenizer is None:
        return True
    if known is None:
        return tokenizer.eos_id in end_ids(origin, tokenizer.vocab_size)
    return bool(known == describe_object(tokenizer) or build(known)() == tokenizer)
