"""Sub-word vocabularies: any file of the Hugging Face package ``tokenizers``, kept by its content."""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from itertools import count, groupby, takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from switchkit.data.sources import DataError
from switchkit.data.tokenizers import Tokenizer

__all__ = ["EOS", "PAD", "SENTINEL", "FileTokenizer", "tokenizers_package"]

# A file does not say what its special tokens are for; these are the names in use, the commonest first.
PAD = ("<pad>", "[PAD]", "<|pad|>", "<PAD>", "<|finetune_right_pad_id|>")
EOS = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "[SEP]", "<EOS>")
SENTINEL = "<extra_id_{}>"
"""As T5 writes them."""

_PACKED = "zlib:"
_LARGEST = 1 << 28  # bytes of a vocabulary: published ones have some ten million


class FileTokenizer(Tokenizer):
    """The vocabulary of a Hugging Face ``tokenizer.json``, or of ``switchkit tokenizer train``.

    The content of the file becomes part of whatever is saved with it: a checkpoint, a folder of tokens. It is not
    looked for again. Special tokens that a text spells out are read as ordinary text, and nothing is put before or
    after a text, cut off or drawn at random, whatever the file says about that: data modules put the end of a text
    where it belongs, and `generate` the beginning before a prompt of an imported model.
    Decoding leaves out padding and the end, and writes sentinels and other special tokens as ``<extra_id_0>``.

    Args:
        path: A ``tokenizer.json``; or else `content`.
        content: What is in such a file, as it stands there or packed, as a checkpoint has it.
        pad: The token that fills up rows; without one, the file's ``<pad>``, ``[PAD]`` or the like, if it has one.
        eos: The token that ends a text; without one, the file's ``</s>``, ``<|endoftext|>`` or the like.
        vocab_size: Ids of the model, if it has more than the file: published models round up (T5: 32128 for 32100).

    Raises:
        ValueError: neither path nor content, or both; no such file, no tokenizer in it; a token that it does not have;
            fewer ids than the file has; the package ``tokenizers`` is not installed.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        content: str | None = None,
        pad: str | None = None,
        eos: str | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if (path is None) == (content is None):
            raise DataError("FileTokenizer needs a path or a content, one of them: path: tokenizer.json, for example")
        where = "the tokenizer's content" if path is None else str(path)
        self.text = _read(Path(path).expanduser()) if path is not None else _unpacked(str(content))
        # A fifth of the size, and of one line: what reads configurations takes minutes for a vocabulary in JSON.
        self.content = _PACKED + base64.b64encode(zlib.compress(self.text.encode("utf-8"), 9)).decode("ascii")
        self._own = _loaded(self.text, where)
        ids: dict[str, int] = self._own.get_vocab(with_added_tokens=True)
        if not ids:
            raise DataError(f"{where} has an empty vocabulary; name another file")
        least = max(ids.values()) + 1
        if vocab_size is not None and vocab_size < least:
            raise DataError(f"vocab_size {vocab_size} is not possible for {where}, which has {least} ids")
        self.pad, self.eos = pad, eos
        self._size = least if vocab_size is None else vocab_size
        self._pad_id = _role("pad", pad, PAD, ids, where)
        self._eos_id = _role("eos", eos, EOS, ids, where)
        self._special = {token.content: i for i, token in self._own.get_added_tokens_decoder().items() if token.special}

    @property
    def vocab_size(self) -> int:
        return self._size

    @property
    def pad_id(self) -> int | None:
        return self._pad_id

    @property
    def eos_id(self) -> int | None:
        return self._eos_id

    @cached_property
    def first_id(self) -> int | None:
        """What the file's post-processor puts before a text, or, if that is nothing, behind it."""
        found: list[int] = self._own.encode("", add_special_tokens=True).ids
        return found[0] if found else None

    @cached_property
    def sentinels(self) -> Sequence[int]:
        """The ids of ``<extra_id_0>``, ``<extra_id_1>`` and so on, as far as the file has them."""
        found = (self._own.token_to_id(SENTINEL.format(index)) for index in count())
        return tuple(takewhile(lambda number: number is not None, found))

    def special_id(self, text: str) -> int | None:
        return self._special.get(text)

    def token(self, number: int) -> str | None:
        """How the file writes the token of an id; None: it has none of that id."""
        found: str | None = self._own.id_to_token(number)
        return found

    def encode(self, text: str) -> Int[Tensor, "S"]:
        """The ids of a text, int64.

        Raises:
            ValueError: the vocabulary cannot express it.
        """
        try:
            return torch.tensor(self._own.encode(text, add_special_tokens=False).ids, dtype=torch.long)
        except Exception as error:  # the package raises nothing narrower
            raise DataError(f"the text cannot be encoded by this vocabulary: {error}") from error

    def encode_batch(self, texts: Sequence[str]) -> list[Int[Tensor, "S"]]:
        """The ids of several texts, on as many cores as there are."""
        try:
            found = self._own.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:
            raise DataError(f"the text cannot be encoded by this vocabulary: {error}") from error
        return [torch.tensor(one.ids, dtype=torch.long) for one in found]

    def decode(self, ids: Int[Tensor, "S"] | Iterable[int]) -> str:
        """The text of some ids; an id that only the model has is none.

        Raises:
            ValueError: an id is outside 0 .. vocab_size - 1.
        """
        numbers: list[int] = ids.reshape(-1).tolist() if isinstance(ids, Tensor) else [int(number) for number in ids]
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.vocab_size:
            position, wrong = next((i, n) for i, n in enumerate(numbers) if not 0 <= n < self.vocab_size)
            raise ValueError(
                f"the id {wrong} at position {position} is outside this vocabulary, whose ids are 0 to "
                f"{self.vocab_size - 1}: decode with the tokenizer that the model was trained with"
            )
        ends = (self.pad_id, self.eos_id)
        return str(self._own.decode([n for n in numbers if n not in ends], skip_special_tokens=False))

    def __eq__(self, other: object) -> bool:
        # Not the packed content: another zlib packs otherwise.
        return isinstance(other, FileTokenizer) and (other.text, other._roles()) == (self.text, self._roles())

    def __hash__(self) -> int:
        return hash((FileTokenizer, self.text))

    def __reduce__(self) -> tuple[Any, ...]:
        # The package's own pickle forgets that special tokens are ordinary text.
        return partial(type(self), content=self.content, **self._roles()), ()

    def __repr__(self) -> str:
        return (
            f"FileTokenizer({self.vocab_size} ids, {type(self._own.model).__name__}, {len(self.sentinels)} sentinels)"
        )

    def _roles(self) -> dict[str, Any]:
        return {"pad": self.pad, "eos": self.eos, "vocab_size": self.vocab_size}


