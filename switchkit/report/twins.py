"""A sparse model beside its dense twin."""

from __future__ import annotations

from rich.table import Table
from torch import nn

from switchkit.counts import buffered, count
from switchkit.models import Decoder, EncoderDecoder
from switchkit.module import LanguageModule
from switchkit.report.numbers import three_digits, with_unit
from switchkit.report.tables import figures
from switchkit.twins import dense_spec, net_of

__all__ = ["both", "both_table", "twin_rows"]


def twin_rows(module: nn.Module, context: int) -> list[tuple[str, str]]:
    """Rows about the dense model of equal FLOPs per token, as `switchkit.twins.dense_spec` has it."""
    net = getattr(module, "net", None)
    if not (isinstance(module, LanguageModule) and isinstance(net, (Decoder, EncoderDecoder))):
        return [("dense twin", "known of a Decoder or an EncoderDecoder alone")]
    try:
        spec = dense_spec(module.spec, vocab_size=net.vocab_size, context=context)
    except ValueError as error:
        return [("dense twin", f"none: {error}")]
    dense = count(net_of(spec, net.vocab_size), context)
    routers = with_unit(count(net, context).routers)
    widths = {name: spec["init_args"]["net"]["init_args"].get(name) for name in ("d_ff", "decoder_d_ff")}
    told = ", ".join(f"{name} {value}" for name, value in widths.items() if value is not None)
    return [
        ("dense twin", f"a dense layer in place of each mixture, {told}: --twin flops writes the recipe"),
        ("  parameters", f"{dense.parameters:,}"),
        ("  FLOPs per token", f"{with_unit(dense.flops)} (the routers' {routers} left out)"),
    ]


def both(sparse: nn.Module, dense: nn.Module, context: int) -> list[tuple[str, str, str, str]]:
    """What each of two models has, and the difference: of everything counted, name first."""
    one, other = count(sparse, context), count(dense, context)
    rows = [_row(name, getattr(one, field), getattr(other, field)) for field, name in FIELDS.items()]
    return [*rows, ("  experts, buffers full", f"{buffered(sparse, context):,}", "", "")]


def both_table(rows: list[tuple[str, str, str, str]]) -> Table:
    table = figures("The model and its dense twin", ("", "sparse", "dense", "difference"), no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


FIELDS = {
    "parameters": "parameters",
    "active": "active for a token",
    "flops": "FLOPs of a token, forward",
    "matched": "  without routers",
    "experts": "  experts",
    "routers": "  routers",
    "attention": "  attention",
    "other": "  rest",
}
"""Of `Counts`."""


def _row(name: str, one: int, other: int) -> tuple[str, str, str, str]:
    told = f"{three_digits(100 * (other - one) / one, '+')}%" if one and other else ""
    return name, f"{one:,}", f"{other:,}", "equal" if one == other else told
