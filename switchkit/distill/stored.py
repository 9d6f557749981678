"""What a teacher said beforehand of every training example, in a folder that is mapped into memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from switchkit.checkpoints import check_classes
from switchkit.data.tokenizers import Tokenizer
from switchkit.distill.loss import TopK
from switchkit.spec import build
from switchkit.twins import net_of

__all__ = ["FILES", "FORMAT_VERSION", "INDEX", "WORDS", "StoredIndex", "StoredTeacher", "digests", "is_stored"]

INDEX = "teacher.json"
WORDS = ("teacher_log_probs", "teacher_ids", "teacher_log_rest")
"""What a batch carries of a teacher: the parts of a `TopK`."""
FORMAT_VERSION = 1
FILES = ("log_probs.npy", "ids.npy", "log_rest.npy", "offsets.npy", "digests.npy", "non_expert.pt")
AGAIN = "; write the folder again with `switchkit prepare --teacher`"


@dataclass(frozen=True)
class StoredIndex:
    """What the folder holds."""

    k: int
    """Symbols kept of every token."""
    vocab_size: int
    temperature: float
    """At which the distributions were written down: the mass of the rest is known at this one only."""
    examples: int
    tokens: int
    """Real tokens of all examples."""
    parameters: int
    """Of the teacher."""
    teacher: Mapping[str, Any]
    """Its checkpoint: path, step, sha256."""
    model: Mapping[str, Any]
    """The description of its module."""
    data: Mapping[str, Any]
    """The description of the data, whose training examples these are."""
    bytes: Mapping[str, int]
    """Size of each file."""
    hugging_face: Mapping[str, Any] = field(default_factory=dict)
    """What the files said that the teacher was imported from."""

    def to_json(self) -> str:
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> StoredIndex:
        """The index of a folder, with every file there in its size and every class in it known.

        Raises:
            ValueError: the first thing that is wrong.
        """
        where = folder / INDEX
        if not where.is_file():
            raise ValueError(
                f"{folder} is a folder without {INDEX}: name a checkpoint, or a folder that "
                "`switchkit prepare --teacher` wrote"
            )
        try:
            told = json.loads(where.read_text(encoding="utf-8"))
            version = told.pop("format_version")
            index = cls(**told)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{where} is damaged ({error}){AGAIN}") from error
        if version != FORMAT_VERSION:
            raise ValueError(f"{where} has format_version {version}; this switchkit reads {FORMAT_VERSION}{AGAIN}")
        for name in FILES:
            file = folder / name
            size = file.stat().st_size if file.is_file() else None
            if size != index.bytes.get(name):
                found = "is not there" if size is None else f"has {size} bytes, not {index.bytes.get(name)}"
                raise ValueError(f"{file} {found}{AGAIN}")
        check_classes(index.model, index.data)
        return index


class StoredTeacher:
    """A teacher of which only its words are left.

    It stands where a `Teacher` does, but cannot be asked anything new, nor looked into.

    Args:
        folder: what ``switchkit prepare --teacher`` wrote.

    Raises:
        ValueError: see `StoredIndex.read`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.index = StoredIndex.read(self.folder)
        sha = hashlib.sha256((self.folder / INDEX).read_bytes()).hexdigest()
        self.about = {"path": str(self.folder.absolute()), "step": self.index.teacher["step"], "sha256": sha}
        self._log_probs, self._ids, self._log_rest, self._offsets, self._digests = (
            self._open(name) for name in FILES[:5]
        )

    @property
    def spec(self) -> Mapping[str, Any]:
        """The description of the module that trained it."""
        return self.index.model

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Its vocabulary."""
        found = (self.spec.get("init_args") or {}).get("tokenizer")
        return None if found is None else build(found)()

    @property
    def hugging_face(self) -> Mapping[str, Any]:
        """What the files said that it was imported from."""
        return self.index.hugging_face

    @property
    def vocab_size(self) -> int:
        """Symbols of its logits."""
        return self.index.vocab_size

    @property
    def parameters(self) -> int:
        return self.index.parameters

    @property
    def net(self) -> nn.Module:
        """Its shape, without weights."""
        return net_of(self.spec, self.vocab_size)

    def outside(self) -> dict[str, Tensor]:
        """Its weights outside sparse layers, which are kept in the folder."""
        found: dict[str, Tensor] = torch.load(self.folder / "non_expert.pt", map_location="cpu", weights_only=True)
        return found

    def attach(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch with what it said of its examples, under the names of `WORDS`; zeros for padding.

        It is read on the CPU, for a batch that is still there: that of one on a GPU would wait for its step to end.

        Raises:
            ValueError: the batch does not say which examples these are, or they are not those that were written down.
        """
        if "example" not in batch:
            raise ValueError(
                "these batches do not say which examples they hold, so nothing can be looked up for them: with "
                f"TextData and SpanData set data.stride to that of {self.folder}, or give the teacher's checkpoint"
            )
        number = batch["example"].cpu().numpy()
        valid = _valid(batch)
        if number.size and int(number.max()) >= self.index.examples:
            self._refuse(f"there are {self.index.examples} examples in the folder, and this is number {number.max()}")
        if not np.array_equal(self._digests[number], digests(batch)):
            wrong = number[self._digests[number] != digests(batch)][0]
            self._refuse(f"example {wrong} is not what it was")
        start = torch.from_numpy(self._offsets[number])
        rows = (start[:, None] + valid.cumsum(1) - 1).clamp(min=0, max=self.index.tokens - 1).numpy()
        probs, rest = torch.from_numpy(self._log_probs[rows]), torch.from_numpy(self._log_rest[rows])
        ids = torch.from_numpy(self._ids[rows].astype(np.int32))
        gone, device = ~valid, batch["targets"].device
        padded = gone.unsqueeze(-1)
        found = probs.masked_fill(padded, 0), ids.masked_fill(padded, 0), rest.masked_fill(gone, 0)
        return {**batch, **{name: part.to(device) for name, part in zip(WORDS, found, strict=True)}}

    def lookup(self, batch: Mapping[str, Tensor]) -> TopK:
        """What it said of the examples of a batch: what the batch carries, or what is read now, see `attach`."""
        carried = batch if WORDS[0] in batch else self.attach(batch)
        probs, ids, rest = (carried[name] for name in WORDS)
        return TopK(probs, ids.long(), rest)

    def _refuse(self, why: str) -> None:
        raise ValueError(
            f"{self.folder} was written for other training data ({why}): train on the data, the context and the stride "
            "that it was written for, or write it again for these"
        )

    def _open(self, name: str) -> np.ndarray[Any, Any]:
        try:
            return np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{self.folder / name} is damaged ({error}){AGAIN}") from error