def tokenizers_package() -> ModuleType:
    """The package ``tokenizers``.

    Raises:
        ValueError: it is not installed; says how to.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            "sub-word vocabularies need the package tokenizers: pip install 'switchkit[hf]' (or: pip install "
            "tokenizers). Characters and bytes need none"
        ) from error
    return tokenizers


def _read(file: Path) -> str:
    if file.is_dir():
        inside = file / "tokenizer.json"
        hint = f"name {inside}" if inside.is_file() else "name a tokenizer.json"
        raise DataError(f"the tokenizer {file} is a folder; {hint}")
    if not file.is_file():
        raise DataError(
            f"there is no tokenizer {file} (from {Path.cwd()}); name a Hugging Face tokenizer.json, or make one: "
            "switchkit tokenizer train --vocab_size 8000 FILE..."
        )
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"the tokenizer {file} cannot be read: {reason}") from error


def _unpacked(content: str) -> str:
    if not content.startswith(_PACKED):
        return content
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(content[len(_PACKED) :], validate=True), _LARGEST)
        if unpacker.eof:
            return data.decode("utf-8")
        reason = f"it is cut short or has more than {_LARGEST} bytes"
    except (ValueError, zlib.error) as error:
        reason = str(error)
    raise DataError(f"the tokenizer's content cannot be unpacked: {reason}; give the file's path or its JSON")


def _loaded(content: str, where: str) -> Any:
    package = tokenizers_package()
    try:
        own = package.Tokenizer.from_str(content)
    except BaseException as error:
        # What its Rust code panics over is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{where} is no tokenizer file of the package tokenizers: {reason}") from error
    own.no_padding()
    own.no_truncation()
    own.encode_special_tokens = True
    if getattr(own.model, "dropout", None):
        own.model.dropout = None
    _spell_special_tokens(own)
    return own


def _spell_special_tokens(own: Any) -> None:
    """Cut a special token that a text spells out behind its first character, for a model that has it as a piece.

    The package no longer looks for it then, but the model may choose it: in files made of SentencePiece's it is the
    likeliest of all pieces. A BPE model gets to a piece by merges, and has none for it.
    """
    package = tokenizers_package()
    words = [token.content for token in own.get_added_tokens_decoder().values() if token.special]
    words = sorted(word for word in words if len(word) > 1 and own.model.token_to_id(word) is not None)
    if not words or isinstance(own.model, package.models.BPE):
        return
    cuts = [
        f"{re.escape(first)}(?={'|'.join(re.escape(word[1:]) for word in several)})"
        for first, several in groupby(words, key=lambda word: word[0])
    ]
    split = package.pre_tokenizers.Split(package.Regex("|".join(cuts)), "merged_with_previous")
    before = [] if own.pre_tokenizer is None else [own.pre_tokenizer]
    own.pre_tokenizer = package.pre_tokenizers.Sequence([*before, split])


def _role(role: str, given: str | None, names: Iterable[str], ids: dict[str, int], where: str) -> int | None:
    if given is not None:
        if given not in ids:
            raise DataError(f"{role} {given!r} is not a token of {where}; name one that it has, or leave {role} out")
        return ids[given]
    return next((ids[name] for name in names if name in ids), None)
