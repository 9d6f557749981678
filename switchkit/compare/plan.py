"""From a definition to the settings that each run is trained with, all checked before the first step."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.data import sized_len

from switchkit.cli.arguments import Arguments
from switchkit.cli.errors import UserError, near
from switchkit.cli.lightning import SwitchkitCLI, build
from switchkit.cli.normalise import target_of
from switchkit.cli.ranges import is_zero
from switchkit.cli.recipes import dump_yaml
from switchkit.cli.settings import compose
from switchkit.cli.signatures import signature_of
from switchkit.compare.budget import Budget, Cost
from switchkit.compare.definition import Definition, Entry
from switchkit.compare.quiet import quiet
from switchkit.counts import Counts, count
from switchkit.data.base import ResumableData
from switchkit.data.pair_loaders import BucketedPairs
from switchkit.data.tokenizers import Tokenizer
from switchkit.models import EncoderDecoder
from switchkit.module import LanguageModule

__all__ = ["Model", "cli_of", "composed", "context_of", "model_of", "reference", "steps_of", "takes_seed"]

_NEVER = 10**9
_READS = {
    "limit_train_batches": "runs that train on nothing cannot be compared",
    "limit_val_batches": "runs are compared by their validation loss",
}
_OURS: dict[str, Any] = {
    # Steps are the only bound; evaluation, seeds and folders are the comparison's business.
    "max_epochs": None,
    "min_epochs": None,
    "min_steps": None,
    "max_time": None,
    "val_check_interval": _NEVER,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "devices": 1,
}


@dataclass(frozen=True)
class Model:
    """What is known of a run's model before it trains."""

    counts: Counts
    cost: Cost
    sparse: bool
    data: str
    generated: bool
    """The text is made up, by the data's seed."""
    evaluated: int | None = None
    """Batches of the held-out text that the loss is of; None: all."""
    sha256: str | None = None
    """Of the text; None: the data do not say."""
    vocabulary: Tokenizer | int = 0
    """Or how many symbols it has, where that is all there is."""
    held_out: tuple[int | None, int | None] = (None, None)
    """Sequences of the held-out text that the loss is of, None: all; and the prefix that the curve is of."""
    ordered: bool = True
    """The data have a generator of their own: their order does not follow what a model draws."""


def composed(entry: Entry, edits: Sequence[tuple[str, str]], plugins: Sequence[str]) -> dict[str, Any]:
    """The settings of a run, merged and checked as ``fit`` does it, with full import paths.

    Raises:
        UserError, ValueError: the first thing that is wrong with them.
    """
    arguments = Arguments(configs=list(entry.configs), plugins=list(plugins), edits=list(edits))
    try:
        tree = compose("fit", arguments)
    except (UserError, ValueError) as error:
        raise UserError(f"run {entry.name}: {error}") from error
    trainer = dict(tree.get("trainer") or {})
    if tree.get("ckpt_path") is not None:
        raise UserError(f"run {entry.name}: ckpt_path: a comparison trains from the start; use init_from for weights")
    for key in ("fast_dev_run", "overfit_batches"):
        if trainer.get(key):
            raise UserError(f"run {entry.name}: trainer.{key} leaves nothing to compare; try --budget steps=2")
    for key, why in _READS.items():
        if is_zero(trainer.get(key)):
            raise UserError(
                f"run {entry.name}: trainer.{key} {trainer[key]}: {why}: leave it out, or give a number above 0"
            )
    if trainer.get("devices") not in (None, "auto", 1, "1", [0]) or (trainer.get("num_nodes") or 1) != 1:
        raise UserError(f"run {entry.name}: trainer.devices {trainer['devices']}: a comparison trains on one device")
    if not tree.get("data"):
        raise UserError(f"run {entry.name}: names no data, so there is nothing to train on")
    tree["trainer"] = {**trainer, **_OURS}
    tree.pop("seed_everything", None)
    return tree


