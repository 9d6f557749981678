"""Token shards: a corpus that stays on disk, larger than memory if need be, and is read where a window asks."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from switchkit.data.bytes import ByteTokenizer
from switchkit.data.shard_index import DTYPES, INDEX, ShardIndex
from switchkit.data.sources import DataError
from switchkit.data.subwords import FileTokenizer
from switchkit.data.tokenizers import Tokenizer

__all__ = ["ShardCorpus", "ShardedTokens"]

_CHUNK = 1 << 20  # bytes that a check sum reads at a time


class ShardedTokens:
    """Token ids start .. stop - 1 of a folder of shards, read like one tensor int64 [N] and never copied whole.

    The files are mapped into memory, and no file stays open. A place or a slice may lie across shards. A copy, or what
    another process unpickles, maps the files again.

    Args:
        folder: what ``switchkit prepare`` wrote.
        start: the first token.
        stop: after the last one; None: to the end.

    Raises:
        DataError: see `ShardIndex.read`; later, an id outside the vocabulary: a damaged file.
    """

    def __init__(self, folder: str | Path, start: int = 0, stop: int | None = None) -> None:
        self.folder = Path(folder)
        index = ShardIndex.read(self.folder)
        self.start, self.stop, _ = slice(start, stop).indices(index.tokens)
        self.vocab_size = index.vocab_size
        self._files = [shard.file for shard in index.shards]
        self._ends = np.cumsum([shard.tokens for shard in index.shards], dtype=np.int64)
        self._maps = [_mapped(self.folder / shard.file, index.dtype, shard.tokens) for shard in index.shards]

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __getitem__(self, index: slice | Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The tokens of a slice [n], or of places, in the places' shape."""
        if isinstance(index, slice):
            first, last, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"a slice of token shards has step 1, got {step}; give the places as a tensor")
            return self._run(first, max(first, last))
        return self._gather(index)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.start, self.stop)

    def _run(self, first: int, last: int) -> Tensor:
        """Consecutive tokens, straight out of the shards that hold them."""
        first, last = self.start + first, self.start + last
        found = np.empty(last - first, dtype=np.int64)
        number, done = int(np.searchsorted(self._ends, first, side="right")), 0
        while done < len(found):
            begin = int(self._ends[number - 1]) if number else 0
            part = self._maps[number][first + done - begin : last - begin]
            found[done : done + len(part)] = part
            self._check(part, number)
            number, done = number + 1, done + len(part)
        return torch.from_numpy(found)

    def _gather(self, index: Tensor) -> Tensor:
        places = index.numpy()
        if places.size and not (places.min() >= 0 and places.max() < len(self)):
            raise IndexError(
                f"places of {len(self)} tokens are 0 to {len(self) - 1}, got {places.min()} to {places.max()}"
            )
        flat = places.reshape(-1) + self.start
        numbers = np.searchsorted(self._ends, flat, side="right")
        found = np.empty(flat.shape, dtype=np.int64)
        for number in np.unique(numbers):
            here = numbers == number
            begin = self._ends[number - 1] if number else 0
            part = self._maps[number][flat[here] - begin]
            self._check(part, int(number))
            found[here] = part
        return torch.from_numpy(found.reshape(places.shape))

    def _check(self, part: Any, number: int) -> None:
        # On a GPU an id outside the table ends the process without saying why.
        if part.size and int(part.max()) >= self.vocab_size:
            raise DataError(
                f"{self.folder / self._files[number]} holds the id {int(part.max())}, and the vocabulary has "
                f"{self.vocab_size}: the file is damaged; write the folder again with `switchkit prepare`"
            )


class ShardCorpus:
    """A folder that ``switchkit prepare`` wrote: its vocabulary, the tokens to train on and those held out.

    Opened when first asked for.

    Args:
        path: the folder.
        tokenizer: the vocabulary, if it must be this one (a checkpoint's, say), which makes the folder's tokens; None:
            the folder's.

    Raises:
        DataError: later, what `ShardIndex.read` finds wrong, or another vocabulary than `tokenizer`.
    """

    def __init__(self, path: str, *, tokenizer: Tokenizer | None = None) -> None:
        self.folder = Path(path).expanduser()
        self._given = tokenizer

    @cached_property
    def index(self) -> ShardIndex:
        if not (self.folder / INDEX).is_file():
            raise DataError(
                f"data.path {str(self.folder)!r} is a folder without {INDEX}; name one text file, "
                "or a folder that `switchkit prepare` wrote"
            )
        return ShardIndex.read(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        own = self.index.build_tokenizer(self.folder / INDEX)
        if self._given is None:
            return own
        if not _same_tokens(own, self._given):
            raise DataError(
                f"{self.folder} holds tokens of {_shown(own)}, and data.tokenizer is {_shown(self._given)}; leave "
                "data.tokenizer out, or write the folder again with `switchkit prepare --tokenizer`"
            )
        return self._given

    @cached_property
    def train(self) -> ShardedTokens:
        return ShardedTokens(self.folder, 0, self.index.train_tokens)

    @cached_property
    def held_out(self) -> ShardedTokens:
        return ShardedTokens(self.folder, self.index.train_tokens)

    @property
    def description(self) -> str:
        shards = len(self.index.shards)
        return f"{self.folder.name}, {self.index.tokens:,} tokens in {shards} shard{'s' if shards > 1 else ''}"

    def prepare(self) -> None:
        _ = self.tokenizer

    def info(self) -> dict[str, Any]:
        """Where the tokens came from; the check sum is the index's, which holds those of the shards."""
        return {
            "description": self.description,
            "origin": str(self.folder.resolve()),
            "generated": False,
            "sha256": hashlib.sha256((self.folder / INDEX).read_bytes()).hexdigest(),
            "tokens": self.index.tokens,
        }

    def verify(self) -> None:
        """Read every shard and compare its check sum, which opening the folder does not.

        Raises:
            DataError: a shard is not what was written.
        """
        for shard in self.index.shards:
            digest = hashlib.sha256()
            with (self.folder / shard.file).open("rb") as stream:
                while data := stream.read(_CHUNK):
                    digest.update(data)
            if digest.hexdigest() != shard.sha256:
                raise DataError(
                    f"{self.folder / shard.file} is not what was written: its sha256 is {digest.hexdigest()}, "
                    f"{INDEX} says {shard.sha256}; write the folder again with `switchkit prepare`"
                )


def _mapped(file: Path, dtype: str, tokens: int) -> np.ndarray[Any, Any]:
    """The tokens of a file, in its own dtype, as they are on disk."""
    # Unlike numpy's memmap this keeps no descriptor, of which a process has a thousand and a corpus may need more.
    data = torch.from_file(str(file), shared=False, size=tokens * DTYPES[dtype], dtype=torch.uint8)
    return data.numpy().view(f"<u{DTYPES[dtype]}")


def _same_tokens(own: Tokenizer, given: Tokenizer) -> bool:
    """Whether both make the same tokens of texts and of their ends; sentinels and more ids change none."""
    if isinstance(own, ByteTokenizer) and isinstance(given, ByteTokenizer):
        return True
    if isinstance(own, FileTokenizer) and isinstance(given, FileTokenizer):
        return (own.text, own.eos_id) == (given.text, given.eos_id)
    return own == given


def _shown(tokenizer: Tokenizer) -> str:
    return f"{type(tokenizer).__name__} with {tokenizer.vocab_size} ids"
