"""The results of `predict`, as a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader

from switchkit.data.tokenizers import Tokenizer
from switchkit.files import writes

__all__ = ["WritePredictions", "records"]


class WritePredictions(L.Callback):
    """Writes what `predict_step` found to a file of JSON lines, one for each sequence, in the order of the data.

    Of a `LanguageModule` a line has ``{"loss", "tokens", "nats", "best"}``: the mean surprise in nats, the targets,
    the surprise of each, and the token that the model held for the likeliest in its place; with a tokenizer also their
    `text` and the `source` of an encoder-decoder as text. Another module gives a dict of tensors [B, ...], of which a
    line has a row each. The file takes its place when all is written; a run that breaks off leaves the one before.

    Args:
        path: the file; null: ``predictions.jsonl`` in the folder of the first logger, else of the trainer.

    Raises:
        ValueError: at the start, a path that is a folder, or data that are split over several devices; later,
            predictions that are no dict of tensors with a row for each sequence.
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.written: Path | None = None
        """The last file that was completed."""
        self.count = 0
        """Its lines."""
        self._target = self._temporary = Path()
        self._file: TextIO | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loaders = trainer.predict_dataloaders
        split = any(isinstance(one, DataLoader) for one in (loaders if isinstance(loaders, list) else [loaders]))
        if trainer.world_size > 1 and split:
            raise ValueError(
                f"the data are split over {trainer.world_size} devices, and one file holds them in order: predict with "
                "--trainer.devices 1"
            )
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        self._target = folder / "predictions.jsonl" if self.path is None else Path(self.path)
        if self._target.is_dir():
            raise ValueError(f"predictions cannot be written to {self._target}, which is a folder: give a file in it")
        read = getattr(getattr(trainer, "datamodule", None), "path", None)
        if isinstance(read, str | Path) and self._target.resolve() == Path(read).expanduser().resolve():
            raise ValueError(
                f"predictions would take the place of {self._target}, the text they are about: name another"
            )
        self.count, self.written = 0, None
        if not trainer.is_global_zero:
            return
        self._temporary = self._target.with_name(f".{self._target.name}.part")
        with writes(self._target):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("w", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._file is None:
            return
        for line in records(outputs, batch, getattr(pl_module, "tokenizer", None)):
            with writes(self._target):
                self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self.count += 1

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._file is None:
            return
        with writes(self._target):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            os.replace(self._temporary, self._target)
        self.written = self._target

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._file is not None:
            with suppress(OSError):  # of a full disk, which was told
                self._file.close()
            self._file = None
            self._temporary.unlink(missing_ok=True)


def records(outputs: Any, batch: Any, tokenizer: Tokenizer | None) -> Iterator[dict[str, Any]]:
    """One dict of plain data for each sequence of a batch.

    Raises:
        ValueError: outputs that are no dict of tensors with a row for each sequence.
    """
    rows = {len(value) if isinstance(value, Tensor) and value.dim() else -1 for value in _values(outputs)}
    if len(rows) != 1 or -1 in rows:
        raise ValueError(
            f"predictions of type {type(outputs).__name__} have no row for each sequence: return a dict of tensors "
            "[B, ...] from predict_step, or give the trainer a BasePredictionWriter of your own"
        )
    ours = {"nats", "best", "targets"} <= outputs.keys()
    for row in range(rows.pop()):
        if not ours:
            yield {str(name): value[row].tolist() for name, value in outputs.items()}
            continue
        valid = outputs.get("valid")
        real = outputs["targets"][row] != -100 if valid is None else valid[row] & (outputs["targets"][row] != -100)
        nats, best, targets = (outputs[name][row][real] for name in ("nats", "best", "targets"))
        line: dict[str, Any] = {
            "loss": round(float(nats.double().mean()), 6) if len(nats) else None,
            "tokens": targets.tolist(),
            "nats": [round(value, 4) for value in nats.tolist()],
            "best": best.tolist(),
        }
        if tokenizer is not None:
            line["text"] = _text(tokenizer, line["tokens"])
            if isinstance(batch, Mapping) and "source" in batch:
                seen = batch.get("source_valid")
                source = batch["source"][row]
                line["source"] = _text(tokenizer, (source if seen is None else source[seen[row]]).tolist())
        yield line


def _values(outputs: Any) -> Iterable[Any]:
    return outputs.values() if isinstance(outputs, Mapping) and outputs else [None]


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Of the ids that the tokenizer has: a published model has more."""
    return tokenizer.decode([number for number in ids if number < tokenizer.vocab_size])
