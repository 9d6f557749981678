"""Sentence pairs as tokens, and batches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from switchkit.data.published import DataError
from switchkit.data.tokenizers import Tokenizer

__all__ = ["EncodedPairs", "PairEncoder", "TooLong", "prefixes_of"]

TooLong = Literal["skip", "cut"]


class _Sentences:
    """Sentences as tokens, all in one tensor: one object each would take many times the memory.

    Args:
        rows: int64 [n] each.
    """

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self.lengths: Int[Tensor, "R"] = torch.tensor([len(row) for row in rows], dtype=torch.long)
        self._ids = torch.cat([row.int() for row in rows])  # ids are far below 2^31
        self._ends = self.lengths.cumsum(0).tolist()

    def __getitem__(self, index: int) -> Tensor:
        return self._ids[self._ends[index - 1] if index else 0 : self._ends[index]].long()


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs of sentences as tokens: pair p is line `line[p]` and its translation into `language[p]`."""

    sources: _Sentences
    targets: Sequence[_Sentences]
    """One for each language."""
    line: Int[Tensor, "P"]
    language: Int[Tensor, "P"]
    source_length: Int[Tensor, "P"]
    target_length: Int[Tensor, "P"]
    """Tokens of each side as the batch has it."""
    encoder: PairEncoder
    skipped: Mapping[str, int]
    """Pairs left out, by reason."""
    cut: int
    """Pairs of which a side was cut."""

    def __len__(self) -> int:
        return len(self.line)

    @property
    def longest(self) -> Int[Tensor, "P"]:
        """Tokens of the longer side."""
        return torch.maximum(self.source_length, self.target_length)

    def batch(self, index: Int[Tensor, "B"], among: Int[Tensor, "n"] | None = None) -> dict[str, Tensor]:
        """Pairs as a batch: `source` and `source_valid` [B, S]; `tokens`, `targets` and `valid` [B, T]; `language` and
        `example`, the pair's number [B].

        A source is prefix, sentence, end; targets are sentence, end; tokens are the start, then the targets but the
        last one. S and T are the longest of the batch, or of the pairs `among` which it is.
        """
        longest = index if among is None else among
        S, T = int(self.source_length[longest].max()), int(self.target_length[longest].max())
        pad, start = self.encoder.pad_id, self.encoder.start_id
        pairs = list(zip(self.line[index].tolist(), self.language[index].tolist(), strict=True))
        sources = [self.encoder.source(self.sources[line], language) for line, language in pairs]
        targets = [self.encoder.target(self.targets[language][line]) for line, language in pairs]
        tokens = [torch.cat([target.new_tensor([start]), target[:-1]]) for target in targets]
        return {
            "source": _filled(sources, S, pad),
            "source_valid": torch.arange(S) < self.source_length[index].unsqueeze(-1),
            "tokens": _filled(tokens, T, pad),
            "targets": _filled(targets, T, pad),
            "valid": torch.arange(T) < self.target_length[index].unsqueeze(-1),
            "language": self.language[index],
            "example": index,
        }


