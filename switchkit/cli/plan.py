"""``switchkit plan``: what a recipe would take of many devices, counted and not run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchkit.cli.errors import UserError, near
from switchkit.cli.options import SETTINGS, OptionParser, json_target, number, positive, write_json

if TYPE_CHECKING:
    from switchkit.plan import Gpu, Work

__all__ = ["run"]


def run(command: str, argv: Sequence[str]) -> int:
    """Print the arrangements that fit, the fastest first, and why the others do not; 1 if none fits."""
    options, rest = _parser(command).parse_beside(argv)
    target = json_target(options.json)
    gpu = _gpu(options.gpu)

    from switchkit.cli.planned import planned
    from switchkit.plan import Work, plan, precision_named
    from switchkit.report.plan import plan_tables, plan_values

    asked = None if options.precision is None else precision_named(options.precision)
    found = planned(rest, options.hf_config, options.context)
    work = Work(
        batch=options.batch_size or found.batch,
        context=options.context or found.context,
        precision=asked or precision_named(found.precision),
        accumulate=options.accumulate or found.accumulate,
        imbalance=options.imbalance,
    )
    _check_context(found.module.net, work)
    made = plan(
        found.module.net,
        found.module.optimizer,
        work,
        gpu,
        nodes=options.nodes,
        gpus=options.gpus,
        headroom=options.headroom,
        checkpointing={"auto": None, "on": True, "off": False}[options.activation_checkpointing],
    )
    machine = {"nodes": options.nodes, "gpus": options.gpus, "gpu": asdict(gpu)}
    told = {**machine, "work": asdict(work), "headroom": options.headroom, **plan_values(made)}
    if options.json != "-":
        given = {
            "trainer.precision": options.precision,
            "trainer.accumulate_grad_batches": options.accumulate,
            "data.batch_size": options.batch_size,
            "data.batch_tokens": "null" if options.batch_size and found.by_tokens else None,
            f"data.{found.length}": options.context,
        }
        more = "".join(f" --{name} {value}" for name, value in given.items() if value is not None)
        plan_tables(made, work, gpu, options.nodes, options.gpus, options.headroom, options.all, more)
    write_json(options.json, target, told)
    return 0 if made.fits else 1


def _parser(command: str) -> OptionParser:
    parser = OptionParser(
        command,
        "Count what training the model of a recipe takes of each of many devices: memory, bytes sent in a step, time. "
        "Every arrangement of ddp and ExpertParallelStrategy is counted; those that fit are ranked by their time per "
        "token, and one line says why each of the others does not fit. Nothing is built or run. The exit code is 1 "
        "if nothing fits.",
    )
    parser.epilog = SETTINGS
    share = number(float, "a share from 0 to below 1", lambda value: 0 <= value < 1)
    above = number(float, "a number of at least 1", lambda value: 1 <= value < float("inf"))
    add = parser.add_argument
    add("--nodes", type=positive, default=1, metavar="N", help="machines (default: 1)")
    add("--gpus", type=positive, default=8, metavar="N", help="devices of each machine (default: 8)")
    add(
        "--gpu", default="h100", metavar="NAME|FILE", help="h100, h200, a100, or a YAML file of numbers (default: h100)"
    )
    add("--hf_config", metavar="PATH", help="a config.json of Hugging Face's transformers, in place of --config")
    add("--batch_size", type=positive, metavar="N", help="sequences of each device (default: the recipe's, or 1)")
    add("--context", type=positive, metavar="N", help="tokens of a sequence (default: the recipe's)")
    add("--accumulate", type=positive, metavar="N", help="micro-batches of a step (default: the recipe's)")
    add("--precision", metavar="WORD", help="32-true, bf16-mixed, bf16-true, ... (default: the recipe's)")
    choices = ("auto", "on", "off")
    add("--activation_checkpointing", choices=choices, default="auto", help="auto (default): where it has to be")
    add(
        "--imbalance",
        type=above,
        default=1.0,
        metavar="X",
        help="load of the busiest device over the mean (default: 1)",
    )
    add("--headroom", type=share, default=0.1, metavar="X", help="share of memory that stays free (default: 0.1)")
    add("--all", action="store_true", help="show all arrangements, not the first ten of each kind")
    parser.add_json("everything")
    return parser


def _gpu(word: str) -> Gpu:
    """A device by its name, or of a file.

    Raises:
        UserError: neither; names the nearest.
    """
    from switchkit.cli.recipes import read_config
    from switchkit.plan.hardware import GPUS, gpu_from

    if word in GPUS:
        return GPUS[word]
    path = Path(word).expanduser()
    if not path.is_file():
        raise UserError(
            f"--gpu {word}: unknown, and there is no such file{near(word, GPUS)} Known: {', '.join(GPUS)}, or a YAML "
            "file with memory_gib, bf16_tflops, fp32_tflops, node_gb_per_s, network_gb_per_s"
        )
    try:
        return gpu_from(read_config(path), str(path))
    except ValueError as error:
        raise UserError(f"--gpu: {error}") from error


def _check_context(net: Any, work: Work) -> None:
    longest = getattr(net, "context", work.context)
    if work.context > longest:
        raise UserError(f"--context {work.context}: the model reads {longest} tokens at most (model.net.context)")
