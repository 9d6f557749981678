"""Writes a folder of token shards: all of it or nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int
from torch import Tensor

from switchkit.data.shard_index import DTYPES, INDEX, Shard, ShardIndex, dtype_for
from switchkit.data.sources import DataError
from switchkit.data.tokenizers import Tokenizer
from switchkit.files import appearing

__all__ = ["ShardWriter", "new_folder", "refuse_existing"]


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `out` if nothing goes wrong, and else is gone.

    Raises:
        DataError: `out` is there already, or cannot be made.
    """
    refuse_existing(out)
    end = "name another folder"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with appearing(out, shared=True) as temporary:
            temporary.mkdir()
            end = "nothing was left there"
            yield temporary
            refuse_existing(out)
    except OSError as error:
        raise DataError(f"--out {out} cannot be written: {error.strerror or error}; {end}") from error


class ShardWriter:
    """Tokens of one vocabulary, written one after another into files of `shard_tokens` each.

    Args:
        folder: an empty folder.
        tokenizer: what the ids stand for.
        shard_tokens: tokens of a file; the last one may have fewer.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, shard_tokens: int) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.shard_tokens = shard_tokens
        self.dtype = dtype_for(tokenizer.vocab_size)
        self.tokens = 0
        """Written so far."""
        self._shards: list[Shard] = []
        self._stream: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._here = 0  # tokens of the file that is open

    def write(self, ids: Int[Tensor, "S"]) -> None:
        data = ids.numpy().astype(f"<u{DTYPES[self.dtype]}")
        while len(data):
            part, data = np.split(data, [self.shard_tokens - self._here])
            self._write(part)

    def finish(self, train_tokens: int, source: dict[str, Any]) -> ShardIndex:
        """Close the last file and write the index."""
        from switchkit.spec import describe_object

        self._end_file()
        index = ShardIndex(
            dtype=self.dtype,
            vocab_size=self.tokenizer.vocab_size,
            train_tokens=train_tokens,
            shards=tuple(self._shards),
            tokenizer=describe_object(self.tokenizer),
            source=source,
        )
        with (self.folder / INDEX).open("w", encoding="utf-8") as stream:
            stream.write(index.to_json())
            _settle(stream)
        return index

    def close(self) -> None:
        """Let go of a file that is not finished."""
        if self._stream is not None:
            self._stream.close()

    def _write(self, part: Any) -> None:
        if self._stream is None:
            self._stream = (self.folder / f"tokens-{len(self._shards):05}.bin").open("wb")
        data = part.tobytes()
        self._stream.write(data)
        self._digest.update(data)
        self._here += len(part)
        self.tokens += len(part)
        if self._here == self.shard_tokens:
            self._end_file()

    def _end_file(self) -> None:
        if self._stream is not None:
            _settle(self._stream)
            self._stream.close()
            self._shards.append(Shard(Path(self._stream.name).name, self._here, self._digest.hexdigest()))
            self._stream, self._here, self._digest = None, 0, hashlib.sha256()


def _settle(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def refuse_existing(out: str | Path) -> None:
    """Raises DataError if there is something at `out`."""
    out = Path(out).expanduser()
    if out.exists() or out.is_symlink():
        raise DataError(f"--out {out} is there already: name another folder, or remove it first")
