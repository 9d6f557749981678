"""``switchkit upcycle``: a sparse checkpoint of a dense one."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence

from switchkit.cli.conversion import Conversion, conversion_parser, say
from switchkit.cli.options import OptionParser, number, positive, seed

__all__ = ["run"]


def run(command: str, argv: Sequence[str]) -> int:
    """Write the checkpoint, and say how far its logits are from those of the dense one."""
    options = _parser(command).parse(argv)
    work = Conversion.begin(options)

    import torch

    from switchkit.convert.comparing import change
    from switchkit.convert.upcycling import upcycle

    torch.manual_seed(options.seed)
    made = upcycle(
        work.module,
        num_experts=options.num_experts,
        k=options.k,
        sparse=f"every({options.every})" if options.sparse is None else options.sparse,
        decoder_sparse=options.decoder_sparse,
        granularity=options.granularity,
        noise=options.noise,
        drop=options.drop,
        capacity_factor=options.capacity_factor,
        router_std=options.router_std,
    )
    found = change(work.module, made)
    work.save(made)
    before, after = (sum(p.numel() for p in module.parameters()) for module in (work.module, made))
    say(f"{len(made.sparse_layers)} sparse layers, {before:,} parameters became {after:,}: wrote {work.out}")
    say(
        f"step 0, on {found.tokens} random tokens: logits differ by {found.logits:.1e} of the largest, loss "
        f"{found.after:.5f} (dense {found.before:.5f})"
    )
    say(f"the optimizer starts afresh. Go on with: {work.go_on}")
    return 0


def _parser(command: str) -> OptionParser:
    parser = conversion_parser(
        command,
        "Make a sparse checkpoint of a dense one: its feed-forward layers become the experts, a new router stands "
        "before them, all else stays. With k of 2 or more, and without --noise and --drop, the logits stay the same. "
        "The optimizer's state is left behind.",
    )
    add = parser.add_argument
    above = number(float, "a finite number above 0", lambda value: math.isfinite(value) and value > 0)
    share = number(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
    add("--num_experts", type=positive, default=8, metavar="N", help="copies of each layer (default: %(default)s)")
    add("--k", type=positive, metavar="K", help="experts of a token (default: 2, times the granularity); 1: switch")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--every", type=positive, default=1, metavar="N", help="every N-th block (default: %(default)s)")
    where.add_argument("--sparse", type=_placement, metavar="WHERE", help="or last(2), every(2), or blocks: 1,3")
    add("--decoder_sparse", type=_placement, metavar="WHERE", help="of an encoder-decoder (default: as the encoder)")
    add("--granularity", type=positive, default=1, metavar="N", help="cut each copy into N experts (default: 1)")
    add(
        "--noise",
        type=number(float, "a finite number of at least 0", lambda value: math.isfinite(value) and value >= 0),
        default=0.0,
        metavar="X",
        help="noise on the experts, X times the deviation of each matrix (default: none)",
    )
    add("--drop", type=share, default=0.0, metavar="R", help="draw this share of each copy's hidden units anew")
    add("--capacity_factor", type=above, metavar="F", help="in training; later too by fit (default: dropless)")
    add("--router_std", type=above, metavar="X", help="of the router's weights (default: sqrt(0.1/d), 0.001 for k 1)")
    add("--seed", type=seed, default=0, metavar="N", help="of all that is drawn (default: %(default)s)")
    return parser


def _placement(text: str) -> str | list[int]:
    """``every(2)``, ``last(2)``, or numbers with commas; nothing: none."""
    if re.fullmatch(r"(every|last)\(\d+\)", text):
        return text
    if re.fullmatch(r"(\d+(,\d+)*)?", text):
        return [int(word) for word in text.split(",") if word]
    raise argparse.ArgumentTypeError(f"expected every(N), last(N) or blocks such as 1,3, got {text!r}")
