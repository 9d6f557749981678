"""Reading the command line of fit, validate, test and predict."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from switchkit.cli.errors import UserError, near
from switchkit.cli.plugins import split_plugins
from switchkit.cli.recipes import recipes
from switchkit.cli.sources import Source, edit

__all__ = ["Arguments", "environment", "read_arguments", "take_options"]


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

    def sources(self) -> list[Source]:
        return [edit(key, value) for key, value in self.edits]

    def last(self, key: str) -> str | None:
        """The last value given to a key."""
        return next((value for name, value in reversed(self.edits) if name == key), None)


def read_arguments(argv: Sequence[str]) -> Arguments:
    """Sort a command line. Edits take effect in order, after all configurations, wherever they stand.

    Raises:
        UserError: something that is no option, or an option without its value.
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


def take_options(
    argv: Sequence[str], own: Mapping[str, str], alone: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """The arguments of `fit`, and the values of the options that are a command's own.

    Args:
        argv: a command line.
        own: the options, and what stands for the value of each in an error.
        alone: of them, those that may come without a value, and what they mean then.

    Raises:
        UserError: one of its own is without a value.
    """
    rest: list[str] = []
    found: dict[str, str] = {}
    left = deque(argv)
    while left:
        argument = left.popleft()
        name, equals, value = argument.partition("=")
        if name not in own:
            rest.append(argument)
            continue
        if not equals:
            follows = bool(left) and (left[0] == "-" or not left[0].startswith("-"))
            value = left.popleft() if follows else (alone or {}).get(name, "")
        if not value:
            raise UserError(f"{name} needs a value: {name} {own[name]}")
        found[name] = value
    return rest, found
