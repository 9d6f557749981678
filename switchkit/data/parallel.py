"""Where sentence pairs come from: files of the user's, line by line, Multi30k, or the built-in toy languages."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from switchkit.data.published import GZIP, DataError, NotAtHand, PublishedFile, decoded, find_published, sha256_of
from switchkit.data.toy_languages import TOY_LANGUAGES, toy_languages

__all__ = ["LANGUAGES", "MULTI30K", "PARTS", "PairFiles", "Parallel", "find_parallel", "read_parallel"]

PARTS = ("train", "val", "test")

_NAMES = {"train": "train", "val": "val", "test": "test_2016_flickr"}
_SUMS = {
    "train.en": (568929, "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f"),
    "train.de": (637044, "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6"),
    "train.fr": (604242, "622e75069e9f4c577425c4f277116ce66e63a2401c0a2312d90073cb12379a3c"),
    "train.cs": (593827, "a65adb8b32e3bc664f21ecba7a6e7f6950fd1f405e135f7c312faabdb6255077"),
    "val.en": (21650, "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28"),
    "val.de": (24681, "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a"),
    "val.fr": (23001, "ca3106f1a72390591d25f6c45cb4cd39dec4cd3f123e099748a3ce5256c160e9"),
    "val.cs": (22096, "b63226e05c4bd5dd6a42897d74b86a1b9d2c31498252c572b1ea7f7996927fcc"),
    "test_2016_flickr.en": (21077, "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9"),
    "test_2016_flickr.de": (22890, "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8"),
    "test_2016_flickr.fr": (22310, "6d326e188d259fb1d04ac19eae3af956559b3a0b93d7635e56c90987c40c8b90"),
    "test_2016_flickr.cs": (22572, "200a4a74cc9560f051924abb9803be008d1908d77f747e9141aeb86dfd2797f1"),
}
_TOY = {"train": 7000, "val": 500, "test": 500}

MULTI30K = {
    name: PublishedFile(
        title=f"Multi30k ({name})",
        file=f"multi30k/{name}.gz",
        address=f"https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/{name}.gz",
        sha256=sha256,
        size=size,
    )
    for name, (size, sha256) in _SUMS.items()
}
"""Captions of photographs in English, German, French and Czech, by ``part.language`` (arXiv 1605.00459)."""

LANGUAGES = tuple(dict.fromkeys(name.rpartition(".")[2] for name in MULTI30K if not name.endswith(".en")))
"""What Multi30k is translated into."""


@dataclass(frozen=True)
class PairFiles:
    """Line-aligned files, plain or gzip: what is translated, and the translations by language."""

    source: str
    targets: Mapping[str, str]


@dataclass(frozen=True)
class Parallel:
    """The same lines in several languages, and where they came from."""

    source: str
    """The language that is translated."""
    languages: tuple[str, ...]
    """Those it is translated into; the order is that of their numbers."""
    parts: Mapping[str, Mapping[str, Sequence[str]]]
    """By part (of `PARTS`; a missing one was not given) and language."""
    description: str
    """One line for people."""
    origin: str
    """The first file's path or address, or the call that generates the text."""
    generated: bool
    sha256: str
    """Of the files' sums, one a line."""


def find_parallel(languages: Iterable[str] | None = None, *, fallback: bool = False, seed: int = 0) -> Parallel:
    """Multi30k: English captions of photographs and their translations, 29,000 to train on, 1,014 and 1,000 held out.

    The test part is that of 2016 (Flickr). Files are looked for in the folder SWITCHKIT_DATA, then in the cache, then
    downloaded (see `find_published`).

    Args:
        languages: of de, fr, cs; None: all three. The toy languages, where `fallback` allows them: a checkpoint of a
            run that took them says so, and means them wherever it is read.
        fallback: where a file cannot be had, the toy languages of `seed` instead of an error, whatever `languages` are.
        seed: of the toy languages.

    Raises:
        DataError: no such language, or a file that cannot be had, or one that is there and wrong.
    """
    wanted = tuple(LANGUAGES if languages is None else languages)
    if fallback and wanted == TOY_LANGUAGES[1:]:
        return _toy(seed, "data.languages names them")
    if not wanted or not set(wanted) <= set(LANGUAGES) or len(set(wanted)) < len(wanted):
        raise DataError(
            f"data.languages {list(wanted)} is not possible; Multi30k has {', '.join(LANGUAGES)}, each once"
        )
    files = [MULTI30K[f"{_NAMES[part]}.{code}"] for part in PARTS for code in ("en", *wanted)]
    try:
        found = find_published(
            files, own="files of your own as data.source and data.target", generated="two generated toy languages"
        )
    except NotAtHand as error:
        if not fallback:
            raise
        made = _toy(seed, "; ".join(error.looked))
        rank_zero_info(f"Generated text: {made.description}")
        return made
    lines = iter(_lines(file.data, file.origin) for file in found)
    parts = {part: {code: next(lines) for code in ("en", *wanted)} for part in PARTS}
    notes = "".join(dict.fromkeys(file.note for file in found))
    description = f"Multi30k, {len(parts['train']['en']):,} lines, en to {', '.join(wanted)}{notes}"
    sums = sha256_of("\n".join(file.sha256 for file in files).encode())
    return Parallel("en", wanted, parts, description, found[0].origin, False, sums)


