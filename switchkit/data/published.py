"""Published files: looked for in a folder of data sets and in the cache, else downloaded; known by their sums."""

from __future__ import annotations

import codecs
import hashlib
import http.client
import os
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from switchkit.files import appearing

__all__ = ["GZIP", "DataError", "FoundFile", "NotAtHand", "PublishedFile", "decoded", "find_published", "sha256_of"]

GZIP = b"\x1f\x8b"
"""How a file begins that gzip wrote."""
_TIMEOUT = 5.0  # seconds, to connect and for each read
_CHUNK = 1 << 16


class DataError(ValueError):
    """Data could not be had or read; the message says where it was looked for and what to do."""


class NotAtHand(DataError):
    """A published file is nowhere to be had; what is there and wrong is a plain `DataError`."""

    def __init__(self, message: str, looked: list[str]) -> None:
        super().__init__(message)
        self.looked = looked
        """Where it was looked for, and what was found there."""


@dataclass(frozen=True)
class PublishedFile:
    """A published file: where it is kept and how to know it."""

    title: str
    file: str
    """Below the folder of data sets, and below the cache."""
    address: str
    sha256: str
    size: int
    """In bytes."""


@dataclass(frozen=True)
class FoundFile:
    """The bytes of a published file, and where they came from."""

    data: bytes
    origin: str
    """The file's path, or the address."""
    note: str = ""
    """What people should know of it."""


def find_published(files: Iterable[PublishedFile], *, own: str, generated: str) -> list[FoundFile]:
    """The files of a corpus, each looked for by itself; none is asked for after the first that cannot be had.

    In the folder SWITCHKIT_DATA, then in the cache (SWITCHKIT_CACHE, else XDG_CACHE_HOME/switchkit, else
    ~/.cache/switchkit), then downloaded into the cache, unless SWITCHKIT_OFFLINE is set.

    Args:
        files: what to find.
        own: how the user gives data of their own instead, for the message of an error.
        generated: what ``data.fallback`` takes instead, for the message too.

    Raises:
        NotAtHand: a file is in none of these places.
        DataError: a file in the folder is there and wrong, or cannot be read.
    """
    return [_find(file, own, generated) for file in files]


def decoded(data: bytes, what: str) -> str:
    """UTF-8 as text, without a byte order mark.

    Raises:
        DataError: it is not UTF-8; names `what`, the byte and its place.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if data.startswith(GZIP):
            raise DataError(
                f"{what} is compressed by gzip: unpack it (gunzip), or write its tokens with `switchkit prepare`, "
                "which reads such files"
            ) from error
        raise DataError(
            f"{what} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} ({error.reason}); "
            "save the file as UTF-8 (iconv -t utf-8) or name another"
        ) from error
    return text.removeprefix(codecs.BOM_UTF8.decode())


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _find(file: PublishedFile, own: str, generated: str) -> FoundFile:
    looked: list[str] = []
    found = _in_folder(file, own, looked) or _in_cache(file, looked) or _download(file, looked)
    if found is not None:
        return found
    raise NotAtHand(
        f"{file.title} is not at hand: {'; '.join(looked)}. Ways out: give {own}; or download {file.address} by hand "
        f"to {_cache() / file.file}, or to {file.file} in a folder that the environment variable SWITCHKIT_DATA names; "
        f"or set data.fallback to true, which takes {generated} instead",
        looked,
    )


def _in_folder(file: PublishedFile, own: str, looked: list[str]) -> FoundFile | None:
    folder = os.environ.get("SWITCHKIT_DATA", "")
    if not folder:
        looked.append("SWITCHKIT_DATA is not set")
        return None
    path = Path(folder).expanduser() / file.file
    if not path.is_file():
        looked.append(f"SWITCHKIT_DATA has no file {path}")
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} (SWITCHKIT_DATA) cannot be read: {error.strerror}; make it readable") from error
    if wrong := _mismatch(data, file):
        raise DataError(
            f"{path} (SWITCHKIT_DATA) is not {file.title}: {wrong}. Replace it by {file.address}, or give {own}"
        )
    return FoundFile(data, str(path))


def _in_cache(file: PublishedFile, looked: list[str]) -> FoundFile | None:
    path = _cache() / file.file
    try:
        data = path.read_bytes()
    except OSError:
        looked.append(f"the cache has no file {path}")
        return None
    if wrong := _mismatch(data, file):
        looked.append(f"{path} in the cache is not used: {wrong}")
        return None
    return FoundFile(data, str(path))


def _download(file: PublishedFile, looked: list[str]) -> FoundFile | None:
    if os.environ.get("SWITCHKIT_OFFLINE", "") not in ("", "0"):
        looked.append("nothing is downloaded, for SWITCHKIT_OFFLINE is set")
        return None
    try:
        data = _fetch(file)
    except (OSError, http.client.HTTPException) as error:
        looked.append(f"the download failed ({error or type(error).__name__})")
        return None
    if wrong := _mismatch(data, file):
        looked.append(f"what {file.address} sent is not used: {wrong}")
        return None
    path = _cache() / file.file
    try:
        _write(path, data)
    except OSError as error:
        # The data itself is at hand: the run goes on, and the next one downloads again.
        return FoundFile(data, file.address, f", not kept in {path}: {error.strerror}")
    return FoundFile(data, str(path))


def _fetch(file: PublishedFile) -> bytes:
    """The bytes at the address, one more than expected at most."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    data = bytearray()
    with (
        urllib.request.urlopen(file.address, timeout=_TIMEOUT) as reply,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        task = progress.add_task(f"Downloading {file.title}", total=file.size)
        while len(data) <= file.size and (chunk := reply.read(min(_CHUNK, file.size + 1 - len(data)))):
            data += chunk
            progress.update(task, completed=len(data))
    return bytes(data)


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing, whatever happens meanwhile and however many processes do the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path, shared=True) as temporary, temporary.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _mismatch(data: bytes, file: PublishedFile) -> str:
    if (found := sha256_of(data)) == file.sha256:
        return ""
    more = "more than " if len(data) > file.size else ""
    size = f"{more}{file.size if more else len(data)} bytes"
    return f"{size} with sha256 {found}, expected {file.size} with {file.sha256}"


def _cache() -> Path:
    own, shared = os.environ.get("SWITCHKIT_CACHE", ""), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        return Path(own).expanduser()
    return (Path(shared) if shared else Path.home() / ".cache") / "switchkit"
