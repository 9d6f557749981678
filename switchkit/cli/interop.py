"""``switchkit import-hf`` and ``switchkit export-hf``: folders of Hugging Face's transformers, there and back."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from switchkit.cli.checkpoint import checkpoint_path
from switchkit.cli.conversion import say
from switchkit.cli.options import OptionParser, new_file, positive
from switchkit.cli.plugins import bring_in

if TYPE_CHECKING:
    from switchkit.module import LanguageModule

__all__ = ["run"]

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def run(command: str, argv: Sequence[str]) -> int:
    """Run one of the two."""
    return {"import-hf": _import, "export-hf": _export}[command](command, argv)


def _import(command: str, argv: Sequence[str]) -> int:
    parser = OptionParser(
        command,
        "Read a model that Hugging Face's transformers saved, and write it as a checkpoint for `fit`, `generate` and "
        "the others. Only safetensors and JSON files are read, and only local ones. What cannot be built exactly is "
        "refused.",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="holds config.json and model.safetensors, or its shards and their index")
    add("--out", required=True, metavar="PATH", help="the checkpoint to write, such as run.ckpt")
    add("--context", type=positive, metavar="N", help="longest sequence of a decoder (default: the longest possible)")
    add("--no_tokenizer", action="store_true", help="leave tokenizer.json unread: the checkpoint then reads no text")
    options = parser.parse(argv)
    out = new_file(options.out)

    from switchkit.interop.files import save_checkpoint
    from switchkit.interop.importing import import_hf

    module = import_hf(options.folder, context=options.context, tokenizer=not options.no_tokenizer)
    save_checkpoint(module, out)
    say(f"{module.hugging_face['config']['model_type']}, {_told(module)}: wrote {out}")
    return 0


def _export(command: str, argv: Sequence[str]) -> int:
    parser = OptionParser(
        command,
        "Write the model of a checkpoint as a folder that Hugging Face's transformers reads (from_pretrained). What "
        "it could not compute exactly is refused.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="a checkpoint, or 'last': the newest of --default_root_dir")
    add("--out", required=True, metavar="FOLDER", help="the folder to write: a new one, or an empty one")
    add("--default_root_dir", default="runs", metavar="DIR", help="where 'last' is looked for (default: %(default)s)")
    add(
        "--family",
        metavar="NAME",
        help="a model_type such as mistral, where several fit (default: the first that fits)",
    )
    add("--like", metavar="FOLDER", help="take the ids of special tokens from the config.json of this folder")
    add("--max_shard_size", type=_size, default="5GB", metavar="SIZE", help="of one file (default: %(default)s)")
    parser.add_plugins()
    options = parser.parse(argv)
    bring_in(options.plugins)

    from switchkit.interop.documents import read_object
    from switchkit.interop.exporting import export_hf
    from switchkit.interop.files import open_stored

    module, read = open_stored(checkpoint_path(options.checkpoint, options.default_root_dir, ""))
    like = None if options.like is None else read_object(Path(options.like).expanduser() / "config.json")
    family = export_hf(
        module, options.out, family=options.family, like=like, shard_size=options.max_shard_size, read=read
    )
    say(f"{family}, {_told(module)}: wrote {options.out}")
    return 0


def _told(module: LanguageModule) -> str:
    size = sum(parameter.numel() for parameter in module.parameters())
    return f"{size:,} parameters, {len(module.sparse_layers)} sparse layer{'s' * (len(module.sparse_layers) != 1)}"


def _size(text: str) -> int:
    """Bytes, as 5GB or 500MB."""
    match = re.fullmatch(r"(\d{1,12})([KMGT]B)?", text.strip().upper())
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB or 500MB, got {text!r}")
    return int(match[1]) * UNITS[match[2] or ""]