def model_of(name: str, tree: Mapping[str, Any]) -> Model:
    """Build a run's model and data, without training them.

    Raises:
        UserError, ValueError: they cannot be built.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(dump_yaml(tree), "utf-8")
        try:
            with quiet():
                cli = build(["--config", str(file), "--trainer.max_steps", "1", "--seed_everything", "0"])
        except (UserError, ValueError) as error:
            raise UserError(f"run {name}: {str(error).replace(f'{file}: ', '')}") from error
    module, data = cli.model, cli.datamodule
    if not isinstance(module, LanguageModule):
        raise UserError(f"run {name}: a comparison needs a LanguageModule; got a {type(module).__name__}")
    info = data.source_info() if hasattr(data, "source_info") else {}
    data.prepare_data()
    data.setup("fit")
    source, targets = _sizes(data.train_dataloader())
    counts = count(module.net, context_of(data, module))
    tokens = targets * cli.trainer.accumulate_grad_batches
    per_token = float(counts.flops)
    if isinstance(module.net, EncoderDecoder) and source:
        # The count is that of one token of the source and one of the target together.
        per_token *= (source + targets) / (2 * targets)
    batches = _evaluated(data, cli.trainer.limit_val_batches)
    return Model(
        counts=counts,
        cost=Cost(tokens=round(tokens), flops=round(3 * per_token * tokens)),
        sparse=bool(module.sparse_layers),
        data=str(info.get("description", type(data).__name__)),
        generated=bool(info.get("generated", False)),
        evaluated=batches,
        sha256=info.get("sha256"),
        vocabulary=module.vocab_size if module.tokenizer is None else module.tokenizer,
        held_out=(
            None if batches is None else batches * getattr(data, "eval_batch_size", 1),
            getattr(data, "validation_prefix", None),
        ),
        ordered=isinstance(data, ResumableData),
    )


def _sizes(loader: Any) -> tuple[float, float]:
    """Tokens of a batch's source, 0 without one, and of its targets, padding counted: means where batches differ."""
    if isinstance(loader, BucketedPairs):
        return loader.mean_sizes()
    batch = next(iter(loader))
    return (batch["source"].numel() if "source" in batch else 0), batch["tokens"].numel()


def _evaluated(data: Any, limit: float) -> int | None:
    """How many batches of the held-out text a limit leaves; None: all.

    Raises:
        ValueError: a share of what has no length.
    """
    if isinstance(limit, float) and limit == 1:
        return None
    whole = sized_len(data.val_dataloader())
    if whole is None and isinstance(limit, float):
        raise ValueError(
            f"trainer.limit_val_batches {limit}: the held-out data has no length to take a share of: give a number of "
            "batches, or 1.0 for all"
        )
    count = int(limit if isinstance(limit, int) else limit * whole)
    return count if whole is None or count < whole else None


def context_of(data: Any, module: Any) -> int:
    """Tokens that attention runs over."""
    lengths = (getattr(data, name, 0) for name in ("context", "inputs_length", "max_source"))
    return int(next(filter(None, lengths), 0) or getattr(module.net, "context", 1))


def takes_seed(tree: Mapping[str, Any]) -> bool:
    """Whether the data has a seed of its order."""
    return "seed" in signature_of(target_of(tree["data"])).parameters


def reference(definition: Definition, asked: str | None, models: Mapping[str, Model]) -> str:
    """The run that speed-ups are against: the one asked for, else the first without sparse layers, else the first.

    Raises:
        UserError: no run is called as asked.
    """
    twin = asked or definition.twin
    if twin is not None and twin not in models:
        raise UserError(f"--twin {twin}: no run is called so{near(twin, models)} Runs: {', '.join(models)}")
    return twin or next((name for name, model in models.items() if not model.sparse), next(iter(models)))


def steps_of(
    budget: Budget,
    trees: Mapping[str, Any],
    models: Mapping[str, Model],
    seconds: Mapping[str, float],
    equal_flops: Mapping[str, str],
) -> dict[str, int]:
    """The steps of each run within a budget."""
    first = next(iter(trees.values()))["trainer"].get("max_steps")
    own = int(first) if isinstance(first, int) and first > 0 else None
    return budget.steps({name: model.cost for name, model in models.items()}, own, seconds, equal_flops)


def cli_of(recipe: Path, steps: int, seed: int, folder: Path, seeded: bool) -> SwitchkitCLI:
    """Model, data and trainer of one run, as ``fit`` builds them."""
    argv = ["--config", str(recipe), "--seed_everything", str(seed)]
    argv += ["--trainer.default_root_dir", str(folder), "--trainer.max_steps", str(steps)]
    return build([*argv, *(["--data.seed", str(seed)] if seeded else [])])
