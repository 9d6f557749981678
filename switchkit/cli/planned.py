"""The model that ``switchkit plan`` counts: a recipe's or a config.json's, without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch

from switchkit.cli.arguments import read_arguments
from switchkit.cli.errors import UserError
from switchkit.cli.model_only import ModelOnly
from switchkit.cli.settings import compose
from switchkit.cli.teacher import distils
from switchkit.models import Decoder, EncoderDecoder
from switchkit.module import LanguageModule
from switchkit.report import context_of
from switchkit.report.run import length_name

__all__ = ["Planned", "planned"]


@dataclass(frozen=True)
class Planned:
    """A model on the meta device, and what its recipe says about a step."""

    module: LanguageModule
    batch: int
    context: int
    precision: Any
    accumulate: int
    length: str = "context"
    """The option of its data that says how long a sequence is."""
    by_tokens: bool = False
    """Its data make batches of so many tokens, `batch` of them where all are as long as the longest."""


def planned(argv: Sequence[str], hf_config: str | None, context: int | None) -> Planned:
    """The model of a command line of `fit`, or of a config.json.

    Raises:
        UserError, ValueError: settings that are wrong, no model, one that is not counted here.
    """
    if hf_config is not None:
        if argv:
            raise UserError(f"--hf_config describes the whole model: leave {argv[0]} out")
        from switchkit.interop.importing import module_of_config

        module = module_of_config(hf_config, context=context)
        longest = getattr(module.net, "context", None)
        if context is None and longest is None:
            raise UserError("--hf_config: a model with relative positions has no longest sequence: give --context")
        return Planned(module, 1, context or int(longest or 1), None, 1)
    given = read_arguments(argv)
    if not given.help and given.part_help is None and distils(compose("fit", given)):
        raise UserError(
            "model: a student is trained beside its teacher, whose memory is not counted here: plan the student's own "
            "recipe, or the teacher's"
        )
    cli = _WithoutWeights(argv)
    module = cli.model
    if not isinstance(module, LanguageModule) or not isinstance(module.net, (Decoder, EncoderDecoder)):
        kind = type(getattr(module, "net", module)).__name__
        raise UserError(f"model: plan counts a LanguageModule of a Decoder or EncoderDecoder, not a {kind}")
    trainer = cli.settings.trainer
    length = context or context_of(cli)
    tokens = getattr(cli.datamodule, "batch_tokens", None)
    return Planned(
        module,
        int(getattr(cli.datamodule, "batch_size", 1) or 1) if tokens is None else max(1, tokens // length),
        length,
        trainer.precision,
        int(trainer.accumulate_grad_batches or 1),
        length_name(cli.datamodule),
        tokens is not None,
    )


class _WithoutWeights(ModelOnly):
    """Model and data of `fit`, the model with shapes but no memory: any size can be described."""

    def _add_instantiators(self) -> None:
        super()._add_instantiators()
        self.parser.add_instantiator(_on_meta, L.LightningModule, subclasses=True, prepend=True)

    def _set_seed(self) -> None:
        """Nothing, and no line about it: nothing is drawn."""

    def _begin_from(self) -> None:
        """Nothing: there are no weights to load."""


def _on_meta(cls: Any, *arguments: Any, applied_instantiation_links: Any, **options: Any) -> Any:
    try:
        with torch.device("meta"):
            return cls(*arguments, **options)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"model: a {cls.__name__} with these parts cannot be built without memory: {error}") from error
