"""The settings of one run: checkpoint < environment < configurations in order < command line."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from switchkit.cli.arguments import Arguments, environment
from switchkit.cli.checkpoint import given_checkpoint, read_checkpoint
from switchkit.cli.errors import UserError, near, short
from switchkit.cli.normalise import is_spec, merge, merge_arguments, require, target_of
from switchkit.cli.options import new_file
from switchkit.cli.plugins import anywhere, distinct, import_plugins, load_entry_points
from switchkit.cli.ranges import check_ranges
from switchkit.cli.recipes import find_config, is_comparison, read_config, recipes
from switchkit.cli.signatures import Parameter, signature_of
from switchkit.cli.sources import Edit, Source, edit, subconfig
from switchkit.cli.teacher import distils, teacher_of, teacher_settings
from switchkit.module import LanguageModule

__all__ = ["METHODS", "compose", "gather", "merge_all", "root_parameters"]

METHODS = ("fit", "validate", "test", "predict")

# Of a Trainer method, what the command fills in itself.
_OWN = {"self", "model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}


def compose(command: str, arguments: Arguments) -> dict[str, Any]:
    """Everything that `command` was told, checked and with full import paths, as one tree.

    Raises:
        UserError, ValueError: the first thing that is wrong with it.
    """
    sources = gather(command, arguments)
    goes_on, begins = (_given(sources, option) for option in ("ckpt_path", "init_from"))
    if command == "fit" and goes_on and begins and arguments.last("init_from") is not None:
        raise UserError(
            f"{goes_on} goes on with a run, and {begins} begins a new one from its weights: give one of them"
        )
    resumed = given_checkpoint(sources)
    # A run that goes on has its weights already: what a saved configuration says it began from is past.
    begun = given_checkpoint(sources, "init_from") if command == "fit" and resumed is None else None
    path = resumed or begun
    tokenizer = None
    # A checkpoint causes no import. What the recipes name is imported by this, and then found by it.
    partial = _tolerant(sources, command)
    if path is not None and not _of_another_kind(partial):
        checkpoint, tokenizer = read_checkpoint(path, resume=command == "fit" and resumed is not None)
        if command != "fit" and distils(partial):
            # What learned is in the checkpoint: from whom, evaluation need not know.
            sources = [source.without("model") for source in sources]
        sources = [checkpoint, *sources]
        partial = _tolerant(sources, command)
    if distils(partial):
        teacher = teacher_of(partial, sources)
        settings, its_tokenizer = teacher_settings(teacher)
        tokenizer = its_tokenizer if tokenizer is None else tokenizer
        sources = [settings, *sources, edit("model.teacher", str(teacher))]
        path = path or teacher
    tree = merge_all(sources, command)
    named = [anywhere(n, source.folder) for source in sources for n in _listed(source.values.get("plugins"))]
    tree["plugins"] = distinct(named + arguments.plugins) or None
    if resumed is not None:
        tree["ckpt_path"] = str(resumed)
    elif begun is not None:
        tree["init_from"] = str(begun)
    root = (tree.get("trainer") or {}).get("default_root_dir")
    if isinstance(root, str):
        # The Trainer reads ~ in it, and not whoever else is told.
        tree["trainer"]["default_root_dir"] = os.path.expanduser(root)
    # Lightning's own default would run what the file says.
    if tree.get("weights_only") is None:
        tree["weights_only"] = True
    if tokenizer is not None:
        _keep_tokenizer(tree, tokenizer, str(path))
    _check(tree, command, [source.label for source in sources if source.label and not source.values])
    return tree


def _given(sources: Sequence[Source], option: str) -> str | None:
    """Who names a checkpoint last, and which one; None: nobody does."""
    for source in reversed(sources):
        if option in source.values:
            value = source.values[option]
            return None if value in (None, "null", "") else f"{source.where(option)} {value}"
    return None


def gather(command: str, arguments: Arguments) -> list[Source]:
    """The sources in order, the checkpoint aside; the plugins that they name are imported."""
    load_entry_points()
    sources = environment(command)
    for config in arguments.configs:
        sources.append(config if isinstance(config, Source) else _read(config))
    for source in sources:
        named = source.values.get("plugins")
        if named is not None and not isinstance(named, (list, str)):
            raise UserError(f"{source.where('plugins')}: expected a list of modules, got {short(named)}")
        import_plugins(_listed(named), source.where("plugins"), source.folder)
    import_plugins(arguments.plugins, "--plugins")
    _import_public()
    return [*sources, *arguments.sources()]


def _read(name: str) -> Source:
    path = find_config(name)
    values = read_config(path)
    if is_comparison(values):
        raise UserError(f"--config {name}: this is a comparison of recipes, not a recipe: switchkit compare {name}")
    return Source(values, str(path), path.parent)


def merge_all(sources: Iterable[Source], command: str) -> dict[str, Any]:
    """The tree of several sources, the later over the earlier.

    A variable of the environment may set an option of a class that only a later source names: in the end it fills what
    is left out.
    """
    tree: dict[str, Any] = {}
    variables: list[Source] = []
    for source in sources:
        if not source.variable:
            tree = _merge_root(tree, source, command)
            continue
        variables.append(source)
        with suppress(UserError):
            tree = _merge_root(tree, source, command)
    for variable in variables:
        if not _says(tree, variable.values):
            tree = _merge_root(tree, variable, command)
    return tree


def _says(tree: Any, values: Any) -> bool:
    """Whether a tree has a value where `values`, nested mappings of one key each, have one."""
    while isinstance(values, Edit):
        ((name, values),) = values.items()
        if is_spec(tree) and name not in tree:
            tree = tree.get("init_args") or {}
        if not isinstance(tree, Mapping) or name not in tree:
            return False
        tree = tree[name]
    return True


def _tolerant(sources: Iterable[Source], command: str) -> dict[str, Any]:
    """As `merge_all`, without the keys that cannot be merged yet: what is known before a checkpoint is read."""
    tree: dict[str, Any] = {}
    for source in sources:
        for piece in source.by_key():
            with suppress(UserError):
                tree = _merge_root(tree, piece, command)
    return tree


def _of_another_kind(tree: Mapping[str, Any]) -> bool:
    """Whether the model is a LightningModule without our settings in its checkpoints."""
    target = target_of(tree["model"]) if tree.get("model") else None
    return isinstance(target, type) and not issubclass(target, LanguageModule)


def root_parameters(command: str) -> dict[str, Parameter]:
    """The keys that a configuration of `command` may have at its top, `trainer` aside."""
    method = signature_of(getattr(Trainer, command)).parameters
    return {
        "seed_everything": Parameter(bool | int, False),
        "model": Parameter(LightningModule, True),
        "data": Parameter(LightningDataModule | None, False),
        "plugins": Parameter(list[str] | str | None, False),
        "keep_memory": Parameter(bool, False),
        **({"init_from": Parameter(str | None, False)} if command == "fit" else {}),
        **({"out": Parameter(str | None, False)} if command == "predict" else {}),
        **{name: parameter for name, parameter in method.items() if name not in _OWN},
    }


def _merge_root(tree: Mapping[str, Any], source: Source, command: str) -> dict[str, Any]:
    parameters = root_parameters(command)
    merged = dict(tree)
    for key, value in source.values.items():
        if key == "trainer":
            inner = subconfig(value, source) if isinstance(value, str) else None
            value, where = (value, source) if inner is None else (inner.values, inner)
            signature = signature_of(Trainer)
            merged[key] = merge_arguments(tree.get(key) or {}, value, signature, "Trainer", key, where, frozenset())
        elif key in parameters:
            merged[key] = merge(tree.get(key), value, parameters[key].hint, key, source)
        elif not source.typed and any(key in root_parameters(other) for other in METHODS):
            continue  # a saved configuration of a sister command holds it
        else:
            _refuse(key, source, [*parameters, "trainer"], command)
    return merged


def _refuse(key: str, source: Source, known: list[str], command: str) -> None:
    if key in METHODS:
        raise UserError(f"{source.where(key)}: the settings of {key} stand at the top of the file, not below {key!r}")
    if key in ("config", "print_config", "help"):
        raise UserError(f"{source.where(key)} belongs to the command line alone: switchkit {command} --{key}")
    trainer = signature_of(Trainer).parameters
    sisters = [other for other in METHODS if key in root_parameters(other)]
    if sisters:
        raise UserError(f"{source.where(key)}: {command} has no option {key!r}; it belongs to {' and '.join(sisters)}")
    if key in trainer:
        hint = f". It belongs to the trainer: {'trainer: {' + key + ': ...}' if source.label else '--trainer.' + key}."
    else:
        hint = near(key, [*known, "config", "print_config", "help"])
        if hint == ".":
            hint = near(key, trainer).replace("mean '", "mean 'trainer.")
    raise UserError(f"{source.where(key)}: {command} has no option {key!r}{hint} Accepted: {', '.join(known)}")


def _keep_tokenizer(tree: dict[str, Any], tokenizer: Any, label: str) -> None:
    """Give the checkpoint's tokenizer to the data, unless a recipe or the command line named one.

    Without data the model has it at once, as an imported checkpoint is described or audited.
    """
    data = tree.get("data")
    if not data:
        values = {"init_args": {"tokenizer": tokenizer}}
        tree["model"] = merge(tree.get("model"), values, LightningModule, "model", Source(values, label))
        return
    if data["init_args"].get("tokenizer") is not None:
        return
    if "tokenizer" in signature_of(target_of(data)).parameters:
        values = {"init_args": {"tokenizer": tokenizer}}
        tree["data"] = merge(data, values, LightningDataModule, "data", Source(values, label))


def _check(tree: dict[str, Any], command: str, empty: Sequence[str]) -> None:
    """`empty`: the configurations that say nothing."""
    if not tree.get("model"):
        # Those in folders are for the commands that name them.
        known = ", ".join(name for name in recipes() if "/" not in name) or "none found"
        read = f", and {' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty" if empty else ""
        raise UserError(
            f"no model is given{read}: give a recipe by --config NAME (recipes: {known}; more: switchkit list "
            "recipes), or --ckpt_path PATH"
        )
    if distils(tree) and not tree.get("data"):
        raise UserError(
            f"{command}: the teacher's checkpoint brings no data, as an imported one does not: give --data, such as "
            "--data TextData --data.path my.txt"
        )
    if tree.get("data") and (tree["model"]["init_args"] or {}).get("tokenizer") is not None:
        raise UserError("model.tokenizer: the data's tokenizer is used; set data.tokenizer instead")
    require(tree["model"], LightningModule, "model", frozenset({"model.tokenizer"}))
    if tree.get("data"):
        require(tree["data"], LightningDataModule, "data")
    for name, parameter in signature_of(Trainer).parameters.items():
        require((tree.get("trainer") or {}).get(name), parameter.hint, f"trainer.{name}")
    check_ranges(tree)
    if tree.get("out") is not None:
        tree["out"] = str(new_file(tree["out"], makes_folder=True))


def _import_public() -> None:
    """Import what may be named without its path."""
    for module in ("callbacks", "data", "distill", "metrics", "module"):
        importlib.import_module(f"switchkit.{module}")


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
