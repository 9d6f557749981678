"""Where a text comes from: a file of the user's, a published one, or the built-in play."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from switchkit.data.play import generated_play
from switchkit.data.published import DataError, NotAtHand, PublishedFile, decoded, find_published, sha256_of

__all__ = ["CORPORA", "DataError", "Source", "find_text"]


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
    "tinyshakespeare": PublishedFile(
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
    file = CORPORA[name]
    try:
        (found,) = find_published([file], own="a text file of your own as data.path", generated="a generated play")
    except NotAtHand as error:
        if not fallback:
            raise
        text = generated_play(seed)
        description = f"generated play, seed {seed}, in place of {file.title} ({'; '.join(error.looked)})"
        rank_zero_info(f"Generated text: {description}")
        return Source(text, description, f"generated_play(seed={seed})", True, sha256_of(text.encode()))
    text = decoded(found.data, found.origin)
    description = f"{file.title}, {len(text):,} characters{found.note}"
    return Source(text, description, found.origin, False, file.sha256)


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
    text = decoded(data, f"data.path {path!r}")
    return Source(text, f"{file.name}, {len(text):,} characters", str(file.resolve()), False, sha256_of(data))
