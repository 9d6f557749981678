"""The command line of ``switchkit bench``. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from switchkit.bench.shapes import Shape, read_shape
from switchkit.cli.errors import UserError
from switchkit.cli.options import OptionParser, number, positive

__all__ = ["parse"]

STEPS = 200
NEW_TOKENS = 512
MOST_THREADS = 1024
"""Where a machine cannot start as many, OpenMP ends the process without a word."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `argv`.

    Raises:
        UserError: an unknown option, a missing or unfit value.
    """
    options = _parser().parse(argv)
    for name, part, there in (
        ("recipe", "recipe", options.with_recipe),
        ("steps", "recipe", options.with_recipe),
        ("new_tokens", "generation", options.with_generation),
    ):
        if getattr(options, name) is not None and not there:
            raise UserError(f"switchkit bench: --{name} and --no-{part} contradict each other; give one of them")
    if not options.with_seq2seq and not options.peers:
        raise UserError("switchkit bench: --no-seq2seq leaves a part of --peers out; give --peers, or leave it out too")
    if options.distributed is not None:
        others = ("shapes", "dispatchers", "dtype", "memory", "peers", "compile", "steps", "new_tokens")
        given = next((name for name in others if getattr(options, name)), None)
        if given is not None:
            raise UserError(f"switchkit bench: --distributed measures the training step alone: leave --{given} out")
        # A table of its own: the others are about one process.
        options.with_layer = options.with_routers = options.with_recipe = options.with_generation = False
        return options
    options.steps, options.new_tokens = options.steps or STEPS, options.new_tokens or NEW_TOKENS
    wanted = (options.with_layer, options.with_routers, options.with_recipe, options.with_generation, options.memory)
    if not any(wanted):
        raise UserError(
            "switchkit bench: --no-layer, --no-routers, --no-recipe and --no-generation leave nothing to measure; "
            "drop one, or add --memory"
        )
    return options


def _parser() -> OptionParser:
    parser = OptionParser("bench", "Measure speed and memory, as ratios to dense models of equal FLOPs.")
    add = parser.add_argument
    add(
        "--shapes",
        nargs="+",
        type=_shape,
        metavar="T,d,f,E,k[,gated]",
        help="layers to measure: T tokens of width d, E experts of width f, k per token "
        "(default on a CPU: 4096,256,1024,8,2 2048,128,256,4,1 4096,256,512,64,1; "
        "on a GPU: 16384,1024,4096,8,1,gated 65536,2048,1408,64,8,gated)",
    )
    add("--dispatchers", nargs="+", metavar="NAME", help="see `switchkit list dispatchers` (default: all of them)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: the fastest there is)")
    add("--dtype", choices=("fp32", "bf16"), help="of layers and inputs (default: fp32 on a CPU, bf16 on a GPU)")
    add("--rounds", type=positive, metavar="N", help="interleaved rounds (default: 25, and for 3 seconds at least)")
    add(
        "--threads",
        type=number(int, f"an integer from 1 to {MOST_THREADS}", lambda value: 1 <= value <= MOST_THREADS),
        metavar="N",
        help="of torch on the CPU (default: as torch finds it; 1 for each of several processes)",
    )
    add("--memory", action="store_true", help="also show how memory grows with the tokens of one sequence")
    add(
        "--peers",
        action="store_true",
        help="also measure Hugging Face's Mixtral block and its SwitchTransformers (needs transformers)",
    )
    add("--compile", action="store_true", help="also measure `sorted`, and training steps, under torch.compile")
    add("--no-layer", dest="with_layer", action="store_false", help="leave out the single layers")
    add("--no-routers", dest="with_routers", action="store_false", help="leave out what each router costs alone")
    add("--recipe", metavar="NAME", help="whose training step is measured (default: tiny_shakespeare)")
    add("--no-recipe", dest="with_recipe", action="store_false", help="leave out the training step")
    add(
        "--steps",
        type=positive,
        metavar="N",
        help=f"training steps with Lightning and without, to tell its share (default: {STEPS})",
    )
    add(
        "--distributed",
        type=positive,
        metavar="N",
        help="measure this alone: the training step of --recipe in N processes (gloo; NCCL where there are N GPUs), by "
        "ddp, FSDP2 and expert parallelism, against one process on the same batch",
    )
    add("--no-seq2seq", dest="with_seq2seq", action="store_false", help="with --peers: leave out the encoder-decoder")
    add("--no-generation", dest="with_generation", action="store_false", help="leave out tokens/s of generation")
    add(
        "--new_tokens",
        type=positive,
        metavar="N",
        help=f"tokens to generate with a cache and without (default: {NEW_TOKENS})",
    )
    parser.add_json("every figure")
    parser.add_plugins()
    return parser


def _shape(text: str) -> Shape:
    try:
        return read_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
