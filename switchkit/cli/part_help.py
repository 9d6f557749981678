"""The parameters of one part: ``switchkit fit --model.moe.router.help top_k``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer

from switchkit.cli.arguments import Arguments
from switchkit.cli.classes import find_class
from switchkit.cli.errors import UserError, near
from switchkit.cli.normalise import default_of, is_spec, target_of
from switchkit.cli.settings import gather, merge_all, root_parameters
from switchkit.cli.signatures import Parameter, Place, place_of, signature_of

__all__ = ["part_help"]


def part_help(command: str, arguments: Arguments) -> str:
    """What the class called by name takes at a key; without a name, the one that is configured there."""
    assert arguments.part_help is not None
    key, name = arguments.part_help
    value: Any = merge_all(gather(command, arguments), command)
    parameters = {**root_parameters(command), "trainer": Parameter(Trainer, False)}
    hint: Any = None
    target: Any = None
    for step in key.split("."):
        if step == "init_args":
            continue
        if step not in parameters:
            known = f"{near(step, parameters)} Known: {', '.join(parameters)}" if parameters else "; give a --config"
            raise UserError(f"--{key}.help: nothing is called {step!r} there{known}")
        hint = parameters[step].hint
        value = value.get(step) if isinstance(value, Mapping) else None
        target = Trainer if hint is Trainer else _target(value, hint)
        value = value.get("init_args") if is_spec(value) else value
        parameters = signature_of(target).parameters if target is not None else {}
    place = place_of(hint) or Place(())
    if name is not None:
        target = find_class(name, place, f"--{key}.help")
    if target is None:
        raise UserError(f"--{key}.help needs the name of a class: --{key}.help NAME")
    title = f"{key}: {target.__module__}.{target.__qualname__}"
    parser = ArgumentParser(prog=title, usage=title, print_config=None, add_help=False)
    parser.add_class_arguments(target, nested_key=key, skip=set(place.given - place.own), fail_untyped=False)
    return str(parser.format_help())


def _target(value: Any, hint: Any) -> Any:
    if is_spec(value):
        return target_of(value)
    if hint is LightningModule:
        import switchkit

        return switchkit.LanguageModule
    place = place_of(hint)
    found = default_of(place) if place is not None else None
    return found[0] if found else None
