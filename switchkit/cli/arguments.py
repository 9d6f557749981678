"""Reading the command line of fit, validate, test and predict."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from switchkit.cli.errors import UserError, near
from switchkit.cli.plugins import split_plugins
from switchkit.cli.recipes import recipes
from switchkit.cli.sources import Source, edit

__all__ = ["Arguments", "environment", "read_arguments"]


@dataclass
class Arguments:
    """What a command line says, before it is checked."""

    configs: list[str | Source] = field(default_factory=list)
    """Names, or what was read already."""
    plugins: list[str] = field(default_factory=list)
    edits: list[tuple[str, str]] = field(default_factory=list)
    help: bool = False
    part_help: tuple[str, str | None] | None = None
    """Key and name of ``--model.moe.router.help top_k``."""
    print_config: str | None = None
    """The flags of ``--print_config``; None: not asked for."""
    words: list[str] = field(default_factory=list)
    """What belongs to no option."""

    def sources(self) -> list[Source]:
        return [edit(key, value) for key, value in self.edits]

    def last(self, key: str) -> str | None:
        """The last value given to a key."""
        return next((value for name, value in reversed(self.edits) if name == key), None)


def read_arguments(argv: Sequence[str], *, words: bool = False) -> Arguments:
    """Sort a command line. Edits take effect in order, after all configurations, wherever they stand.

    Raises:
        UserError: something that is no option, where there may be no `words`, or an option without its value.
    """
    rest, plugins = split_plugins(argv)
    found = Arguments(plugins=plugins)
    position = 0
    while position < len(rest):
        argument = rest[position]
        position += 1
        name, given, value = argument.partition("=")
        if argument in ("-h", "--help"):
            found.help = True
            continue
        if name == "--print_config":
            found.print_config = value
            continue
        if words and not argument.startswith("-"):
            found.words.append(argument)
            continue
        if name != "-c" and not (name.startswith("--") and len(name) > 2):
            config = argument.endswith((".yaml", ".yml")) or near(argument, recipes()) != "."
            hint = f"; a configuration is given by --config {argument}" if config else ""
            raise UserError(f"{argument!r} is not an option: options begin with --{hint}")
        if name.endswith(".help"):
            if not given and position < len(rest) and not rest[position].startswith("-"):
                value, position = rest[position], position + 1
            found.part_help = (name[2:].removesuffix(".help"), value or None)
            continue
        if not given:
            if position == len(rest) or rest[position].startswith("--"):
                raise UserError(f"{name} needs a value: {name} VALUE or {name}=VALUE")
            value, position = rest[position], position + 1
        if name in ("-c", "--config"):
            found.configs.append(value)
        else:
            found.edits.append((name[2:], value))
    return found


def environment(command: str, variables: Mapping[str, str] = os.environ) -> list[Source]:
    """Settings from variables such as ``SWITCHKIT_FIT__TRAINER__MAX_STEPS=5``.

    The command and two underscores keep them apart from SWITCHKIT_DATA, SWITCHKIT_DEBUG and the like.
    """
    start = f"SWITCHKIT_{command.upper()}__"
    return [
        edit(name.removeprefix(start).lower().replace("__", "."), value, name)
        for name, value in sorted(variables.items())
        if name.startswith(start)
    ]
