"""From text to token ids and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["CharTokenizer", "Tokenizer"]


class Tokenizer(ABC):
    """Turns text into ids 0 .. vocab_size - 1 and back.

    A subclass keeps its constructor's arguments as attributes of the same names, so that checkpoints can describe it.
    Beside text a vocabulary may have special ids, which `encode` never gives: what fills up a row (`pad_id`), what ends
    a text (`eos_id`), what a decoder begins with (`start_id`), and sentinels, which stand for what was taken out of a
    text. A vocabulary that has none of a kind says None, or an empty row.
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """How many different ids there are."""

    @abstractmethod
    def encode(self, text: str) -> Int[Tensor, "S"]:
        """The ids of a text, int64. ValueError for what the vocabulary does not have."""

    @abstractmethod
    def decode(self, ids: Int[Tensor, "S"] | Iterable[int]) -> str:
        """The text of some ids; undoes `encode`. ValueError for an id outside the vocabulary."""

    @property
    def pad_id(self) -> int | None:
        """Fills up rows; a model never has to predict it."""
        return None

    @property
    def eos_id(self) -> int | None:
        """Ends a text."""
        return None

    @property
    def first_id(self) -> int | None:
        """What the vocabulary's own file puts before a text, as Llama's ``<s>``; `encode` leaves it out."""
        return None

    @property
    def start_id(self) -> int | None:
        """What a decoder is given first: as in T5, `pad_id`."""
        return self.pad_id

    @property
    def sentinels(self) -> Sequence[int]:
        """The ids that stand for what was taken out of a text, in the order they are used."""
        return ()

    def sentinel(self, index: int) -> int:
        """The id of sentinel `index`, from 0.

        Raises:
            ValueError: the vocabulary has fewer.
        """
        if not 0 <= index < len(self.sentinels):
            raise ValueError(
                f"sentinel {index} is not in the vocabulary of {type(self).__name__}, which has {len(self.sentinels)}; "
                "take a vocabulary with more, such as ByteTokenizer, or ask for fewer or longer spans"
            )
        return self.sentinels[index]

    def special_id(self, text: str) -> int | None:
        """The id of a special token by the way it is written, as ``<extra_id_0>``; None: there is none of that name."""
        return None


class CharTokenizer(Tokenizer):
    """One id per character: its place in `characters`.

    Args:
        characters: the vocabulary, each character once; the order decides the ids.
    """

    def __init__(self, characters: str) -> None:
        if not characters:
            raise ValueError("characters is empty; a vocabulary needs at least one character")
        self.characters = characters
        self._ids = {character: index for index, character in enumerate(characters)}
        if len(self._ids) < len(characters):
            twice = next(c for index, c in enumerate(characters) if self._ids[c] != index)
            raise ValueError(
                f"characters holds {_name(twice)} more than once; "
                "give each character once, or use CharTokenizer.from_text for any text"
            )

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """The characters of a text, sorted by code point."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Int[Tensor, "S"]:
        """The ids of a text, int64.

        Raises:
            ValueError: a character is not in the vocabulary; names it, its position and the vocabulary.
        """
        try:
            return torch.tensor([self._ids[character] for character in text], dtype=torch.long)
        except KeyError:
            position, unknown = next((i, c) for i, c in enumerate(text) if c not in self._ids)
        raise ValueError(
            f"the character {_name(unknown)} at position {position} is not in the vocabulary of {self.vocab_size}: "
            f"{_readable(self.characters)}. Remove or replace it, or train with a tokenizer made from text that has it"
        )

    def decode(self, ids: Int[Tensor, "S"] | Iterable[int]) -> str:
        """The text of some ids.

        Raises:
            ValueError: an id is outside 0 .. vocab_size - 1.
        """
        numbers: list[int] = ids.reshape(-1).tolist() if isinstance(ids, Tensor) else [int(number) for number in ids]
        if numbers and (min(numbers) < 0 or max(numbers) >= self.vocab_size):
            position, wrong = next((i, n) for i, n in enumerate(numbers) if not 0 <= n < self.vocab_size)
            raise ValueError(
                f"the id {wrong} at position {position} has no character; ids of this vocabulary are 0 to "
                f"{self.vocab_size - 1}: decode with the tokenizer that the model was trained with"
            )
        return "".join([self.characters[number] for number in numbers])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CharTokenizer) and other.characters == self.characters

    def __hash__(self) -> int:
        return hash((CharTokenizer, self.characters))

    def __repr__(self) -> str:
        shown = self.characters if self.vocab_size <= 100 else self.characters[:100] + "..."
        return f"CharTokenizer({shown!r})"


def _name(character: str) -> str:
    return f"{character!r} (U+{ord(character):04X})"


def _readable(characters: str, most: int = 80) -> str:
    """``'\\n' ' ' '!' 'A'-'Z' 'a'-'z'``: sorted, runs of four and more drawn together."""
    runs: list[tuple[str, str]] = []
    for character in sorted(characters):
        if runs and ord(character) == ord(runs[-1][1]) + 1 and character.isalnum() and runs[-1][0].isalnum():
            runs[-1] = (runs[-1][0], character)
        else:
            runs.append((character, character))
    pieces: list[str] = []
    for first, last in runs:
        if ord(last) - ord(first) < 3:
            pieces += [repr(chr(code)) for code in range(ord(first), ord(last) + 1)]
        else:
            pieces.append(f"{first!r}-{last!r}")
    more = f" and {len(pieces) - most} more" if len(pieces) > most else ""
    return " ".join(islice(pieces, most)) + more
