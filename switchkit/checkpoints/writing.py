"""Lightning's checkpoint files, in their place whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from switchkit.checkpoints.reading import read
from switchkit.files import put, writes

__all__ = ["AtomicCheckpointIO", "settling_later"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written to a temporary file in the same folder and moved into place.

    A run killed while it saves, or a full disk, leaves the file that was there before. Within `settling_later` the wait
    for the disk (fsync) and the move happen in a thread while training goes on; the next save, a load and the end of
    the run wait for them, and raise what went wrong there. Otherwise the file is in its place when the call returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.settles_later = False
        self._settling: Future[None] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or another process, has nothing to wait for and makes a thread of its own.
        return {**self.__dict__, "_settling": None, "_thread": None}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.wait()
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.part")
        try:
            with writes(target), temporary.open("wb") as file:
                torch.save(checkpoint, file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if not self.settles_later:
            _settle(temporary, target)
            return
        self._thread = self._thread or ThreadPoolExecutor(1, "checkpoint")
        self._settling = self._thread.submit(_settle, temporary, target)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        self.wait()
        return read(path, ours=False)

    def teardown(self) -> None:
        self.wait()

    def wait(self) -> None:
        """Return when the last checkpoint is in its place.

        Raises:
            OSError: it could not be put there; the file that was there before stays.
        """
        settling, self._settling = self._settling, None
        if settling is not None:
            settling.result()


@contextmanager
def settling_later(trainer: L.Trainer) -> Iterator[None]:
    """Saves of a running fit, which need not wait for the disk: its end will."""
    io = trainer.strategy.checkpoint_io
    if not isinstance(io, AtomicCheckpointIO):
        yield
        return
    io.settles_later = True
    try:
        yield
    finally:
        io.settles_later = False


def _settle(temporary: Path, target: Path) -> None:
    try:
        with writes(target):
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            put(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