def read_parallel(files: Mapping[str, PairFiles]) -> Parallel:
    """The user's own files, by part; `train` has to be there. Without `val` the last tenth of its lines is held out.

    Lines end with a line feed; other separators of Unicode are text. Space at the ends of a line is dropped.

    Raises:
        DataError: a file that cannot be read, is empty or not UTF-8, or has another number of lines; names the file
            and the line. Parts with different languages.
    """
    languages = tuple(files["train"].targets)
    if not languages or "source" in languages:
        raise DataError(f"data.target has the languages {list(languages)}; give one or more, none of them named source")
    parts: dict[str, dict[str, list[str]]] = {}
    sums: list[str] = []
    for part, own in files.items():
        if set(own.targets) != set(languages):
            raise DataError(
                f"data.{_option(part, 'target')} has the languages {', '.join(own.targets)}, "
                f"data.target has {', '.join(languages)}; give each part the same"
            )
        parts[part] = {}
        names = {"source": (own.source, f"data.{_option(part, 'source')}")}
        names |= {code: (own.targets[code], f"data.{_option(part, 'target')}") for code in languages}
        for code, (path, option) in names.items():
            data = _read(path, option)
            sums.append(sha256_of(data))
            parts[part][code] = _lines(data, f"{option} {path!r}")
            if (one := len(parts[part]["source"])) != (other := len(parts[part][code])):
                shorter, longer = (own.source, path) if one < other else (path, own.source)
                raise DataError(
                    f"{own.source!r} has {one:,} lines and {path!r} has {other:,}: line {min(one, other) + 1:,} of "
                    f"{longer!r} has no partner in {shorter!r}. Give files that say the same, line by line"
                )
    if "val" not in parts:
        count = len(parts["train"]["source"])
        if count < 2:
            raise DataError(f"{files['train'].source!r} has 1 line: give 2 or more, or data.val_source and val_target")
        cut = min(count * 9 // 10, count - 1)
        parts["val"] = {code: lines[cut:] for code, lines in parts["train"].items()}
        parts["train"] = {code: lines[:cut] for code, lines in parts["train"].items()}
    description = f"{Path(files['train'].source).name}, {len(parts['train']['source']):,} lines, to "
    origin = str(Path(files["train"].source).expanduser().resolve())
    return Parallel(
        "source",
        languages,
        parts,
        description + ", ".join(languages),
        origin,
        False,
        sha256_of("\n".join(sums).encode()),
    )


def _toy(seed: int, looked: str) -> Parallel:
    total = sum(_TOY.values())
    lines = toy_languages(seed, total)
    parts, start = {}, 0
    for part, count in _TOY.items():
        parts[part] = {code: said[start : start + count] for code, said in lines.items()}
        start += count
    source, *languages = TOY_LANGUAGES
    description = f"toy languages, seed {seed}, {source} to {', '.join(languages)}, in place of Multi30k ({looked})"
    sums = "\n".join(sha256_of("\n".join(said).encode()) for said in lines.values())
    origin = f"toy_languages(seed={seed}, sentences={total})"
    return Parallel(source, tuple(languages), parts, description, origin, True, sha256_of(sums.encode()))


def _option(part: str, name: str) -> str:
    return name if part == "train" else f"{part}_{name}"


def _read(path: str, option: str) -> bytes:
    file = Path(path).expanduser()
    if file.is_dir():
        raise DataError(f"{option} {path!r} is a folder; name one file in it")
    if not file.exists():
        raise DataError(
            f"{option} {path!r} does not exist (from {Path.cwd()}); name an existing UTF-8 text file or .gz"
        )
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{option} {path!r} cannot be read ({error.strerror}); name a readable file") from error


def _lines(data: bytes, what: str) -> list[str]:
    if data.startswith(GZIP):  # gzip, whatever the name says
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{what} is a damaged gzip file ({error}); copy it again, or unpack it by hand") from error
    if not data.strip():
        raise DataError(f"{what} is empty; name a file with a sentence in each line")
    try:
        text = decoded(data, what)
    except DataError as error:
        cause = error.__cause__
        line = data.count(b"\n", 0, cause.start) + 1 if isinstance(cause, UnicodeDecodeError) else 1
        raise DataError(f"line {line:,} of {error}") from cause
    return [line.strip(" \t\r") for line in text.removesuffix("\n").split("\n")]
