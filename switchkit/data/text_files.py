"""Text files of any size, plain or .gz, or stdin: read piece by piece, in bounded memory."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from switchkit.data.sources import DataError

__all__ = ["STDIN", "TextFile", "text_files"]

STDIN = "-"

_READ = 1 << 16  # bytes at a time
_PIECE = 1 << 16  # characters that a piece has at least, but for the last one; three times as many at most

# Sub-word vocabularies split a text before spaces and after line ends first of all, so a cut there changes no token,
# unless more space stands beside it: several spaces are often one token. Both find the last such place.
_LINE = re.compile(r"[\s\S]*\S\n(?=\S)")
_WORD = re.compile(r"[\s\S]*\S(?= \S)")


class TextFile:
    """A UTF-8 text to be read piece by piece.

    Args:
        name: a file, packed if it ends in ``.gz``, or ``-`` for stdin.

    Raises:
        DataError: there is no such file, it is a folder, or empty.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = None if name == STDIN else Path(name).expanduser()
        self.size: int | None = None
        """Bytes on disk; None where that is not known before the end (stdin, a pipe)."""
        self.characters = 0
        """Of the text, known when it is read."""
        self.sha256 = ""
        """Of the text's bytes, unpacked; known when it is read."""
        if self.path is None:
            return
        if not self.path.exists():
            raise DataError(f"there is no file {name} (from {Path.cwd()}); name UTF-8 text files, plain or .gz")
        if self.path.is_dir():
            raise DataError(f"{name} is a folder; name the text files in it, such as {name.rstrip('/')}/*.txt")
        if self.path.is_file():
            self.size = self.path.stat().st_size
            if not self.size:
                raise DataError(f"{name} is empty; leave it out, or name a UTF-8 text file with something in it")

    @property
    def label(self) -> str:
        return "stdin" if self.path is None else self.name

    def pieces(self, told: Callable[[int], Any] = lambda count: None) -> Iterator[str]:
        """The text, cut where a vocabulary would cut it too, or anywhere after 128 thousand characters without a space.

        Joined, the pieces are the whole text.

        Args:
            told: called with the bytes read since it was called last: packed ones, if the file is packed.

        Raises:
            DataError: not UTF-8 (with the place of the byte), damaged, unreadable, or nothing in it.
        """
        self.characters, digest = 0, hashlib.sha256()
        held = ""
        for text in self._decoded(told, digest.update):
            self.characters += len(text)
            held += text
            if cut := _cut(held):
                yield held[:cut]
                held = held[cut:]
        if held:
            yield held
        if not self.characters:
            raise DataError(f"{self.label} is empty; leave it out, or give a UTF-8 text with something in it")
        self.sha256 = digest.hexdigest()

    def _decoded(self, told: Callable[[int], Any], digest: Callable[[bytes], Any]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset, begun = 0, False
        for data in self._bytes(told):
            digest(data)
            pending = len(decoder.getstate()[0])  # of a character that the last bytes began
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                inside = " of the unpacked text" if self._packed else ""
                raise DataError(
                    f"{self.label} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
                    f"{offset - pending + error.start}{inside} ({error.reason}); save the file as UTF-8 "
                    "(iconv -t utf-8) or leave it out"
                ) from error
            offset += len(data)
            if text and not begun:
                text, begun = text.removeprefix(codecs.BOM_UTF8.decode()), True
            yield text

    def _bytes(self, told: Callable[[int], Any]) -> Iterator[bytes]:
        """The unpacked bytes; empty ones at the end."""
        try:
            with self._open() as raw:
                stream: BinaryIO = gzip.GzipFile(fileobj=raw) if self._packed else raw  # type: ignore[assignment]
                position = 0
                while True:
                    data = stream.read(_READ)
                    count = len(data)
                    if self._packed:
                        position, count = raw.tell(), raw.tell() - position
                    if count:
                        told(count)
                    yield data
                    if not data:
                        return
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{self.label} is no whole .gz file: {error}; get it again, or unpack it first") from error
        except OSError as error:
            raise DataError(f"{self.label} cannot be read: {error.strerror or error}") from error

    @property
    def _packed(self) -> bool:
        # A pipe's name says nothing of what is in it.
        return self.path is not None and self.size is not None and self.path.suffix.lower() == ".gz"

    def _open(self) -> BinaryIO:
        if self.path is not None:
            return self.path.open("rb", buffering=_READ)
        # Closing this one leaves stdin itself open.
        return io.BytesIO(b"") if sys.stdin is None else _Stdin(sys.stdin.buffer)  # type: ignore[return-value]


class _Stdin(io.RawIOBase):
    """Reads from stdin, and is closed without it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        return self._stream.read(size)


def text_files(names: Sequence[str]) -> list[TextFile]:
    """The texts of some names, each looked at before any is read.

    Raises:
        DataError: see `TextFile`; no name at all, or stdin more than once.
    """
    if not names:
        raise DataError("no text is given: name UTF-8 text files, plain or .gz, or - for stdin")
    if list(names).count(STDIN) > 1:
        raise DataError("stdin (-) is given more than once; it can be read once")
    return [TextFile(name) for name in names]


def _cut(text: str) -> int:
    """How many characters the next piece has; 0: wait for more text."""
    if len(text) < _PIECE:
        return 0
    if found := _LINE.match(text):
        return found.end()
    if len(text) < 2 * _PIECE:
        return 0
    found = _WORD.match(text)
    return found.end() if found else len(text)
