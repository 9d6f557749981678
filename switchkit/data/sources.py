"""Where a text comes from: a file of the user's, a folder of data sets, the cache, the net, or the built-in play."""

from __future__ import annotations

import codecs
import hashlib
import http.client
import os
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from switchkit.data.play import generated_play

__all__ = ["CORPORA", "Corpus", "DataError", "Source", "find_text"]

_TIMEOUT = 5.0  # seconds, to connect and for each read
_CHUNK = 1 << 16


class DataError(ValueError):
    """A text could not be had; the message says where it was looked for and what to do."""


@dataclass(frozen=True)
class Corpus:
    """A published text: where it is kept and how to know it."""

    title: str
    file: str
    """Below the folder of data sets, and below the cache."""
    address: str
    sha256: str
    size: int
    """In bytes."""


@dataclass(frozen=True)
class Source:
    """A text, and where it came from."""

    text: str
    description: str
    """One line for people."""
    origin: str
    """The file's path, the address, or the call that generates it."""
    generated: bool
    sha256: str
    """Of the bytes: the file's, or the text's in UTF-8."""


CORPORA = {
    "tinyshakespeare": Corpus(
        title="Tiny Shakespeare",
        file="tinyshakespeare/input.txt",
        address="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        size=1_115_394,
    )
}


def find_text(
    name: str = "tinyshakespeare", *, path: str | None = None, fallback: bool = False, seed: int = 0
) -> Source:
    """The text of `path`, or else the published text `name`.

    A published text is looked for in the folder SWITCHKIT_DATA, then in the cache (SWITCHKIT_CACHE, else
    XDG_CACHE_HOME/switchkit, else ~/.cache/switchkit), then downloaded into the cache, unless SWITCHKIT_OFFLINE is set.

    Args:
        name: a key of `CORPORA`; not looked at when `path` is given.
        path: any UTF-8 file, taken as it is.
        fallback: where the published text cannot be had, the generated play of `seed` instead of an error.
        seed: of the generated play.

    Raises:
        DataError: no text. A file that is there and wrong is an error with `fallback` too, except in the cache.
    """
    if path is not None:
        return _from_path(path)
    if name not in CORPORA:
        raise DataError(
            f"no text is known as {name!r}; known: {', '.join(CORPORA)}. A file of your own is given as data.path"
        )
    corpus = CORPORA[name]
    looked: list[str] = []
    found = _in_folder(corpus, looked) or _in_cache(corpus, looked) or _download(corpus, looked)
    if found is not None:
        return found
    if fallback:
        text = generated_play(seed)
        description = f"generated play, seed {seed}, in place of {corpus.title} ({'; '.join(looked)})"
        return Source(text, description, f"generated_play(seed={seed})", True, _sha256(text.encode()))
    raise DataError(
        f"{corpus.title} is not at hand: {'; '.join(looked)}. Ways out: name a text file as data.path; or download "
        f"{corpus.address} by hand to {_cache() / corpus.file}, or to {corpus.file} in a folder that the environment "
        "variable SWITCHKIT_DATA names; or set data.fallback to true, which takes a generated play instead"
    )


def _from_path(path: str) -> Source:
    file = Path(path).expanduser()
    if file.is_dir():
        raise DataError(f"data.path {path!r} is a folder; name one text file in it")
    if not file.exists():
        raise DataError(f"data.path {path!r} does not exist (from {Path.cwd()}); name an existing UTF-8 text file")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"data.path {path!r} cannot be read ({error.strerror}); name a readable text file") from error
    if not data:
        raise DataError(f"data.path {path!r} is empty; name a UTF-8 text file with something in it")
    text = _decoded(data, f"data.path {path!r}")
    return Source(text, f"{file.name}, {len(text):,} characters", str(file.resolve()), False, _sha256(data))


def _decoded(data: bytes, what: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{what} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} ({error.reason}); "
            "save the file as UTF-8 (iconv -t utf-8) or name another"
        ) from error
    return text.removeprefix(codecs.BOM_UTF8.decode())


def _in_folder(corpus: Corpus, looked: list[str]) -> Source | None:
    folder = os.environ.get("SWITCHKIT_DATA", "")
    if not folder:
        looked.append("SWITCHKIT_DATA is not set")
        return None
    file = Path(folder).expanduser() / corpus.file
    if not file.is_file():
        looked.append(f"SWITCHKIT_DATA has no file {file}")
        return None
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} (SWITCHKIT_DATA) cannot be read: {error.strerror}; make it readable") from error
    if wrong := _mismatch(data, corpus):
        raise DataError(
            f"{file} (SWITCHKIT_DATA) is not {corpus.title}: {wrong}. Replace it by {corpus.address}, "
            "or give a text of your own as data.path"
        )
    return _published(corpus, data, str(file))


def _in_cache(corpus: Corpus, looked: list[str]) -> Source | None:
    file = _cache() / corpus.file
    try:
        data = file.read_bytes()
    except OSError:
        looked.append(f"the cache has no file {file}")
        return None
    if wrong := _mismatch(data, corpus):
        looked.append(f"{file} in the cache is not used: {wrong}")
        return None
    return _published(corpus, data, str(file))


def _download(corpus: Corpus, looked: list[str]) -> Source | None:
    if os.environ.get("SWITCHKIT_OFFLINE", "") not in ("", "0"):
        looked.append("nothing is downloaded, for SWITCHKIT_OFFLINE is set")
        return None
    try:
        data = _fetch(corpus)
    except (OSError, http.client.HTTPException) as error:
        looked.append(f"the download failed ({error or type(error).__name__})")
        return None
    if wrong := _mismatch(data, corpus):
        looked.append(f"what {corpus.address} sent is not used: {wrong}")
        return None
    file = _cache() / corpus.file
    try:
        _write(file, data)
    except OSError as error:
        # The text itself is at hand: the run goes on, and the next one downloads again.
        return _published(corpus, data, corpus.address, f", not kept in {file}: {error.strerror}")
    return _published(corpus, data, str(file))


def _fetch(corpus: Corpus) -> bytes:
    """The bytes at the address, one more than expected at most."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    data = bytearray()
    with (
        urllib.request.urlopen(corpus.address, timeout=_TIMEOUT) as reply,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        task = progress.add_task(f"Downloading {corpus.title}", total=corpus.size)
        while len(data) <= corpus.size and (chunk := reply.read(min(_CHUNK, corpus.size + 1 - len(data)))):
            data += chunk
            progress.update(task, completed=len(data))
    return bytes(data)


def _write(file: Path, data: bytes) -> None:
    """All of it or nothing, whatever happens meanwhile and however many processes do the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def _published(corpus: Corpus, data: bytes, origin: str, note: str = "") -> Source:
    text = _decoded(data, origin)
    return Source(text, f"{corpus.title}, {len(text):,} characters{note}", origin, False, corpus.sha256)


def _mismatch(data: bytes, corpus: Corpus) -> str:
    if (found := _sha256(data)) == corpus.sha256:
        return ""
    more = "more than " if len(data) > corpus.size else ""
    size = f"{more}{corpus.size if more else len(data)} bytes"
    return f"{size} with sha256 {found}, expected {corpus.size} with {corpus.sha256}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _cache() -> Path:
    own, shared = os.environ.get("SWITCHKIT_CACHE", ""), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        return Path(own).expanduser()
    return (Path(shared) if shared else Path.home() / ".cache") / "switchkit"
