"""What a run shows before and after it trains."""

from __future__ import annotations

import inspect
import math
import platform
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rich.box import ROUNDED, Box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from torch import nn

from switchkit.blocks import Block
from switchkit.counts import Counts, count
from switchkit.layers import MoELayer, moe_layers
from switchkit.models import Decoder, EncoderDecoder
from switchkit.registry import name_of
from switchkit.report.numbers import with_unit

__all__ = ["console", "device_name", "fallback_box", "figures", "loads", "model_table", "pairs", "source_rows"]

BLOCKS = "·▁▂▃▄▅▆▇█"
DIGITS = "012345678"  # where the output has no blocks


def pairs(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """A table of names and values."""
    table = Table(title=title, title_justify="left", title_style="bold", box=ROUNDED, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def figures(
    title: str | None, names: Sequence[str], *, frame: Box | None = ROUNDED, words: Sequence[str] = (), **each: Any
) -> Table:
    """A table for rows of figures: what they are of on the left, they on the right, but for the columns of `words`.

    `each` is for every column, such as ``no_wrap``. Where there is no room, figures are folded: of one that is cut
    nobody knows what it was.
    """
    framed = frame is ROUNDED
    table = Table(title=title, title_justify="left", title_style="bold", box=frame, pad_edge=framed)
    for n, name in enumerate(names):
        table.add_column(name, justify="right" if n and name not in words else "left", **{"overflow": "fold", **each})
    table.columns[0].style = "cyan" if framed else ""
    return table


def model_table(net: nn.Module, context: int, more: Iterable[tuple[str, str]] = ()) -> Table:
    """Sizes and parts of a model, then `more` rows."""
    sizes = count(net, context)
    every = moe_layers(net).values()
    blocks = [block for block in net.modules() if isinstance(block, Block)]
    sparse = [block.mlp for block in blocks if isinstance(block.mlp, MoELayer)]
    projections = [layer for layer in every if not any(layer is mlp for mlp in sparse)]
    rows = [
        ("parameters", f"{sizes.parameters:,} in all, {sizes.active:,} active for a token"),
        ("FLOPs per token", _flops(sizes)),
        ("layers", _layers(net, len(sparse))),
    ]
    if projections:
        one = projections[0]
        rows.append(
            (
                "attention",
                f"{len(projections)} sparse layers for queries, keys and values, "
                f"{one.num_experts} experts ({name_of(type(one.experts))}), router {name_of(type(one.router))}",
            )
        )
    if sparse:
        layer = sparse[0]
        router, capacity = layer.router, layer.capacity
        widths = " or ".join(dict.fromkeys(str(one.d_ff) for one in sparse))
        rows += [
            (
                "experts",
                f"{layer.num_experts} of width {widths} ({name_of(type(layer.experts))}), {router.k} per token",
            ),
            ("router", name_of(type(router))),
            ("capacity", f"{name_of(type(capacity))}{_options(capacity)}, counted over {_group(layer)}"),
            ("dispatcher", name_of(type(layer.dispatcher))),
        ]
    return pairs("Model", [*rows, *more])


def loads(shares: torch.Tensor, names: Iterable[str], experts: Iterable[int]) -> list[tuple[str, str]]:
    """One bar chart per sparse layer: the share of each expert; a full block is the largest share of any.

    `shares` [L, E] is as wide as the layer with most experts; `experts` are how many each layer has.
    """
    rows = []
    signs = BLOCKS if (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf") else DIGITS
    top = float(shares.max()) if shares.numel() else 1.0
    for name, row, number in zip(names, shares.tolist(), experts, strict=True):
        layer = row[:number]
        bars = "".join(signs[max(1, math.ceil(8 * share / top)) if share > 0 else 0] for share in layer)
        rows.append((f"load {name}", f"{bars}  largest {max(layer):.1%}, smallest {min(layer):.1%}"))
    return rows


def source_rows(info: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What the data are; why they are generated is left to `fallback_box`."""
    if not info or "description" not in info:
        return []
    told = str(info["description"])
    return [("data", told.partition(" (")[0] if info.get("generated") else told)]


def fallback_box(info: dict[str, Any] | None) -> Panel | None:
    """A box that says so when a run reads generated text in place of a published one."""
    if not info or not info.get("generated"):
        return None
    text = (
        f"This run reads generated text: {info.get('description', 'of an unknown source')}.\n"
        "Its losses say nothing about the real text. How to have that is said in docs/data.md, Published texts. A file "
        "of your own is data.path, sentence pairs are data.source and data.target."
    )
    return Panel(text, title="generated data", border_style="yellow", title_align="left")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({platform.machine()}, {threads} thread{'s' * (threads > 1)})"


def console(width: int = 110, *, markup: bool = False, stderr: bool = False) -> Console:
    """Where tables go: so wide when the output is a file, which has no width of its own.

    Text is shown as it is, brackets and colons of a path included, unless it is ours and has `markup`.
    """
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(width=None if terminal else width, markup=markup, emoji=False, stderr=stderr)


def _flops(sizes: Counts) -> str:
    parts = (
        ("experts", sizes.experts),
        ("routers", sizes.routers),
        ("attention", sizes.attention),
        ("rest", sizes.other),
    )
    return f"{with_unit(sizes.flops)} forward ({', '.join(f'{name} {with_unit(value)}' for name, value in parts)})"


def _layers(net: nn.Module, sparse: int) -> str:
    if isinstance(net, Decoder):
        places = f": {list(net.sparse)}" if sparse else ""
        return f"{len(net.blocks)}, of which {sparse} sparse{places}"
    if isinstance(net, EncoderDecoder):
        sides = (("encoder", net.encoder, net.encoder_sparse), ("decoder", net.decoder, net.decoder_sparse))
        return "; ".join(
            f"{name} {len(stack.blocks)}, sparse: {list(places) or 'none'}" for name, stack, places in sides
        )
    return f"{sparse} sparse"


def _group(layer: MoELayer) -> str:
    return f"groups of {layer.group} tokens" if isinstance(layer.group, int) else f"the {layer.group}"


def _options(part: object) -> str:
    """The two factors or numbers of a capacity policy, and what else differs from its defaults."""
    usual = {name: p.default for name, p in inspect.signature(type(part)).parameters.items()}
    values = {name: getattr(part, name) for name in usual if hasattr(part, name)}
    shown = {n: v for n, v in values.items() if n in ("train", "eval") or v != usual.get(n)}
    words = (f"{name} {'dropless' if value is None else value}" for name, value in shown.items())
    return f" ({', '.join(words)})" if shown else ""
