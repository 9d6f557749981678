"""``switchkit audit``: what a configuration does to itself, measured without training it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from switchkit import __version__, checkpoints, report
from switchkit.audit import LONG, Finding, audit, sees_future, sequences_for
from switchkit.cli.arguments import read_arguments
from switchkit.cli.errors import UserError
from switchkit.cli.model_only import ModelOnly
from switchkit.cli.normalise import target_of
from switchkit.cli.options import SETTINGS, OptionParser, json_target, write_json
from switchkit.cli.settings import compose
from switchkit.cli.signatures import signature_of
from switchkit.models.base import leak
from switchkit.module import LanguageModule
from switchkit.report.tables import console, figures

__all__ = ["run"]

_STYLE = {"ok": "green", "note": "yellow", "fault": "bold red"}


def run(command: str, argv: Sequence[str]) -> int:
    """Print the findings as a table; 1 if the model sees future tokens."""
    options, rest = _parser(command).parse_beside(argv)
    if any(argument.partition("=")[0] == "--out" for argument in rest):
        raise UserError("--out: audit has no option 'out': --json PATH writes the findings to a file")
    target = json_target(options.json)
    with redirect_stdout(sys.stderr) if options.json == "-" else nullcontext():
        content = _measured(rest)
    write_json(options.json, target, content)
    return int(content["leaks"])


def _parser(command: str) -> OptionParser:
    parser = OptionParser(
        command,
        "Measure on random tokens, on the CPU, whether the model that a recipe builds or a checkpoint holds leaks "
        "future tokens, depends on the rest of the batch, is random in evaluation, treats padding as tokens, generates "
        "with a cache what it computes without one, gives routers and experts their gradients, routes in float32, "
        "starts with different experts and routers that can still learn, and scales its losses as their papers do. The "
        "exit code is 1 if the model sees future tokens, else 0, whatever else was found.",
    )
    parser.epilog = SETTINGS
    parser.add_json("the findings")
    return parser


def _measured(arguments: list[str]) -> dict[str, Any]:
    """The findings, printed as a table, as plain data."""
    permit = _permit(arguments)
    cli = ModelOnly([*arguments, *permit])
    module = cli.model
    if not isinstance(module, LanguageModule):
        raise UserError(f"model: audit reads a LanguageModule, got a {type(module).__name__}")
    path = cli.settings.ckpt_path
    if path is not None:
        module.load_state_dict(checkpoints.read(Path(path))["state_dict"])
        report.checkpoint_line(path)
    longest = int(getattr(module.net, "context", LONG))
    context = min(int(getattr(cli.datamodule, "context", 0) or longest), longest)
    sequences = sequences_for(module, context, int(getattr(cli.datamodule, "batch_size", 0) or 0))
    findings = audit(module, context=context, sequences=sequences, trained=path is not None)
    refused = bool(permit) and leak(module) is not None
    read = f"on {sequences} sequences of {context} random tokens"
    _print(findings, f"Audit of {_title(arguments, path)}, {read}", refused)
    return {
        "version": __version__,
        "leaks": sees_future(findings),
        "refused_by_fit": refused,
        "findings": [asdict(finding) for finding in findings],
    }


def _permit(arguments: list[str]) -> list[str]:
    """The option that lets a leaking model be built and measured, unless it is set, or unknown to the model."""
    found = read_arguments(arguments)
    if found.help or found.part_help is not None or found.print_config is not None:
        return []
    net = compose("fit", found)["model"]["init_args"].get("net")
    if net is None:
        return ["--model.net={class_path: Decoder, init_args: {allow_leak: true}}"]
    if not isinstance(net, dict) or "allow_leak" not in signature_of(target_of(net)).parameters:
        return []
    return [] if (net.get("init_args") or {}).get("allow_leak") else ["--model.net.allow_leak=true"]


def _title(arguments: list[str], path: str | None) -> str:
    configs = [str(config) for config in read_arguments(arguments).configs]
    return " + ".join([*configs, *([path] if path else [])]) or "this model"


def _print(findings: Sequence[Finding], title: str, refused: bool) -> None:
    table = figures(title, ("check", "", "measured"), words=("", "measured"))
    table.columns[0].no_wrap = True
    for finding in findings:
        # Text, not markup: a fix may hold a list in brackets.
        told = Text(finding.evidence)
        if finding.fix:
            told.append(f"\nfix: {finding.fix}", style="bold")
        table.add_row(finding.check, Text(finding.status, style=_STYLE[finding.status]), told)
    out = console()
    out.print(table)
    counts = {status: sum(finding.status == status for finding in findings) for status in ("fault", "note")}
    out.print(", ".join(f"{n} {status}{'s' * (n != 1)}" for status, n in counts.items()), highlight=False)
    if refused:
        out.print("`fit` refuses this model: it was built with --model.net.allow_leak=true to be measured.")
    if sees_future(findings):
        out.print("A causal model that sees future tokens learns nothing it could use: its losses are no measure.")