class PairEncoder:
    """Makes tokens of sentence pairs.

    Args:
        tokenizer: has an id that fills up, one that ends a text and one that a decoder begins with.
        prefixes: what comes before a source, for each language.
        max_source: tokens of a source at most, prefix and end counted.
        max_target: tokens of a target at most, the end counted.
        too_long: leave longer pairs out ("skip"), or "cut" the sentence, never the prefix or the end.

    Raises:
        DataError: a vocabulary without these ids, or no room for a sentence.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prefixes: Sequence[Int[Tensor, "n"]],
        *,
        max_source: int,
        max_target: int,
        too_long: TooLong = "skip",
    ) -> None:
        pad, eos, start = tokenizer.pad_id, tokenizer.eos_id, tokenizer.start_id
        if pad is None or eos is None or start is None:
            raise DataError(
                f"{type(tokenizer).__name__} has no id that fills up rows, ends a text or starts one (pad_id {pad}, "
                f"eos_id {eos}, start_id {start}), which pairs need; set data.tokenizer to one that has them"
            )
        needed = max(len(prefix) for prefix in prefixes) + 2
        if max_source < needed or max_target < 2:
            raise DataError(
                f"data.max_source {max_source} and data.max_target {max_target} leave no room for a sentence; "
                f"they must be at least {needed} and 2"
            )
        self.tokenizer, self.prefixes, self.too_long = tokenizer, prefixes, too_long
        self.max_source, self.max_target = max_source, max_target
        self.pad_id, self.eos_id, self.start_id = pad, eos, start

    def source(self, sentence: Int[Tensor, "n"], language: int) -> Int[Tensor, "S"]:
        prefix = self.prefixes[language]
        room = self.max_source - len(prefix) - 1
        return torch.cat([prefix, sentence[:room], sentence.new_tensor([self.eos_id])])

    def target(self, sentence: Int[Tensor, "n"]) -> Int[Tensor, "T"]:
        return torch.cat([sentence[: self.max_target - 1], sentence.new_tensor([self.eos_id])])

    def encode(self, lines: Mapping[str, Sequence[str]], source: str, languages: Sequence[str]) -> EncodedPairs:
        """All pairs of some lines, in the order line by line, and in each line language by language.

        Raises:
            DataError: a sentence that the vocabulary cannot encode, with the line; or nothing is left.
        """
        sources = self._sentences(lines[source], source)
        targets = [self._sentences(lines[code], code) for code in languages]
        head = torch.tensor([len(prefix) for prefix in self.prefixes])
        there = torch.stack([sentences.lengths for sentences in targets], 1)  # [lines, languages]
        here = sources.lengths[:, None].expand_as(there)
        empty = (here == 0) | (there == 0)
        long = ~empty & ((here + head + 1 > self.max_source) | (there + 1 > self.max_target))
        left = ~(empty | long) if self.too_long == "skip" else ~empty
        skipped = {"a side is empty": int(empty.sum())}
        if self.too_long == "skip":
            skipped[f"more than {self.max_source} source or {self.max_target} target tokens"] = int(long.sum())
        if not left.any():
            reasons = "; ".join(f"{reason}: {count:,}" for reason, count in skipped.items() if count)
            raise DataError(
                f"none of {left.numel():,} pairs is left ({reasons}); raise data.max_source and data.max_target, "
                "or set data.too_long to cut"
            )
        line, language = left.nonzero(as_tuple=True)
        read = (here + head + 1).clamp(max=self.max_source)[line, language]
        written = (there + 1).clamp(max=self.max_target)[line, language]
        cut = int(long.sum()) if self.too_long == "cut" else 0
        return EncodedPairs(sources, targets, line, language, read, written, self, skipped, cut)

    def _sentences(self, lines: Sequence[str], language: str) -> _Sentences:
        rows = []
        for line in lines:
            try:
                rows.append(self.tokenizer.encode(line))
            except ValueError as error:
                raise DataError(f"the {language} line {line!r}: {error}") from error
        return _Sentences(rows)


def prefixes_of(tokenizer: Tokenizer, languages: Sequence[str], template: str | None) -> list[Int[Tensor, "n"]]:
    """What comes before a source that is to be translated into each language.

    Without a template one token: the special token ``<language>`` where the vocabulary has it, else one of its
    sentinels, the last for the first language, as texts with gaps use them from the other end. With one, its text, in
    which ``{language}`` stands for the language.

    Raises:
        DataError: a template without ``{language}``, or a vocabulary with too few sentinels.
    """
    if template is not None:
        if "{language}" not in template:
            raise DataError(f"data.prefix {template!r} does not say the language; put {{language}} into it, or null")
        return [tokenizer.encode(template.replace("{language}", language)) for language in languages]
    own = [tokenizer.special_id(f"<{language}>") for language in languages]
    if None not in own:
        return [torch.tensor([number]) for number in own]
    if len(tokenizer.sentinels) < len(languages):
        raise DataError(
            f"{type(tokenizer).__name__} has {len(tokenizer.sentinels)} sentinels and no tokens "
            f"{', '.join(f'<{code}>' for code in languages)} to tell {len(languages)} languages apart; give "
            "data.prefix a text such as 'translate to {language}: ', or data.tokenizer another vocabulary"
        )
    return [torch.tensor([tokenizer.sentinels[-1 - index]]) for index in range(len(languages))]


def _filled(rows: list[Tensor], length: int, pad: int) -> Int[Tensor, "B length"]:
    filled = pad_sequence(rows, True, pad)
    return F.pad(filled, (0, length - filled.shape[1]), value=pad)