def is_stored(path: str | Path) -> bool:
    """Whether a teacher's path is a folder of what it said; a checkpoint may be a folder too."""
    return (Path(path).expanduser() / INDEX).is_file()


def digests(batch: Mapping[str, Tensor]) -> np.ndarray[Any, Any]:
    """uint64 [B]: of what a model reads and has to say in each row, padding left out."""
    valid = _valid(batch)
    parts = [(batch["tokens"].cpu(), valid), (batch["targets"].cpu(), valid)]
    if "source" in batch:
        source = batch["source"].cpu()
        real = batch.get("source_valid")
        parts.append((source, torch.ones_like(source, dtype=torch.bool) if real is None else real.cpu()))
    found = np.empty(len(valid), dtype=np.uint64)
    for row in range(len(valid)):
        digest = hashlib.blake2b(digest_size=8)
        for ids, real in parts:
            kept = ids[row][real[row]]
            digest.update(len(kept).to_bytes(8, "little") + kept.numpy().tobytes())
        found[row] = int.from_bytes(digest.digest(), "little")
    return found


def _valid(batch: Mapping[str, Tensor]) -> Bool[Tensor, "B S"]:
    valid = batch.get("valid")
    return torch.ones_like(batch["targets"], dtype=torch.bool, device="cpu") if valid is None else valid.cpu()
