"""``switchkit prepare``: texts of any size made into a folder of tokens that training reads from disk."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from switchkit.cli.errors import UserError
from switchkit.cli.options import OptionParser, number, positive
from switchkit.cli.prepare_teacher import prepare_teacher
from switchkit.cli.reading import Bar, bar, stops_cleanly

if TYPE_CHECKING:
    from switchkit.data.tokenizers import Tokenizer

__all__ = ["run"]

SHARD_TOKENS = 1 << 28


def run(command: str, argv: Sequence[str]) -> int:
    """Write the folder, and say what is in it."""
    options = _parser(command).parse(argv)
    _check(options)
    if options.teacher is not None:
        return prepare_teacher(options)

    from switchkit.data.prepare import characters_of, prepare
    from switchkit.data.shard_writer import refuse_existing
    from switchkit.data.text_files import text_files

    refuse_existing(options.out)
    texts = text_files(options.files)
    given = _tokenizer(options.tokenizer)
    with stops_cleanly(), bar() as bars:
        tokenizer = given or characters_of(texts, Bar(bars, texts, "Looking for characters").read)
        line = Bar(bars, texts, "Writing tokens")
        index = prepare(
            options.out,
            texts,
            tokenizer,
            shard_tokens=options.shard_tokens,
            held_out=options.held_out,
            told=lambda count, tokens: line.read(count, f"{tokens:,} tokens"),
        )
    print(
        f"switchkit: {options.out}: {index.tokens:,} tokens of {index.vocab_size:,} ids ({index.dtype}), "
        f"{index.train_tokens:,} to train on and {index.tokens - index.train_tokens:,} held out, in "
        f"{len(index.shards)} file{'s' if len(index.shards) > 1 else ''}; train on it with --data.path "
        f"{shlex.quote(str(options.out))}",
        file=sys.stderr,
    )
    return 0


def _parser(command: str) -> OptionParser:
    parser = OptionParser(
        command,
        "Write the tokens of texts into a folder that data.path can name: training maps it into memory, so that a "
        "corpus larger than memory trains. The texts are read one after another, as if they were one. With --teacher: "
        "what a model says of its training data, for students that learn from it (--model.teacher).",
    )
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="UTF-8 text files, plain or .gz; - is stdin")
    add("--out", required=True, metavar="FOLDER", help="the folder to write, which must not be there yet")
    add(
        "--tokenizer",
        metavar="NAME",
        help="characters (of these texts, the default), bytes, or a Hugging Face tokenizer.json",
    )
    add(
        "--shard_tokens",
        type=positive,
        metavar="N",
        help=f"tokens of one file (default: {SHARD_TOKENS}, half a gigabyte)",
    )
    add(
        "--held_out",
        type=number(float, "a number above 0 and below 1", lambda value: 0 < value < 1),
        metavar="SHARE",
        help="share of the tokens, the last ones, that validation reads and training does not (default: 0.1)",
    )
    add = parser.add_argument_group("with --teacher").add_argument
    add(
        "--teacher",
        metavar="CKPT",
        help="a checkpoint; its own training data are asked about, or the text or folder that FILE names",
    )
    add("--k", type=positive, metavar="K", help="likeliest symbols kept of each token (default: 64, or all)")
    add(
        "--temperature",
        type=number(float, "a finite number above 0", lambda value: 0 < value < float("inf")),
        metavar="T",
        help="of the distributions; the student learns at the same (default: 1)",
    )
    add("--dtype", choices=("float16", "float32"), help="of the logarithms kept (default: float16)")
    add("--context", type=positive, metavar="N", help="tokens of a window of a text (default: its own, or up to 128)")
    add("--stride", type=positive, metavar="N", help="tokens from window to window of a text (default: its context)")
    add(
        "--draws",
        type=positive,
        metavar="N",
        help="ways in which each window with holes is read, for SpanData (default: 8, or those of its data.draws)",
    )
    parser.add_plugins()
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: the fastest there is)")
    return parser


def _check(options: Namespace) -> None:
    """Fill in the defaults, and refuse options that belong to the other use."""
    texts = {"tokenizer": "characters", "shard_tokens": SHARD_TOKENS, "held_out": 0.1}
    asked: dict[str, Any] = {
        "k": None,
        "temperature": 1.0,
        "dtype": "float16",
        "context": None,
        "stride": None,
        "draws": None,
        "device": None,
        "plugins": [],
    }
    own, other = (texts, asked) if options.teacher is None else (asked, texts)
    given = [name for name in other if getattr(options, name) not in (None, [])]
    if given:
        where = "needs --teacher" if options.teacher is None else "is not for --teacher, whose data have their tokens"
        raise UserError(f"prepare: --{given[0]} {where}")
    if options.teacher is None and not options.files:
        raise UserError("prepare: the following arguments are required: FILE")
    for name, value in own.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def _tokenizer(name: str) -> Tokenizer | None:
    """The one that is named; None for the characters of the texts, which must be read for it."""
    if name == "characters":
        return None
    if name == "bytes":
        from switchkit.data.bytes import ByteTokenizer

        return ByteTokenizer()
    from switchkit.data.subwords import FileTokenizer

    return FileTokenizer(name)
