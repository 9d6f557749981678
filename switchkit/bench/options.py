"""The command line of ``switchkit bench``. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from switchkit.bench.shapes import Shape, read_shape
from switchkit.cli.errors import UserError
from switchkit.cli.options import OptionParser, number, positive

__all__ = ["parse"]

MOST_THREADS = 1024
"""Where a machine cannot start as many, OpenMP ends the process without a word."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `argv`.

    Raises:
        UserError: an unknown option, a missing or unfit value.
    """
    options = _parser().parse(argv)
    if options.recipe is not None and not options.with_recipe:
        raise UserError("switchkit bench: --recipe and --no-recipe contradict each other; give one of them")
    if not options.with_seq2seq and not options.peers:
        raise UserError("switchkit bench: --no-seq2seq leaves a part of --peers out; give --peers, or leave it out too")
    if options.distributed is not None:
        others = {name: getattr(options, name) for name in ("shapes", "dispatchers", "memory", "peers", "compile")}
        given = next((name for name, value in others.items() if value), None)
        if given is not None:
            raise UserError(f"switchkit bench: --distributed measures the training step alone: leave --{given} out")
        # A table of its own: the others are about one process.
        options.with_layer = options.with_routers = options.with_recipe = options.with_generation = False
        return options
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
        default=200,
        metavar="N",
        help="training steps with Lightning and without, to tell its share (default: %(default)s)",
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
        default=512,
        metavar="N",
        help="tokens to generate with a cache and without (default: %(default)s)",
    )
    parser.add_json("every figure")
    parser.add_plugins()
    return parser


def _shape(text: str) -> Shape:
    try:
        return read_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
