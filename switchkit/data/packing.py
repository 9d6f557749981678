"""Windows of tokens, packed from a stream of texts, and a place in them that a run goes on from."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor

from switchkit.data.anywhere import next_tokens
from switchkit.data.objectives import Objective
from switchkit.data.resumable import TrainingLoader, generator_of
from switchkit.data.sources import DataError
from switchkit.data.streams import Stream, order_of, split_examples, texts_of
from switchkit.data.subwords import FileTokenizer
from switchkit.data.tokenizers import Tokenizer

__all__ = ["PackedStream", "StreamWindows", "encoded_texts"]


def encoded_texts(tokenizer: Tokenizer, texts: list[str], label: str) -> list[Int[Tensor, "_"]]:
    """The ids of each text, the end of a text behind it where the vocabulary has one.

    Raises:
        DataError: a text that the vocabulary cannot express.
    """
    try:
        if isinstance(tokenizer, FileTokenizer):
            found = tokenizer.encode_batch(texts)
        else:
            found = [tokenizer.encode(text) for text in texts]
    except ValueError as error:
        raise DataError(f"{label}: {error}") from error
    if tokenizer.eos_id is None:
        return found
    end = torch.tensor([tokenizer.eos_id])
    return [torch.cat([ids, end]) for ids in found]


class PackedStream:
    """Windows of `size` tokens, `stride` apart, of the texts of one rank one after another, pass after pass.

    `buffer` texts are read at a time and shuffled, and so are the windows that they give. What does not fill a window
    goes in front of the next ones. What is drawn is a function of the seed, the rank, the pass and the number of the
    buffer: so a position is where the buffer began in the stream, and how many of its windows were taken. To go on
    there, one buffer is read again.

    Args:
        stream: where the texts are.
        tokenizer: makes ids of them.
        size: tokens of a window.
        stride: from the beginning of a window to the next one's, at most `size`.
        column: of the text.
        buffer: texts that are shuffled together; 1: none.
        seed: of the order of files, texts and windows.
        rank: which share this is.
        world_size: how many shares there are.
    """

    def __init__(
        self,
        stream: Stream,
        tokenizer: Tokenizer,
        *,
        size: int,
        stride: int,
        column: str,
        buffer: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.stream, self.tokenizer, self.column = stream, tokenizer, column
        self.size, self.stride, self.buffer = size, stride, buffer
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.restart()

    def restart(self) -> None:
        """Begin the first pass."""
        self.load_state_dict({"pass": 0, "buffer": 0, "stream": None, "rest": [], "taken": 0})

    def take(self, count: int) -> Int[Tensor, "count S"]:
        """The next windows.

        Raises:
            DataError: a text that cannot be read or encoded, or a pass without any.
        """
        rows: list[Tensor] = []
        missing = count
        while missing:
            if self._taken == len(self._windows):
                self._fill()
            some = self._windows[self._taken : self._taken + missing]
            self._taken += len(some)
            missing -= len(some)
            rows.append(some)
        return torch.cat(rows)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, text and lists."""
        return {**self._begin, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a saved position."""
        self._begin = {name: state[name] for name in ("pass", "buffer", "stream", "rest")}
        self._pass, self._buffer = int(state["pass"]), int(state["buffer"])
        self._rest = torch.tensor(state["rest"], dtype=torch.long)
        self._examples: Any = None
        self._texts: Iterator[str] = iter(())
        # In the middle of a pass there was something before.
        self._found = self._buffer > 0
        self._windows = torch.empty(0, self.size, dtype=torch.long)
        self._taken = 0
        if state["taken"]:
            self._open(state["stream"])
            self._fill()
            self._taken = int(state["taken"])

    def _open(self, position: Any) -> None:
        examples = split_examples(self.stream.open(order_of(self.seed, self._pass)), self.rank, self.world_size)
        if position is not None:
            examples.load_state_dict(position)
        self._examples, self._position = examples, position
        self._texts = texts_of(examples, self.column, self.stream.description)

    def _fill(self) -> None:
        """Read until there is a window."""
        self._windows, self._taken = self._windows[:0], 0
        while not len(self._windows):
            if self._examples is None:
                self._open(self._begin["stream"])
            place = {"pass": self._pass, "buffer": self._buffer, "stream": self._position}
            self._begin = {**place, "rest": self._rest.tolist()}
            texts = list(islice(self._texts, self.buffer))
            if texts:
                self._pack(texts)
                self._buffer += 1
                self._position = self._examples.state_dict()
            else:
                self._end_pass()

    def _pack(self, texts: list[str]) -> None:
        draw = generator_of(self.seed, "texts", self.rank, self._pass, self._buffer)
        order = torch.randperm(len(texts), generator=draw).tolist()
        pieces = encoded_texts(self.tokenizer, [texts[i] for i in order], self.stream.description)
        self._found = self._found or any(len(piece) for piece in pieces)
        tokens = torch.cat([self._rest, *pieces])
        count = max(0, (len(tokens) - self.size) // self.stride + 1)
        self._rest = tokens[count * self.stride :].clone()
        if count:
            mixed = torch.randperm(count, generator=draw) if self.buffer > 1 else torch.arange(count)
            self._windows = tokens.unfold(0, self.size, self.stride)[mixed]

    def _end_pass(self) -> None:
        if not self._found:
            share = f" for rank {self.rank} of {self.world_size}" if self.world_size > 1 else ""
            raise DataError(f"{self.stream.description} has no text{share}: name files with text in {self.column!r}")
        self._pass, self._buffer, self._found, self._examples = self._pass + 1, 0, False, None
        self._begin = {**self._begin, "stream": None}


class StreamWindows(TrainingLoader[None]):
    """Batches of the windows of a stream, for a decoder or by an objective for an encoder-decoder.

    An epoch is `epoch_batches` batches, and the stream goes on where the last one ended: it has no length, and the
    shares of the ranks have several.

    Args:
        packed: the windows of this rank: context + 1 tokens for a decoder.
        objective: turns windows into a batch; None: every token from those before it.
        batch_size: windows of a batch.
        epoch_batches: batches that the trainer calls an epoch.
        seed: of what an objective draws.
    """

    words: ClassVar[dict[str, str]] = {
        "source": "the stream",
        "column": "column of the text",
        "size": "tokens of a window (context and the objectives decide it)",
        "batch_size": "windows of a batch (batch_size)",
        "epoch_batches": "batches of an epoch (epoch_batches)",
        "buffer": "texts that are shuffled together (buffer)",
        "seed": "seed",
        "devices": "devices",
    }

    def __init__(
        self, packed: PackedStream, objective: Objective | None, batch_size: int, epoch_batches: int, *, seed: int = 0
    ) -> None:
        super().__init__(seed=seed, rank=packed.rank, world_size=packed.world_size)
        self.packed, self.objective = packed, objective
        self.batch_size, self.epoch_batches = batch_size, epoch_batches

    def __len__(self) -> int:
        return self.epoch_batches

    def settings(self) -> dict[str, int | str]:
        packed = self.packed
        return {
            "source": packed.stream.identity,
            "column": packed.column,
            "size": packed.size,
            "batch_size": self.batch_size,
            "epoch_batches": self.epoch_batches,
            "buffer": packed.buffer,
            "seed": self.seed,
            "devices": self.world_size,
        }

    def plan(self, generator: torch.Generator) -> None:
        if self.repeat and not self._batch:  # else it goes on in the middle of an epoch
            self.packed.restart()

    def batch(self, plan: None, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = self.packed.take(self.batch_size)
        if self.objective is not None:
            return self.objective(rows, generator)
        return next_tokens(rows)

    def state_dict(self) -> dict[str, Any]:
        """The position of every rank's stream: all ranks call this together, and one of them writes the file."""
        own = self.packed.state_dict()
        every: list[Any] = [own if rank == self.rank else None for rank in range(self.world_size)]
        if self.world_size > 1 and dist.is_available() and dist.is_initialized():
            dist.all_gather_object(every, own)
        return {**super().state_dict(), "streams": every}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.packed.load_state_dict(state_dict["streams"][self.rank])
