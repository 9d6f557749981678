"""What a trained model writes, shown at the end of a run."""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from switchkit.data.encoded_pairs import prefixes_of

__all__ = ["command", "sample"]


@dataclass(frozen=True)
class _Source:
    """The first that evaluation reads: all of it, its text without the prefix, and the language it is meant for."""

    ids: Tensor
    text: str
    language: str | None


def command(module: Any, data: Any, checkpoint: object, written: str | None) -> str:
    """The line that has `checkpoint` write something; `written`: the sample of a decoder."""
    source = _held_out(module, data)
    more = ""
    if source is None:
        prompt = _prompt(module.tokenizer, written)
    else:
        # Its end, in one line: a window of a text is long.
        prompt = " ".join(source.text[-100:].split())
        more = "" if source.language is None else f" --language {source.language}"
    # A word that begins with a dash would be taken for an option.
    between = "=" if prompt.startswith("-") else " "
    named = f"--ckpt_path {shlex.quote(str(checkpoint))} --prompt{between}{shlex.quote(prompt)}"
    return f"switchkit generate {named}{more} --max_new_tokens 200"


def _prompt(tokenizer: Any, written: str | None) -> str:
    """What a decoder can go on from: a speaker of the plays, or its own words where the vocabulary lacks a letter."""
    prompt = "ROMEO:"
    try:
        if tokenizer is None or len(tokenizer.encode(prompt)):
            return prompt
    except ValueError:
        pass
    # A line of it: its vocabulary may have no space to put in a line end's place.
    return (written or "").strip().partition("\n")[0][:24].strip()


def sample(module: Any, data: Any, length: int = 240) -> str:
    """Text that begins anywhere; of an encoder-decoder what it makes of the first held-out source."""
    tokenizer = module.tokenizer
    source = _held_out(module, data)
    if source is not None:
        written = list(module.generate(source.ids, length, temperature=0.0))
        into = "" if source.language is None else f" {source.language}:"
        return f"{source.text}\n->{into} {tokenizer.decode(written)}"
    draw = torch.Generator().manual_seed(0)
    tokens = module.generate(_beginning(tokenizer), length, temperature=0.8, generator=draw)
    return str(tokenizer.decode(list(tokens))).strip("\n")


def _beginning(tokenizer: Any) -> Tensor:
    """A line end where the vocabulary has one, or else what it has; there is always a token."""
    first = "\n" if "\n" in getattr(tokenizer, "characters", "") else tokenizer.decode([0])
    for text in (first or "\n", "a"):
        # Of a space or a line end some vocabularies make no token at all, and others know no letter.
        with suppress(ValueError):
            if len(ids := tokenizer.encode(text)):
                return cast(Tensor, ids)
    return torch.tensor([0])


def _held_out(module: Any, data: Any) -> _Source | None:
    """Null for a model that reads no source."""
    if module.tokenizer is None or not hasattr(module.net, "encoder"):
        return None
    batch = next(iter(data.test_dataloader()), None) or {}
    if "source" not in batch:
        return None
    ids = batch["source"][0]
    if "source_valid" in batch:
        ids = ids[batch["source_valid"][0]]
    if "language" not in batch:
        return _Source(ids, str(module.tokenizer.decode(ids)), None)
    number = int(batch["language"][0])
    prefix = prefixes_of(module.tokenizer, data.languages, data.prefix)[number]
    return _Source(ids, str(module.tokenizer.decode(ids[len(prefix) :])), data.languages[number])
