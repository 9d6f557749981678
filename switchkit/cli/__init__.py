"""The program ``switchkit``: a table of commands, each imported only when it is called.

Nothing here imports torch, so that ``--help`` and mistyped commands answer at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

from switchkit.cli.errors import UserError, disk_is_full, exit_code, near, one_line

__all__ = ["COMMANDS", "UserError", "main"]

# Command -> (module of switchkit, help). `run(command, argv)` of the module returns the exit code.
COMMANDS = {
    "fit": ("cli.lightning", "train a model by a recipe"),
    "validate": ("cli.lightning", "compute the validation loss of a checkpoint"),
    "test": ("cli.lightning", "compute the test loss of a checkpoint"),
    "predict": ("cli.lightning", "run a checkpoint over the data"),
    "generate": ("cli.generate", "continue a text with a checkpoint"),
    "prepare": ("cli.prepare", "write texts as tokens that training reads from disk"),
    "tokenizer": ("cli.tokenizer", "learn a sub-word vocabulary from texts (tokenizer train)"),
    "import-hf": ("cli.interop", "make a checkpoint of a model of Hugging Face's transformers"),
    "export-hf": ("cli.interop", "write a checkpoint as a folder that transformers reads"),
    "consolidate": ("cli.consolidate", "make one file of a folder that several devices saved"),
    "upcycle": ("cli.upcycle", "make a sparse checkpoint of a dense one"),
    "prune": ("cli.shrink", "drop the experts of a checkpoint that weigh least"),
    "merge": ("cli.shrink", "merge experts of a checkpoint that are alike"),
    "to-dense": ("cli.shrink", "make a dense checkpoint of a sparse one"),
    "list": ("cli.listing", "show the parts and recipes that a name can stand for"),
    "distill-report": ("cli.distill_report", "say how much of a mixture's gain its distilled students keep"),
    "describe": ("cli.describe", "show the model that a recipe builds, without training it"),
    "plan": ("cli.plan", "say which arrangements of devices a recipe fits, and how fast"),
    "compare": ("compare.command", "train recipes alike over seeds, and say what is beyond chance"),
    "audit": ("cli.audit", "measure what leaks, gets no gradient or is scaled oddly"),
    "selftest": ("cli.selftest", "hold parts, your own included, to the properties of the tests"),
    "bench": ("bench.command", "measure the speed of dispatchers and layers"),
}

_USAGE = """usage: switchkit COMMAND [options]

Mixture-of-Experts models on PyTorch Lightning.

commands:
{commands}

options:
  -h, --help   this text; `switchkit COMMAND --help` for a command's own
  --version    the version
  --debug      show the traceback of an error; SWITCHKIT_DEBUG=1 does so too

example: switchkit fit --config tiny_shakespeare --trainer.max_steps 200"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's arguments) names; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("SWITCHKIT_DEBUG", "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    if sys.stdout is not None and (sys.stdout.encoding or "").lower().replace("-", "") != "utf8":
        # A bar that the encoding lacks is no reason to lose what a run has to say.
        getattr(sys.stdout, "reconfigure", lambda **_: None)(errors="replace")
    try:
        _import_from_here()
        code = _dispatch(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where it is known what to do if it fails
        return code
    except KeyboardInterrupt:
        print("switchkit: interrupted", file=sys.stderr)
        return 130
    except SystemExit as exit:
        return exit_code(exit)
    except BrokenPipeError:
        # The reader of our output went away (`switchkit list | head`); keep Python from flushing into it at exit.
        _drop_output()
        return 141
    except Exception as error:
        line = one_line(error)
        if disk_is_full(error):
            _drop_output()
        if line is None:
            raise
        if debug:
            traceback.print_exc()
        print(f"switchkit: error: {line}", file=sys.stderr)
        return 2


def _import_from_here() -> None:
    """Find modules in the working directory too."""
    try:
        here = os.getcwd()
    except FileNotFoundError:
        raise UserError("the working directory was removed: change to one that is there") from None
    if here not in sys.path:
        # Appended, not inserted: a data.py in the working directory must not hide a package of that name.
        sys.path.append(here)


def _drop_output() -> None:
    """What is not written yet goes nowhere, so that Python does not try again when it ends."""
    with suppress(OSError, ValueError):  # of a stdout that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(_USAGE.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())))
        return 0
    if command == "--version":
        from switchkit import __version__

        print(f"switchkit {__version__}")
        return 0
    if command not in COMMANDS:
        what = "option" if command.startswith("-") else "command"
        raise UserError(f"unknown {what} {command!r}{near(command, COMMANDS)} Commands: {', '.join(COMMANDS)}")
    module = importlib.import_module(f"switchkit.{COMMANDS[command][0]}")
    return int(module.run(command, rest) or 0)
