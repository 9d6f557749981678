"""The commands that run a Trainer: fit, validate, test and predict."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn

from switchkit import __version__, checkpoints, strategies
from switchkit.cli.arguments import read_arguments
from switchkit.cli.building import reason
from switchkit.cli.checkpoint import missing_told
from switchkit.cli.errors import UserError, first_process, one_line
from switchkit.cli.parser import SwitchkitParser
from switchkit.cli.part_help import part_help
from switchkit.cli.quiet import quiet
from switchkit.cli.ranges import check_run
from switchkit.cli.settings import compose
from switchkit.cli.trainer_parts import add_parts
from switchkit.ddp import use_for_ddp
from switchkit.models.inputs import check_inputs
from switchkit.module import LanguageModule
from switchkit.optim import check_optimizer
from switchkit.origin import carried
from switchkit.process import keep_memory
from switchkit.registry import full_path
from switchkit.start import later

__all__ = ["SwitchkitCLI", "build", "run"]

use_for_ddp()


def run(command: str, argv: Sequence[str]) -> int:
    """Run ``switchkit fit`` or a sister command."""
    SwitchkitCLI(command, argv)
    return 0


def build(argv: Sequence[str], command: str = "fit", *, weights: bool = True) -> SwitchkitCLI:
    """Model, data and trainer as `command` would build them, without running it.

    `weights` False: a `LanguageModule` has shapes without memory, where its parts allow it, so that any size is built.
    """
    return SwitchkitCLI(command, argv, execute=False, weights=weights)


class SwitchkitCLI(LightningCLI):
    """LightningCLI over settings that are merged and checked beforehand.

    Args:
        command: fit, validate, test or predict.
        argv: its command line.
        execute: False builds `model`, `datamodule` and `trainer` only.
        weights: False builds the model without memory.
    """

    def __init__(self, command: str, argv: Sequence[str], *, execute: bool = True, weights: bool = True) -> None:
        self.command, self.execute, self.weights = command, execute, weights
        self.arguments = read_arguments(argv)
        quiet(command)
        # Merged before Lightning builds its parsers, so that a mistake is told at once.
        asks_help = self.arguments.help or self.arguments.part_help is not None
        self._tree: dict[str, Any] = {} if asks_help else compose(command, self.arguments)
        if execute and not asks_help and self.arguments.print_config is None:
            check_run(self._tree, command)
        super().__init__(
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"default_root_dir": "runs"},
            seed_everything_default=0,
            parser_class=SwitchkitParser,
            parser_kwargs={
                "prog": "switchkit",
                command: {"usage": f"switchkit {command} --config NAME [--config ...] [--KEY VALUE ...]"},
            },
            auto_configure_optimizers=False,
        )

    @property
    def tree(self) -> dict[str, Any]:
        """What was given of the settings, without the defaults of everything else; class paths in full."""
        return copy.deepcopy(self._tree)

    @property
    def out(self) -> str | None:
        """What ``predict --out`` names."""
        given = self.settings.get("out")
        return None if given is None else str(given)

    @property
    def settings(self) -> Any:
        """The settings of this run, as config.yaml saves them."""
        return self.config[self.command]

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        # The parsers of the sister commands would take their time and parse nothing.
        own = {self.command: LightningCLI.subcommands()[self.command]}
        self.subcommands = lambda: own  # type: ignore[method-assign]
        super()._add_subcommands(parser, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [f"switchkit {__version__}, lightning {version('lightning')}"])
        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=ActionConfigFile,
            help="A YAML file or the name of a recipe (`switchkit list recipes`). Give several: later ones win.",
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--plugins", type=list[str] | None, help="Modules to import first, such as my_file.")
        parser.add_argument(
            "--keep_memory",
            type=bool,
            default=False,
            help="Let glibc keep freed memory instead of mapping it anew (mallopt); elsewhere it does nothing.",
        )
        if self.command == "fit":
            parser.add_argument(
                "--init_from",
                type=str | None,
                help="A checkpoint whose model, vocabulary and weights a new run begins from (fine-tuning), and its "
                "data where none are given.",
            )
        if self.command == "predict":
            parser.add_argument(
                "--out",
                type=str | None,
                help="The file of JSON lines for the results, a line for each sequence; null: below the run folder.",
            )
        if self._tree and not self._tree.get("data"):
            return  # the model keeps its own vocabulary
        parser.link_arguments(
            "data",
            "model.init_args.tokenizer",
            compute_fn=lambda data: getattr(data, "tokenizer", None),
            apply_on="instantiate",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        if self.arguments.help:
            parser.parse_args([self.command, "--help"])
        if self.arguments.part_help is not None:
            sys.stdout.write(part_help(self.command, self.arguments))
            raise SystemExit(0)
        # jsonargparse would turn the parts of a list into its own kind, in place.
        self.config = parser.parse_object({"subcommand": self.command, self.command: self.tree})
        if self.arguments.print_config is not None:
            self._print_config(self.arguments.print_config)
            raise SystemExit(0)

    def _parse_ckpt_path(self) -> None:
        """Nothing: the checkpoint's settings came first in `compose`, so that the command line wins over them."""

    def _print_config(self, flags: str) -> None:
        asked = set(flags.split(",")) - {""}
        if not asked <= {"skip_unset", "skip_default"}:
            raise UserError(
                f"--print_config={flags}: expected nothing, =skip_unset, =skip_default or both with a comma"
            )
        options = {"skip_unset": "skip_unset" in asked, "skip_default": "skip_default" in asked}
        sys.stdout.write(self._parser(self.command).dump(self.settings, **options))

    def instantiate_classes(self) -> None:
        if self.settings.keep_memory:
            keep_memory()
        try:
            # Memory is news where several processes share it, not where the weights are built for nobody.
            with later(self._without_memory, warn=rank_zero_warn if self.weights else lambda _: None):
                super().instantiate_classes()
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise reason(error, self._tree) from None
        self._begin_from()

    def _set_seed(self) -> None:
        """With Lightning's line about it only where a run begins."""
        told = logging.getLogger("lightning.fabric.utilities.seed")
        before = told.level
        if not self.execute:
            told.setLevel(logging.WARNING)
        try:
            super()._set_seed()
        finally:
            told.setLevel(before)

    @property
    def _without_memory(self) -> bool:
        """Whether the model is built without memory: nobody wants its weights, or each process gets its part later.

        Not if weights are loaded before the Trainer runs.
        """
        begins = self.settings.get("init_from") is not None and self.settings.get("ckpt_path") is None
        # One of another class may look at its weights, or read those of a teacher.
        own = self.settings.model.class_path == full_path(LanguageModule)
        by_parts = self.execute and strategies.draws_by_parts(self.settings.trainer.strategy)
        return own and not begins and (by_parts or not self.weights)

    def _begin_from(self) -> None:
        """Load the weights that ``--init_from`` names, unless the run goes on from a checkpoint of its own."""
        path = self.settings.get("init_from")
        if path is None or self.settings.get("ckpt_path") is not None:
            return
        try:
            content = checkpoints.read(Path(path))
            self.model.load_state_dict(content["state_dict"])
            if isinstance(self.model, LanguageModule):
                self.model.hugging_face = carried(content["switchkit"], self.model.tokenizer)
        except ValueError as error:
            raise UserError(
                f"--init_from {path}: {error}. A recipe that names net or moe replaces the checkpoint's: give the "
                "checkpoint's sizes there, or only init_args to change"
            ) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        add_parts(self, self._get(self.config_init, "trainer"))
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError, ImportError) as error:
            told = str(error)
            if "backend found" in told:
                told += " Give --trainer.accelerator cpu, or leave it out: what is there is found"
            raise UserError(f"trainer: {told}") from error
        strategies.end_together(trainer.strategy.launcher, tells=lambda error: one_line(error) is not None)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        if not self.execute:
            return
        self._check_data()
        if subcommand == "fit" and isinstance(self.model, LanguageModule):
            check_optimizer(self.model.optimizer)
        if self.settings.get("ckpt_path") is not None:
            from switchkit import report

            if first_process() and isinstance(self.model, LanguageModule):
                report.checkpoint_line(self.settings.ckpt_path)
        elif self.command != "fit" and first_process():
            print(
                f"switchkit: no --ckpt_path was given: {self.command} runs the model with the weights that it begins "
                "with",
                file=sys.stderr,
            )
        with missing_told(self.settings.get("ckpt_path") or self.settings.get("init_from")):
            super()._run_subcommand(subcommand)

    def _check_data(self) -> None:
        """Refuses a run without data, which Lightning would end with a traceback; a module of one's own may bring its.

        Raises:
            UserError: there are none.
            ValueError: the model cannot read them.
        """
        needed = {"fit": "train", "validate": "val"}.get(self.command, self.command)
        if self.datamodule is not None:
            check_inputs(getattr(self.model, "net", None), self.datamodule)
            return
        if is_overridden(f"{needed}_dataloader", self.model):
            return
        paths = [self.settings.get(name) for name in ("ckpt_path", "init_from")]
        given = next((f", and {path} says none, as an imported one does not" for path in paths if path is not None), "")
        raise UserError(
            f"{self.command} needs data: none were given{given}. Give --data, such as --data TextData --data.path "
            "my.txt, or a --config that has them"
        )

    def before_fit(self) -> None:
        from switchkit import report

        report.opening(self)

    def after_fit(self) -> None:
        from switchkit import report

        try:
            report.closing(self)
        except (KeyboardInterrupt, SystemExit):
            if first_process():
                report.cut_short(self)
            raise

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        given = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "predict" and given.get("return_predictions") is None:
            # They go to a file; the memory of all of them is nobody's.
            given["return_predictions"] = False
        return given

    def after_predict(self) -> None:
        from switchkit import report

        report.predicted(self)
