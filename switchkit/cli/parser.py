"""The jsonargparse parser behind fit, validate, test and predict, whose errors are one line."""

from __future__ import annotations

import enum
import re
from argparse import HelpFormatter
from typing import NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from switchkit.cli.errors import UserError

__all__ = ["SwitchkitParser", "rewrite"]


def _plain(dumper: yaml.SafeDumper, value: enum.Enum) -> yaml.Node:
    """An enum as its parameter is written: a text that has names too as the text."""
    return dumper.represent_data(value.value if isinstance(value, str) else value.name)


# jsonargparse writes the defaults of a class, of which Lightning's Timer has one that YAML does not know.
yaml.SafeDumper.add_multi_representer(enum.Enum, _plain)

# Complaints of a union that say nothing: every value that is no null, no file and no class draws them.
_IDLE = re.compile(r"Expected a (?:<class 'NoneType'>|NoneType|path but .*|dot import path string.*)$")


class SwitchkitParser(LightningArgumentParser):
    """A parser that checks and builds what `switchkit.cli.settings.compose` has merged."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as a `UserError`: one line, no usage."""
        raise UserError(rewrite(message)) from ex

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """The help, without the marks that Lightning's docstrings have for web pages."""
        text = re.sub(r":[a-z]+:`~?([^`]*)`", r"`\1`", super().format_help(formatter))
        return text.replace("``", "`")


def rewrite(message: str) -> str:
    """jsonargparse's message as ``key: reason``; it calls this at each level of nesting, the innermost first.

    A message of an unknown form passes as it is, on one line.
    """
    found = re.match(r"Parser key \"(?:(?:fit|validate|test|predict)\.)?([^\"]*)\":\s*(.*)", message, re.DOTALL)
    key, text = (found[1], found[2]) if found else ("", message)
    reasons = [text]
    if "Union subtypes" in text and "Errors:" in text:
        listed = re.split(r"\nGiven value type:|\n *Given value type:", text.partition("Errors:")[2])[0]
        reasons = [reason.strip() for reason in re.split(r"\n *- ", listed) if reason.strip()]
        reasons = [reason for reason in reasons if not _IDLE.match(reason)] or reasons
        # The member of the union that came furthest names a key of its own.
        reasons = [reason for reason in reasons if re.match(r"[\w.\[\]]+: ", reason)][:1] or reasons
    text = " or ".join(re.sub(r"\s*Got value: (?:Namespace\(|\{).*", "", reason, flags=re.DOTALL) for reason in reasons)
    text = re.sub(r"<class '([^']*)'>", r"\1", text)
    inner = re.match(r"([\w.\[\]]+): (.*)", text, re.DOTALL)
    if key and inner:
        key, text = f"{key}.{inner[1]}", inner[2]
    return " ".join((f"{key}: {text}" if key else text).replace("init_args.", "").split())
