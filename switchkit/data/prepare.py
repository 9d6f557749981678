"""Text files made into a folder of token shards, in bounded memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchkit.data.shard_index import ShardIndex
from switchkit.data.shard_writer import ShardWriter, new_folder
from switchkit.data.sources import DataError
from switchkit.data.subwords import FileTokenizer
from switchkit.data.text_files import TextFile
from switchkit.data.tokenizers import CharTokenizer, Tokenizer

__all__ = ["characters_of", "prepare"]

_SPACE = re.compile(r"(?<=\S) (?=\S)")
_AROUND = 200  # characters on either side of a cut whose tokens are looked at
_TRIED = 20  # spaces that are tried, the last ones of a piece
_HELD = 1 << 19  # characters that wait for a place to cut them
_AT_ONCE = 16  # pieces of text that a sub-word vocabulary encodes in parallel


def characters_of(texts: Sequence[TextFile], told: Callable[[int], Any] = lambda count: None) -> CharTokenizer:
    """The characters of some texts, which are read for this once.

    Raises:
        DataError: a text that can be read only once, or not at all.
    """
    once = next((text.label for text in texts if text.size is None), None)
    if once is not None:
        raise DataError(
            f"the characters of {once} are known only when it has been read, and it can be read once: take "
            "--tokenizer bytes or a tokenizer.json, or save it in a file first"
        )
    found: set[str] = set()
    for text in texts:
        for piece in text.pieces(told):
            found.update(piece)
    return CharTokenizer("".join(sorted(found)))


def prepare(
    out: str | Path,
    texts: Sequence[TextFile],
    tokenizer: Tokenizer,
    *,
    shard_tokens: int = 1 << 28,
    held_out: float = 0.1,
    told: Callable[[int, int], Any] = lambda count, tokens: None,
) -> ShardIndex:
    """Write the tokens of some texts, one after another, into a folder that `data.path` can name.

    Between two texts comes the vocabulary's `eos_id`, where it has one. A text is encoded in pieces of some 64
    thousand characters, cut after line ends: characters and bytes give the tokens of the whole text, and so do
    vocabularies that split it there, as byte-level ones do; where a cut would change the tokens around it, it is made
    before. For one that puts a space before each text, as SentencePiece's do, pieces are cut at spaces, and the space
    put before a piece is the text's own.

    Args:
        out: a folder that is not there yet.
        texts: what to read.
        tokenizer: makes the tokens.
        shard_tokens: tokens of a file; half a gigabyte by default.
        held_out: share of the tokens, the last ones, that training does not see. As in a text file, by default.
        told: called with the bytes read since it was called last, and the tokens written so far.

    Raises:
        DataError: a text that cannot be read or encoded, or only as a whole, or a folder that cannot be written;
            nothing is left there.
    """
    with new_folder(Path(out).expanduser()) as folder:
        writer = ShardWriter(folder, tokenizer, shard_tokens=shard_tokens)
        try:
            for number, text in enumerate(texts):
                if number and tokenizer.eos_id is not None:
                    writer.write(torch.tensor([tokenizer.eos_id]))
                for ids in _encoded(tokenizer, text, lambda count: told(count, writer.tokens)):
                    writer.write(ids)
            # Of the decimal as it is written: the float 0.1 is a little more than a tenth.
            train = int(writer.tokens * (1 - Fraction(str(held_out))))
            if not 0 < train < writer.tokens:
                raise DataError(
                    f"held_out {held_out} of {writer.tokens:,} tokens leaves {train:,} to train on and holds out "
                    f"{writer.tokens - train:,}: give more text, or another share"
                )
            index = writer.finish(train, {"files": [_about(text) for text in texts]})
        finally:
            writer.close()
    told(0, index.tokens)
    return index


def _encoded(tokenizer: Tokenizer, text: TextFile, told: Callable[[int], Any]) -> Iterator[Tensor]:
    pieces = text.pieces(told)
    try:
        if isinstance(tokenizer, FileTokenizer):
            cut = _at_tokens if _same(tokenizer, "a\nb", "a\n", "b") else _at_spaces
            pieces = cut(tokenizer, pieces, text.label)
            while several := list(islice(pieces, _AT_ONCE)):
                yield from tokenizer.encode_batch(several)
        else:
            yield from map(tokenizer.encode, pieces)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{text.label}: {error}") from error


def _at_tokens(tokenizer: FileTokenizer, pieces: Iterator[str], label: str) -> Iterator[str]:
    """The text, each cut moved back to where the tokens around it are those of the whole text.

    A line end is such a place as a rule; in a text without spaces a cut may be in the middle of a token.

    Raises:
        DataError: there is no such place.
    """
    held = next(pieces, "")
    for piece in pieces:
        for cut in range(len(held), max(0, len(held) - _AROUND), -1):
            left, right = held[max(0, cut - _AROUND) : cut], (held[cut:] + piece[:_AROUND])[:_AROUND]
            if _same(tokenizer, left + right, left, right):
                yield held[:cut]
                held = held[cut:] + piece
                break
        else:
            held += piece
            _check_held(held, label, "with no place")
    yield held


def _at_spaces(tokenizer: FileTokenizer, pieces: Iterator[str], label: str) -> Iterator[str]:
    """The text cut at spaces, which are left out: the vocabulary puts one before each piece.

    Raises:
        DataError: there is no such place, or the tokens around it are others than in the whole text.
    """
    held = ""
    for piece in pieces:
        held += piece
        for space in islice(_SPACE.finditer(held[::-1]), _TRIED):
            cut = len(held) - space.end()  # found in the reversed text
            before, after = held[:cut], held[cut + 1 :]
            left, right = before[-_AROUND:], after[:_AROUND]
            if _same(tokenizer, f"{left} {right}", left, right):
                yield before
                held = after
                break
        else:
            _check_held(held, label, "with no space")
    if held:
        yield held


def _check_held(held: str, label: str, without: str) -> None:
    if len(held) > _HELD:
        raise DataError(
            f"{label}: this vocabulary encodes {len(held):,} characters as a whole only, {without} in them at which "
            "they could be cut; take --tokenizer bytes or another vocabulary, or put spaces there"
        )


def _same(tokenizer: FileTokenizer, whole: str, *parts: str) -> bool:
    """Whether the tokens of a text are those of its parts."""
    first, *others = tokenizer.encode_batch([whole, *parts])
    return torch.equal(first, torch.cat(others))


def _about(text: TextFile) -> dict[str, Any]:
    return {"file": text.label, "characters": text.characters, "sha256": text.sha256}
