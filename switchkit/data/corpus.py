"""What data modules of one corpus have in common: its vocabulary, its two parts, and that they are long enough."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from switchkit.data.base import ResumableData
from switchkit.data.shards import ShardCorpus
from switchkit.data.sources import DataError, Source
from switchkit.data.tokenizers import CharTokenizer, Tokenizer
from switchkit.data.tokens import Corpus, TextTokens, Tokens

__all__ = ["CorpusData", "open_corpus"]


def open_corpus(
    path: str | None,
    *,
    fallback: bool = False,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    default: Callable[[str], Tokenizer] = CharTokenizer.from_text,
) -> Corpus:
    """The corpus that `path` names: a text file, a folder of token shards, Tiny Shakespeare for None. Not read yet.

    The one place that decides what a path is: another kind of corpus plugs in here. `default` makes the vocabulary of a
    text where no `tokenizer` is given.
    """
    if path is not None and not str(path).strip():
        raise DataError("data.path is an empty name: name a UTF-8 text file, or null for the published text")
    if path is not None and Path(path).expanduser().is_dir():
        return ShardCorpus(path, tokenizer=tokenizer)
    return TextTokens(path, fallback=fallback, seed=seed, tokenizer=tokenizer, default=default)


class CorpusData(ResumableData):
    """A data module of one corpus: the first part to train on, the last held out.

    The corpus is found when first needed, with `prepare_data` at the latest.

    Args:
        path: a UTF-8 text file, or a folder that ``switchkit prepare`` wrote; without one Tiny Shakespeare, from
            SWITCHKIT_DATA, the cache or the net.
        batch_size: windows of a training batch, on each device.
        eval_batch_size: windows of a batch in evaluation.
        validation_prefix: tokens of the held-out part that validation reads while fitting; 0 or None: all of it.
        fallback: take a generated play where Tiny Shakespeare is not to be had.
        seed: of the order of the training data, and of the generated play.
        tokenizer: the vocabulary; without one the corpus's own, or for a text what `default` makes of it.
        default: see `open_corpus`.

    Raises:
        ValueError: a value out of range; later, a corpus that cannot be had, encoded or is too short.
    """

    def __init__(
        self,
        path: str | None,
        *,
        batch_size: int,
        eval_batch_size: int,
        validation_prefix: int | None,
        fallback: bool,
        seed: int,
        tokenizer: Tokenizer | None,
        default: Callable[[str], Tokenizer] = CharTokenizer.from_text,
    ) -> None:
        super().__init__(
            batch_size=batch_size, eval_batch_size=eval_batch_size, validation_prefix=validation_prefix, seed=seed
        )
        if validation_prefix is not None and (validation_prefix < 0 or validation_prefix == 1):
            raise ValueError(
                f"data.validation_prefix {validation_prefix} is not possible; "
                "it must be 2 or more tokens, or 0 for the whole held-out text"
            )
        self.path = path
        self.fallback = fallback
        self.corpus = open_corpus(path, fallback=fallback, seed=seed, tokenizer=tokenizer, default=default)
        self._long_enough = False

    @abstractmethod
    def needs(self) -> tuple[str, int, int]:
        """The option that decides how long a part must be, its value, and the tokens it needs."""

    @property
    def source(self) -> Source:
        """The text and where it came from; looked for once. AttributeError where the corpus is no text."""
        if not isinstance(self.corpus, TextTokens):
            raise AttributeError(f"{self.path} is no text: it has tokens only, see source_info")
        return self.corpus.source

    @property
    def tokenizer(self) -> Tokenizer:
        """The given one, or the corpus's own."""
        return self.corpus.tokenizer

    @property
    def train_tokens(self) -> Tokens:
        self._check_lengths()
        return self.corpus.train

    @property
    def held_out_tokens(self) -> Tokens:
        self._check_lengths()
        return self.corpus.held_out

    def source_info(self) -> dict[str, Any]:
        """Where the tokens came from, as plain data for a checkpoint."""
        return self.corpus.info()

    def prepare_data(self) -> None:
        self.corpus.prepare()  # one process of a machine downloads, the others find it in the cache

    def setup(self, stage: str | None = None) -> None:
        self._check_lengths()
        super().setup(stage)

    def _check_lengths(self) -> None:
        if self._long_enough:
            return
        option, value, needed = self.needs()
        train, held_out = len(self.corpus.train), len(self.corpus.held_out)
        if min(train, held_out) < needed:
            raise ValueError(
                f"the text is too short: its parts have {train} tokens to train on and {held_out} held "
                f"out, and data.{option} {value} needs {needed} in each "
                f"({self.corpus.description}). Lower data.{option} or give a longer text"
            )
        self._long_enough = True
