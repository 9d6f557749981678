"""What ``switchkit generate`` is to go on from: texts of the command line, a file or stdin, as token ids."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from switchkit.cli.errors import UserError, near

if TYPE_CHECKING:
    from torch import Tensor

    from switchkit.data.tokenizers import Tokenizer

__all__ = ["Prompt", "check_prompts", "encoded", "language_prefix", "read_prompts"]


@dataclass(frozen=True)
class Prompt:
    """One text, and where it stands, for error messages."""

    text: str
    where: str


def check_prompts(options: Namespace) -> None:
    """Refuse, before anything is loaded, prompts that cannot be had.

    Raises:
        UserError: none or two kinds given, an empty one, no such file.
    """
    if (options.prompt is None) == (options.prompt_file is None):
        given = "contradict each other" if options.prompt is not None else "are both missing"
        raise UserError(
            f"--prompt and --prompt_file {given}: give --prompt TEXT, --prompt_file FILE with one prompt a line, or "
            "--prompt_file - for stdin"
        )
    if options.prompt == "":
        raise UserError("--prompt is empty: give at least one character to continue")
    if options.prompt_file in (None, "-"):
        return
    if not options.prompt_file.strip():
        raise UserError("--prompt_file needs the name of a file, or - for stdin")
    path = Path(options.prompt_file).expanduser()
    if path.is_dir():
        raise UserError(f"--prompt_file {path} is a folder: name a text file in it")
    if not path.exists():  # a pipe is no file, and can be read
        beside = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UserError(f"--prompt_file {path}: there is no such file{near(str(path), beside)}")


def read_prompts(options: Namespace) -> Iterable[Prompt]:
    """The prompts in order; all of a file at once, of stdin each as it comes.

    Raises:
        UserError: an empty line, bytes that are not UTF-8, no line at all; names the line.
    """
    if options.prompt is not None:
        return [Prompt(options.prompt, "--prompt")]
    if options.prompt_file == "-":
        return _lines(sys.stdin.buffer, "stdin")
    with Path(options.prompt_file).expanduser().open("rb") as file:
        return list(_lines(file, options.prompt_file))


def _lines(file: BinaryIO, name: str) -> Iterator[Prompt]:
    number = 0
    for number, raw in enumerate(file, 1):
        where = f"{name}, line {number}"
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            wrong = f"byte 0x{raw[error.start]:02x} at position {error.start}"
            raise UserError(f"{where} is not UTF-8 ({wrong}): save the file as UTF-8") from error
        if not text:
            raise UserError(f"{where} is empty: give a prompt on every line")
        yield Prompt(text, where)
    if not number:
        raise UserError(f"{name} is empty: give one prompt a line")


def encoded(
    prompt: Prompt, tokenizer: Tokenizer, prefix: Tensor | None, end: Sequence[int] = (), begin: Sequence[int] = ()
) -> Tensor:
    """The ids of a prompt, after those of `begin`; with a `prefix` those of a source, as an encoder reads it.

    A source has the first of `end` behind it, and special tokens of the vocabulary, such as ``<extra_id_0>``, where
    they are written.

    Raises:
        UserError: text that the vocabulary does not have.
    """
    import torch

    try:
        if prefix is None:
            ids = tokenizer.encode(prompt.text)
            return torch.cat([ids.new_tensor(list(begin)), ids])
        parts, text = [prefix], ""
        for piece in re.split(r"(<[^<>\s]+>|\[[^\[\]\s]+\])", prompt.text):
            special = tokenizer.special_id(piece)
            if special is None:
                text += piece  # in one with what stands before it, as training encodes it
                continue
            parts += [tokenizer.encode(text), prefix.new_tensor([special])]
            text = ""
        return torch.cat([*parts, tokenizer.encode(text), prefix.new_tensor(list(end[:1]))])
    except ValueError as error:
        raise UserError(f"{prompt.where}: {error}") from error


def language_prefix(
    language: str | None, settings: Mapping[str, Any], tokenizer: Tokenizer, *, encoder: bool
) -> Tensor | None:
    """What comes before a source: the language to translate into, as the checkpoint's data said it.

    None for a model without an encoder, empty where the data told no languages apart.

    Raises:
        UserError: a language that the checkpoint does not know, or none where it knows several.
    """
    import torch

    from switchkit.data.encoded_pairs import prefixes_of

    known = list((settings.get("source") or {}).get("languages") or ()) if encoder else []
    if not known:
        if language is not None:
            raise UserError(f"--language {language}: this checkpoint was not trained to translate; leave it out")
        return torch.empty(0, dtype=torch.long) if encoder else None
    if language is None and len(known) == 1:
        language = known[0]
    if language not in known:
        what = "is missing." if language is None else f"{language} is not known{near(language, known)}"
        raise UserError(f"--language {what} This checkpoint translates into {', '.join(known)}")
    template = ((settings.get("data") or {}).get("init_args") or {}).get("prefix")
    return prefixes_of(tokenizer, known, template)[known.index(language)]
