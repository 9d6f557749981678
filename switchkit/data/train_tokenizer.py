"""A sub-word vocabulary learned from text, written as a Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from switchkit.data.sources import DataError
from switchkit.data.subwords import EOS, PAD, SENTINEL, FileTokenizer, tokenizers_package
from switchkit.data.text_files import TextFile
from switchkit.files import appearing

__all__ = ["save_tokenizer", "train_tokenizer"]

_UNKNOWN = "<unk>"
_BYTES = 256


def train_tokenizer(
    texts: Sequence[TextFile],
    vocab_size: int,
    *,
    kind: Literal["bpe", "unigram"] = "bpe",
    sentinels: int = 100,
    told: Callable[[int], Any] = lambda count: None,
) -> FileTokenizer:
    """A vocabulary of sub-words that are frequent in some texts, in the order of T5's ids.

    ``<pad>``, ``</s>`` and ``<unk>`` are 0, 1 and 2; then come the 256 bytes and the sub-words; last the sentinels,
    counting down: ``<extra_id_0>`` has the highest id. Both kinds split a text at spaces first and then work on bytes,
    so that every text can be encoded, nothing is ever unknown, and decoding gives back the very text.

    Args:
        texts: what to learn from; read once.
        vocab_size: ids, all of the above included. A short text may give fewer.
        kind: ``bpe`` merges frequent pairs (GPT-2's way), ``unigram`` keeps the likeliest pieces (SentencePiece's way;
            slower to learn).
        sentinels: how many ``<extra_id_N>`` for span corruption; T5 has 100.
        told: called with the bytes read since it was called last, and with 0 when all are read.

    Raises:
        ValueError: fewer ids than bytes, sentinels and special tokens; a text that cannot be read; the package
            ``tokenizers`` is not installed.

    Source: Sennrich et al. 2016, arXiv 1508.07909 (bpe); Kudo 2018, arXiv 1804.10959 (unigram).
    """
    special = [PAD[0], EOS[0], _UNKNOWN]
    least = _BYTES + len(special) + sentinels
    if vocab_size < least:
        raise DataError(
            f"--vocab_size {vocab_size} is too small: {_BYTES} bytes, {len(special)} special tokens and {sentinels} "
            f"sentinels are {least} already; give more, or fewer --sentinels"
        )
    package = tokenizers_package()
    bytewise = package.pre_tokenizers.ByteLevel
    settings = {
        "vocab_size": vocab_size - sentinels,
        "special_tokens": special,
        # Every byte has an id of its own, seen in the text or not; sorted, for the ids' sake.
        "initial_alphabet": sorted(bytewise.alphabet()),
        "show_progress": False,
    }
    if kind == "bpe":
        own = package.Tokenizer(package.models.BPE())
        trainer = package.trainers.BpeTrainer(**settings)
    else:
        own = package.Tokenizer(package.models.Unigram())
        trainer = package.trainers.UnigramTrainer(unk_token=_UNKNOWN, **settings)
    own.pre_tokenizer = bytewise(add_prefix_space=False)
    own.decoder = package.decoders.ByteLevel()
    _interruptibly(lambda: own.train_from_iterator(_all_pieces(texts, told), trainer=trainer))
    marks = [package.AddedToken(SENTINEL.format(i), special=True, normalized=False) for i in reversed(range(sentinels))]
    own.add_special_tokens(marks)
    return FileTokenizer(content=own.to_str(pretty=True))


def save_tokenizer(tokenizer: FileTokenizer, out: str | Path) -> None:
    """Write the file of a vocabulary, whole or not at all, over one that is there.

    Raises:
        DataError: it cannot be written there.
    """
    target = Path(out).expanduser()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with appearing(target, shared=True) as temporary, temporary.open("x", encoding="utf-8") as stream:
            stream.write(tokenizer.text)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise DataError(f"--out {out} cannot be written: {error.strerror}; name another file") from error


def _interruptibly(work: Callable[[], Any]) -> None:
    """Do it in another thread: the package's Rust code does not look for Ctrl-C, minutes long, and this one does."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="tokenizer", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _all_pieces(texts: Sequence[TextFile], told: Callable[[int], Any]) -> Iterator[str]:
    for text in texts:
        yield from text.pieces(told)
    told(0)
