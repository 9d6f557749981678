"""What the files of an imported model said that the model itself does not know, such as the ids of special tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from switchkit.data.tokenizers import Tokenizer
from switchkit.spec import build, describe_object

__all__ = ["SPECIAL_IDS", "begin_ids", "carried", "end_ids", "generation_of"]

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


def _same_vocabulary(settings: Mapping[str, Any], origin: Mapping[str, Any], tokenizer: Tokenizer | None) -> bool:
    known = ((settings.get("model") or {}).get("init_args") or {}).get("tokenizer")
    if tokenizer is None:
        return True
    if known is None:
        return tokenizer.eos_id in end_ids(origin, tokenizer.vocab_size)
    return bool(known == describe_object(tokenizer) or build(known)() == tokenizer)
