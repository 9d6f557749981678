"""Language modelling on a stream of texts: files or a dataset of the Hub, read by Hugging Face's ``datasets``."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchkit.data.base import Evaluation, ResumableData, require_positive
from switchkit.data.bytes import ByteTokenizer
from switchkit.data.loader import InOrder
from switchkit.data.mixture import Mixture
from switchkit.data.objective_windows import ObjectiveInOrder
from switchkit.data.objectives import Objective, ObjectiveFactory
from switchkit.data.packing import PackedStream, StreamWindows, encoded_texts
from switchkit.data.sources import DataError
from switchkit.data.streams import FileStream, HubStream, Stream, datasets_package, texts_of
from switchkit.data.tokenizers import Tokenizer

__all__ = ["StreamData"]


class StreamData(ResumableData):
    """Texts that are read, encoded and packed while training goes on: JSON, text or Parquet files, or the Hub.

    Needs the package ``datasets`` (pip install 'switchkit[datasets]'). An example is one text: of a text file a line.
    Texts follow each other with the vocabulary's end of text between them, and are cut into windows. `buffer` texts at
    a time are shuffled; the order of files changes with each pass, that of a dataset of the Hub does not. On several
    devices each reads its own files, if their number divides by that of the devices, and else its share of all
    examples.

    Training goes on exactly where a checkpoint left it, on the same number of devices: the position in the stream is in
    the checkpoint under "StreamData". Files are read from this machine alone; a network is used for `hub` only.

    Args:
        path: Files, or patterns such as books/*.jsonl; the ending tells the format (.json, .jsonl, .txt, .parquet;
            texts also .gz).
        validation_path: Files that are held out, of any of these formats. They are kept in memory as tokens.
        hub: Instead of `path`, the name of a dataset of the Hub, such as roneneldan/TinyStories, or a folder laid out
            as one.
        hub_config: Which of several configurations of that dataset.
        split: Its part to train on.
        validation_split: Its part that is held out.
        column: What holds the text.
        context: Tokens of a window; with objectives of what the encoder reads.
        objectives: For encoder-decoders what is learned from a window, each row by one of them, drawn by their weights:
            SpanCorruption, PrefixLM, CausalLM, UL2 or your own. Null: for a decoder, every token from those before it.
        buffer: Texts that are shuffled together; 1: none.
        epoch_batches: Batches that the trainer calls an epoch; a stream has no length of its own.
        batch_size: Windows of a training batch, on each device.
        eval_batch_size: Windows of a batch in evaluation.
        validation_prefix: Tokens of the held-out texts that validation reads while fitting; 0 or null: all of them.
        seed: Of all that is shuffled and drawn.
        tokenizer: The vocabulary; without one, bytes.

    Raises:
        ValueError: a value out of range, neither path nor hub or both, options of the other, no such file, no held-out
            files, or `datasets` is not installed; later, held-out files that are trained on, a text that cannot be read
            or encoded.
    """

    have_sources: bool | None = None  # until it is known whether there are objectives

    def __init__(
        self,
        path: str | list[str] | None = None,
        *,
        validation_path: str | list[str] | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        split: str = "train",
        validation_split: str = "validation",
        column: str = "text",
        context: int = 128,
        objectives: list[ObjectiveFactory] | None = None,
        buffer: int = 1000,
        epoch_batches: int = 1000,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        validation_prefix: int | None = 32768,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, eval_batch_size=eval_batch_size, validation_prefix=validation_prefix, seed=seed
        )
        require_positive(context=context, buffer=buffer, epoch_batches=epoch_batches)
        if (path is None) == (hub is None):
            what = "are both missing" if path is None else "contradict each other"
            raise DataError(f"data.path and data.hub {what}: name files by data.path, or a dataset of the Hub")
        if path is not None and validation_path is None:
            raise DataError("data.validation_path is missing: name files to hold out, which training does not read")
        if hub is not None and validation_path is not None:
            raise DataError("data.validation_path goes with data.path; with data.hub give data.validation_split")
        for name, value, usual in (
            ("hub_config", hub_config, None),
            ("split", split, "train"),
            ("validation_split", validation_split, "validation"),
        ):
            if path is not None and value != usual:
                told = "null" if usual is None else repr(usual)
                raise DataError(f"data.{name} {value!r} goes with data.hub: leave it out ({told}) beside data.path")
        if objectives is not None and not objectives:
            raise DataError("data.objectives is empty; name one or more, or leave it out for a decoder")
        if validation_prefix is not None and (validation_prefix < 0 or validation_prefix == 1):
            raise DataError(f"data.validation_prefix {validation_prefix} is not possible; it must be 2 or more, or 0")
        datasets_package()
        self.path, self.validation_path = path, validation_path
        self.hub, self.hub_config, self.split, self.validation_split = hub, hub_config, split, validation_split
        self.column, self.context, self.objectives = column, context, objectives
        self.have_sources = objectives is not None
        self.buffer, self.epoch_batches = buffer, epoch_batches
        self._tokenizer = ByteTokenizer() if tokenizer is None else tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """The given one, or bytes."""
        return self._tokenizer

    @cached_property
    def stream(self) -> Stream:
        """What is trained on."""
        if self.hub is not None:
            return HubStream(self.hub, self.hub_config, self.split)
        return FileStream.of(self.path or [], "data.path")

    @cached_property
    def held_out(self) -> Stream:
        """What is held out."""
        if self.hub is not None:
            return HubStream(self.hub, self.hub_config, self.validation_split)
        return FileStream.of(self.validation_path or [], "data.validation_path")

    @cached_property
    def objective(self) -> Objective | None:
        """What is learned from a window; None: every token from those before it."""
        if self.objectives is None:
            return None
        build = self.objectives[0] if len(self.objectives) == 1 else partial(Mixture, objectives=self.objectives)
        return build(tokenizer=self.tokenizer)

    @property
    def raw_length(self) -> int:
        """Tokens of a window before anything is made of it."""
        return self.context if self.objective is None else self.objective.raw_length(self.context)

    def source_info(self) -> dict[str, Any]:
        """Where the texts come from, as plain data for a checkpoint."""
        return {"description": self.stream.description, "origin": self.stream.origin, "generated": False}

    def setup(self, stage: str | None = None) -> None:
        trained, held_out = self.stream, self.held_out
        if stage == "fit" and isinstance(trained, FileStream) and isinstance(held_out, FileStream):
            _check_apart(trained, held_out)
        if self.objective is not None:
            self.objective.lengths(self.raw_length)  # says now whether there are sentinels enough
        super().setup(stage)

    def train_loader(self, *, rank: int, world_size: int) -> StreamWindows:
        causal = self.objective is None
        packed = PackedStream(
            self.stream,
            self.tokenizer,
            size=self.raw_length + causal,  # the last token is a target only, and the next window's first
            stride=self.raw_length,
            column=self.column,
            buffer=self.buffer,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )
        return StreamWindows(packed, self.objective, self.batch_size, self.epoch_batches, seed=self.seed)

    def evaluation_loader(self, prefix: int | None) -> Evaluation:
        tokens = self._held_out_tokens(prefix)
        if self.objective is None:
            return InOrder(tokens, self.context, self.eval_batch_size)
        return ObjectiveInOrder(tokens, self.objective, self.raw_length, self.eval_batch_size, seed=self.seed)

    def _held_out_tokens(self, prefix: int | None) -> Tensor:
        """The first `prefix` tokens, or all for 0 and None; no more texts are read than that takes."""
        pieces: list[Tensor] = []
        count = 0
        label = self.held_out.description
        for text in texts_of(self.held_out.open(None), self.column, label):
            pieces += encoded_texts(self.tokenizer, [text], label)
            count += len(pieces[-1])
            if prefix and count >= prefix:
                break
        if count < 2:
            raise DataError(f"{label}: the held-out texts have {count} tokens; 2 or more are needed")
        tokens = torch.cat(pieces)
        return tokens[:prefix] if prefix else tokens


def _check_apart(trained: FileStream, held_out: FileStream) -> None:
    """Refuses to train on what is held out, as where one pattern covers both."""
    held = {Path(file).resolve() for file in held_out.files}
    both = [file for file in trained.files if Path(file).resolve() in held]
    if both:
        raise DataError(
            f"data.path names {both[0]}{f' and {len(both) - 1} more' if both[1:] else ''}, which data.validation_path "
            "holds out: name other files, or a pattern that leaves them out"
        )
