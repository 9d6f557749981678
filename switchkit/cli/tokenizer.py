"""``switchkit tokenizer train``: a sub-word vocabulary of the user's own text."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from switchkit.cli.errors import UserError, near
from switchkit.cli.options import OptionParser, new_file, number
from switchkit.cli.reading import Bar, bar, stops_cleanly

__all__ = ["run"]

MOST_IDS = 2**24
"""Tables for many more are asked of the memory before the first text is read."""

_USAGE = """usage: switchkit tokenizer train --vocab_size N [options] FILE...

Learn a sub-word vocabulary from text. `switchkit tokenizer train --help` shows the options."""


def run(command: str, argv: Sequence[str]) -> int:
    """Learn a vocabulary and write its file."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if argv[0] != "train":
        raise UserError(f"switchkit tokenizer: unknown action {argv[0]!r}{near(argv[0], ['train'])} Actions: train")
    options = _parser(f"{command} train").parse(argv[1:])

    from switchkit.data.text_files import text_files
    from switchkit.data.train_tokenizer import save_tokenizer, train_tokenizer

    options.out = str(new_file(options.out, makes_folder=True, replaces=True))
    texts = text_files(options.files)
    if any(Path(options.out).resolve() == Path(text).resolve() for text in options.files):
        raise UserError(f"--out {options.out} is one of the texts, which it would take the place of: name another file")
    with stops_cleanly(), bar() as bars:
        line = Bar(bars, texts, "Reading")
        found = train_tokenizer(
            texts,
            options.vocab_size,
            kind=options.kind,
            sentinels=options.sentinels,
            told=lambda count: line.read(count, None if count else "learning sub-words"),
        )
    save_tokenizer(found, options.out)
    fewer = (
        f" (the text gives no more than that of {options.vocab_size:,})"
        if found.vocab_size < options.vocab_size
        else ""
    )
    recipe = f"{{class_path: FileTokenizer, init_args: {{path: {options.out}}}}}"
    print(
        f"switchkit: {options.out}: {found.vocab_size:,} ids{fewer}; use it with switchkit prepare --tokenizer "
        f"{shlex.quote(str(options.out))}, or in a recipe as data.init_args.tokenizer: {recipe}",
        file=sys.stderr,
    )
    return 0


def _parser(command: str) -> OptionParser:
    parser = OptionParser(
        command,
        "Learn a sub-word vocabulary from text and write it as a Hugging Face tokenizer.json. It works on bytes: every "
        "text can be encoded. <pad>, </s>, <unk> and the sentinels <extra_id_N> of span corruption are in it.",
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="UTF-8 text files, plain or .gz; - is stdin")
    size = number(int, f"an integer from 1 to {MOST_IDS}", lambda value: 1 <= value <= MOST_IDS)
    add("--vocab_size", type=size, required=True, metavar="N", help="ids, special tokens and sentinels included")
    add("--out", default="tokenizer.json", metavar="FILE", help="the file to write (default: %(default)s)")
    add(
        "--kind",
        choices=("bpe", "unigram"),
        default="bpe",
        help="bpe merges frequent pairs; unigram keeps the likeliest pieces, and is slower (default: %(default)s)",
    )
    add(
        "--sentinels",
        type=number(int, f"an integer from 0 to {MOST_IDS}", lambda value: 0 <= value <= MOST_IDS),
        default=100,
        metavar="N",
        help="how many <extra_id_N> (default: %(default)s, as T5)",
    )
    return parser
