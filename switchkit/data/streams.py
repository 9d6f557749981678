"""Examples of the Hugging Face package ``datasets``, read as they come: files, or a dataset of the Hub."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from switchkit.data.resumable import generator_of
from switchkit.data.sources import DataError

__all__ = ["FileStream", "HubStream", "Stream", "datasets_package", "order_of", "split_examples", "texts_of"]

FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
}
PACKED = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class FileStream:
    """Files of one format on this machine. Nothing is looked for in a network."""

    files: tuple[str, ...]
    format: str

    @classmethod
    def of(cls, path: str | Sequence[str], option: str) -> FileStream:
        """The files that `path` names: some, or patterns such as ``books/*.jsonl``.

        Raises:
            DataError: no such file, one that is not read, files of several formats; names `option`.
        """
        named = [path] if isinstance(path, str) else list(path)
        found = [file for name in named for file in _matching(name, option)]
        if not found:
            raise DataError(f"{option} is empty; name a file, or a pattern such as books/*.jsonl")
        formats = {file: _format(file, option) for file in found}
        kinds = sorted(set(formats.values()))
        if len(kinds) > 1:
            raise DataError(f"{option} names files of several formats ({', '.join(kinds)}); name files of one")
        return cls(tuple(found), kinds[0])

    def open(self, order: torch.Generator | None) -> Any:
        """The examples; the files in an order that is drawn, or without a generator as they are."""
        package = datasets_package()
        files = list(self.files)
        if order is not None:
            files = [files[i] for i in torch.randperm(len(files), generator=order).tolist()]
        read = getattr(package.Dataset, f"from_{self.format}")
        return read(files, split=package.NamedSplit("train"), streaming=True)

    @property
    def description(self) -> str:
        first = Path(self.files[0]).name
        return first if len(self.files) == 1 else f"{first} and {len(self.files) - 1} more {self.format} files"

    @property
    def identity(self) -> str:
        return " ".join(Path(file).name for file in self.files)

    @property
    def origin(self) -> str:
        return ", ".join(str(Path(file).resolve()) for file in self.files[:5]) + (", ..." if self.files[5:] else "")


@dataclass(frozen=True)
class HubStream:
    """A part of a dataset of the Hub, or of a folder laid out as one. Its files are data; no code of it is run."""

    hub: str
    name: str | None
    split: str

    def open(self, order: torch.Generator | None) -> Any:
        """The examples, in the dataset's own order whatever `order` is."""
        package = datasets_package()
        try:
            return package.load_dataset(self.hub, self.name, split=self.split, streaming=True)
        except Exception as error:  # of the network, of the Hub and of the files, each with classes of their own
            raise DataError(f"data.hub {self.hub!r}, split {self.split!r}, cannot be opened: {_line(error)}") from error

    @property
    def description(self) -> str:
        return f"{self.hub}{f' ({self.name})' if self.name else ''}, split {self.split}"

    identity = description
    origin = description


Stream = FileStream | HubStream


def texts_of(examples: Any, column: str, label: str) -> Iterator[str]:
    """The text of each example.

    Raises:
        DataError: an example that cannot be read, has no such column, or something else than text in it.
    """
    number = 0
    source = iter(examples)
    while True:
        try:
            example = next(source)
        except StopIteration:
            return
        except Exception as error:  # the readers of several formats, each with classes of their own
            raise DataError(f"{label}: the example after number {number} cannot be read: {_line(error)}") from error
        number += 1
        if column not in example:
            raise DataError(f"{label} has no column {column!r}; data.column is one of {', '.join(map(repr, example))}")
        text = example[column]
        if not isinstance(text, str):
            raise DataError(
                f"{label}, example {number}: the column {column!r} holds {_short(text)}, not text; name another one "
                "by data.column, or leave such examples out of the file"
            )
        yield text


def split_examples(examples: Any, rank: int, world_size: int) -> Any:
    """Share `rank` of the examples: whole files where their number divides by `world_size`, else every n-th example."""
    if world_size == 1:
        return examples
    datasets_package()
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(examples, rank=rank, world_size=world_size)


def order_of(seed: int, number: int) -> torch.Generator:
    """What the order of the files in pass `number` is drawn from: the same on all ranks."""
    return generator_of(seed, "files", number)


def datasets_package() -> ModuleType:
    """The package ``datasets``.

    Raises:
        DataError: it is not installed; says how to.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "StreamData needs the package datasets: pip install 'switchkit[datasets]' (or: pip install datasets). "
            "`switchkit prepare` makes token shards of text files without it"
        ) from error
    return datasets


def _matching(name: str, option: str) -> list[str]:
    if "://" in name:
        raise DataError(f"{option} {name}: only files of this machine are read; name a dataset of the Hub by data.hub")
    path = Path(name).expanduser()
    if path.is_dir():
        raise DataError(f"{option} {name} is a folder; name its files by a pattern, such as {name.rstrip('/')}/*.jsonl")
    if path.is_file():
        return [str(path)]
    found = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
    if not found:
        raise DataError(f"{option} {name}: there is no such file (from {Path.cwd()})")
    return found


def _format(file: str, option: str) -> str:
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    while suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    found = FORMATS.get(suffixes[-1]) if suffixes else None
    if found is None:
        raise DataError(f"{option} {file}: the format is told by the ending, which must be {', '.join(FORMATS)}")
    return found


def _line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
