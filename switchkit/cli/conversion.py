"""What the commands share that make a checkpoint of another one."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchkit.cli.checkpoint import checkpoint_path
from switchkit.cli.errors import UserError
from switchkit.cli.options import OptionParser, new_file
from switchkit.cli.plugins import bring_in

if TYPE_CHECKING:
    from switchkit.module import LanguageModule

__all__ = ["Conversion", "conversion_parser", "say"]


@dataclass(frozen=True)
class Conversion:
    """A checkpoint that was read, and where another one made of it goes."""

    path: Path
    out: Path
    module: LanguageModule
    data: dict[str, Any] | None
    source: dict[str, Any] | None
    plugins: Sequence[str] = ()

    @classmethod
    def begin(cls, options: Namespace) -> Conversion:
        """Read what the command line names.

        Raises:
            UserError, ValueError: it cannot be read, or the file to write is there already.
        """
        out = new_file(options.out)
        bring_in(options.plugins)

        from switchkit import checkpoints
        from switchkit.interop.files import open_checkpoint

        path = checkpoint_path(options.checkpoint, options.default_root_dir, "")
        if (path / "config.json").is_file():
            raise UserError(
                f"{path} is a folder of Hugging Face's: make a checkpoint of it first, with switchkit import-hf "
                f"{shlex.quote(str(path))} --out model.ckpt"
            )
        module = open_checkpoint(path)
        settings = checkpoints.read_settings(path)
        return cls(path, out, module, settings["data"], settings["source"], options.plugins)

    @property
    def go_on(self) -> str:
        """The command that trains what was made, on the data that the checkpoint belongs to."""
        data = "" if self.data is not None else f" --data {self._readable()}"
        plugins = f" --plugins {shlex.join(self.plugins)}" if self.plugins else ""
        return f"switchkit fit --ckpt_path {shlex.quote(str(self.out))}{data}{plugins} --trainer.max_steps 1000"

    def _readable(self) -> str:
        """Data that the model can read, where it belongs to none."""
        from switchkit.models.inputs import kind_of_data

        kind = kind_of_data(self.module.net, self.module.tokenizer)
        files = "--data.source FILE --data.target FILE" if kind == "PairData" else "--data.path FILE"
        return f"{kind} {files}"

    def save(self, module: LanguageModule) -> None:
        """Write a model with the tokenizer, the data settings and the source of the one that was read."""
        from switchkit.interop.files import save_checkpoint

        save_checkpoint(module, self.out, data=self.data, source=self.source)


def conversion_parser(command: str, description: str) -> OptionParser:
    """A parser with the options that all of these commands have."""
    parser = OptionParser(command, description)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="a checkpoint, or 'last': the newest of --default_root_dir")
    add("--out", required=True, metavar="PATH", help="the checkpoint to write, such as made.ckpt")
    add("--default_root_dir", default="runs", metavar="DIR", help="where 'last' is looked for (default: %(default)s)")
    parser.add_plugins()
    return parser


def say(text: str) -> None:
    print(f"switchkit: {text}", file=sys.stderr)
