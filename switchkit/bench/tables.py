"""The figures as tables for people."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from switchkit.report.numbers import three_digits
from switchkit.report.tables import figures, pairs

__all__ = ["distributed", "generation", "growth", "layer", "machine", "recipe", "routers", "seq2seq"]

Figures = Mapping[str, Any]
_HALF = "Middle half: of the ratios within each round, and the ratio of the medians may lie outside."


def machine(found: Figures) -> RenderableType:
    """Processor, threads, versions."""
    memory = "kept by the process (mallopt)" if found["memory_kept"] else "the allocator's defaults"
    rows = [
        ("device", found["device"]),
        ("cpu", f"{found['cpu']}, cores {found['cores']}, threads {found['threads']}"),
        ("torch", found["torch"]),
        ("freed memory", memory),
    ]
    load = found["load_average"]
    if load is not None and load > 0.5:
        rows.append(
            ("load", f"{load:.1f} on average in the minute before: with other work on the machine, trust no timing")
        )
    return pairs("switchkit bench", rows)


def layer(found: Figures) -> RenderableType:
    """One shape: every contestant against the dense layer."""
    rows = found["rows"]
    on_device = any(row.get("waits_for_device") is not None for row in rows)
    title = f"layer T,d,f,E,k {found['shape']}, {found['dtype']}, forward + backward, {found['rounds']} rounds"
    goals = any(row.get("goal") for row in rows)
    rate, unit = ("TFLOP\n/s", 1e12) if on_device else ("GFLOP\n/s", 1e9)
    columns = ["x\ndense", "middle\nhalf", *(["goal"] if goals else []), "ms", "least\nms", rate, "of\nmatmul", "MiB"]
    table = _table(title, "", *columns, *(["host\nms", "waits"] if on_device else []))
    notes = []
    for row in rows:
        if "ratio" not in row:
            table.add_row(row["name"], *["-"] * (len(table.columns) - 1))
            notes.append(f"{row['name']}: {row['note']}")
            continue
        goal = row.get("goal")
        cells = [
            f"[bold]{row['ratio']:.2f}[/]",
            f"{row['quartiles'][0]:.2f}-{row['quartiles'][1]:.2f}",
            *([f"{goal:.2f}" if goal else ""] if goals else []),
            three_digits(row["ms"]),
            three_digits(row["min_ms"]),
            f"{row['flops_per_second'] / unit:,.0f}",
            f"{row['share_of_matmul']:.0%}",
            f"{row['memory_bytes'] / 2**20:,.0f}" if on_device else _mebibytes(row["memory_bytes"]),
        ]
        if on_device:
            waits = row.get("waits_for_device")
            cells += [three_digits(row["host_ms"]), "" if waits is None else "yes" if waits else "no"]
        table.add_row(row["name"], *cells)
        if row["base"] not in ("dense", row["name"]):
            notes.append(f"{row['name']}: against {row['base']}")
    matmul, imbalance = found["matmul"], found["imbalance"]
    uneven = "" if imbalance is None else f"; largest over mean load {imbalance:.2f}"
    memory = "peak of forward and backward" if on_device else "kept for the backward pass"
    table.caption = (
        f"x dense: ratio of the medians, to a dense layer of equal FLOPs. {_HALF} matmul: {matmul['size']} square, "
        f"{matmul['flops_per_second'] / unit:,.0f} {rate.replace(chr(10), '')} right after. MiB: {memory}{uneven}."
    )
    return _noted(table, notes)


def routers(found: Figures) -> RenderableType:
    """What each router costs alone."""
    title = f"routing alone, T,d,f,E,k {found['shape']}, {found['dtype']}, forward + backward, {found['rounds']} rounds"
    table = _table(title, "", "x dense", "middle half", "ms")
    for row in found["rows"]:
        if "ratio" in row:
            low, high = row["quartiles"]
            table.add_row(
                row["name"], f"[bold]{row['ratio']:.3f}[/]", f"{low:.3f} - {high:.3f}", three_digits(row["ms"])
            )
    table.caption = "Router and placing of its assignments, without experts and dispatch; x dense as above."
    return _noted(table, [f"{row['name']}: {row['note']}" for row in found["rows"] if "note" in row])


def growth(found: Figures) -> RenderableType:
    """Memory at growing lengths; a step of 2.0 is linear."""
    title = f"memory, T,d,f,E,k {found['shape']}, {found['dtype']}, one sequence: MiB {found['what']}"
    table = _table(title, "", *(f"T={tokens}" for tokens in found["tokens"]), "growth")
    for row in found["rows"]:
        sizes = row["bytes"]
        steps = ["-" if not a or b is None else f"x{b / a:.2f}" for a, b in itertools.pairwise(sizes)]
        cells = ["-" if size is None else _mebibytes(size) for size in sizes]
        table.add_row(row["name"], *cells, " ".join(steps))
    return _noted(table, [f"{row['name']}: {row['note']}" for row in found["rows"] if row["note"]])


def recipe(found: Figures) -> RenderableType:
    """Tokens per second against the dense twin, and what Lightning adds."""
    title = f"training step of {found['recipe']}, {found['tokens_per_step']:,} tokens, {found['rounds']} rounds"
    table = _table(title, "", "tokens/s", "ms", "least ms")
    for row in found["rows"]:
        table.add_row(row["name"], f"{row['tokens_per_second']:,.0f}", f"{row['ms']:.1f}", f"{row['min_ms']:.1f}")
    flops = found["flops_per_token"]
    equal = (
        f"equal FLOPs, the routers' {flops['routers'] / flops['dense']:.1%} left out"
        if found["flops_match"]
        else f"FLOPs per token differ: {flops['sparse']:,} sparse, {flops['dense']:,} dense"
    )
    table.caption = f"A sparse step takes [bold]{found['ratio']:.2f}[/] times a dense one ({equal})."
    if found["mode"] is not None:
        table.caption += f' Compiled in mode "{found["mode"]}".'
    title = "Lightning, logging and progress bar, against a bare loop"
    added = _table(title, "", "added", "bare ms", "Lightning ms", "blocks")
    for row in found["overhead"]:
        blocks = ", ".join(f"{value:+.1f}" for value in row["blocks"])
        figures = f"{row['bare_ms']:.1f}", f"{row['lightning_ms']:.1f}", blocks
        added.add_row(row["name"], f"[bold]{row['percent']:+.1f}%[/]", *figures)
    return Group(table, "", added)


def generation(found: Figures) -> RenderableType:
    """Tokens per second with a cache and without."""
    count, rounds = found["new_tokens"], found["rounds"]
    table = _table(
        f"generation, {count:,} tokens from a prompt of one, {rounds} rounds", "", "tokens/s", "s", "least s"
    )
    for row in found["rows"]:
        figures = f"{row['tokens_per_second']:,.0f}", three_digits(row["seconds"]), three_digits(row["min_seconds"])
        table.add_row(row["name"], *figures)
    goal = "" if found["goal"] is None else f" (goal: {found['goal']:g}, on two CPU cores)"
    table.caption = (
        f"The cache makes it [bold]{found['ratio']:.2f}[/] times as fast{goal}. A model like tiny_shakespeare's, d "
        f"{found['d_model']}: {found['parameters']:,} parameters, random weights, one sequence."
    )
    return table


def distributed(found: Figures) -> RenderableType:
    """A training step in several processes, against one."""
    count, threads = found["processes"], found["threads"]
    title = (
        f"training step of {found['recipe']} in {count} process{'es' if count > 1 else ''} ({found['backend']}), "
        f"{found['tokens_per_step']:,} tokens in all, {found['rounds']} rounds"
    )
    columns = ["x one process", "middle half", "ms", "under way", "sent MiB", "collectives"]
    table = _table(title, "", *columns)
    for row in found["rows"]:
        low, high = row["quartiles"]
        cells = [f"[bold]{row['ratio']:.2f}[/]", f"{low:.2f} - {high:.2f}", f"{row['ms']:.1f}"]
        if "under_way" in row:
            cells += [f"{row['under_way']:.0%}", three_digits(row["sent_bytes"] / 2**20), f"{row['collectives']}"]
        table.add_row(row["name"], *cells)
    alone = "one GPU" if found["backend"] == "nccl" else f"{threads['alone']} threads"
    each = "a GPU" if found["backend"] == "nccl" else f"{threads['each']} thread{'s' if threads['each'] > 1 else ''}"
    table.caption = (
        f"x one process: ratio of the medians, to one process with {alone} on the same batch; the others have {each} "
        f"each. {_HALF} "
        "Under way: share of the step in which some collective was, waiting included (torch.profiler). Sent: by each "
        "process in a step, as the algorithms of least traffic send it. Without Lightning's loop, log and checkpoints."
    )
    return _noted(
        table,
        [
            f"{row['name']}: not counted: {', '.join(row['not_counted'])}"
            for row in found["rows"]
            if row.get("not_counted")
        ],
    )


def seq2seq(found: Figures) -> RenderableType:
    """The training step of the encoder-decoder beside Hugging Face's."""
    names = {"d": "d_model", "f": "d_ff", "E": "experts", "layers": "layers", "batch": "batch", "tokens": "length"}
    sizes = ", ".join(f"{name} {found[key]}" for name, key in names.items())
    table = _table(f"training step of encoder-decoders: {sizes}, {found['rounds']} rounds", "", "tokens/s", "ms")
    for row in found["rows"]:
        table.add_row(row["name"], f"{row['tokens_per_second']:,.0f}", f"{row['ms']:.1f}")
    low, high = found["quartiles"]
    table.caption = (
        f"Ours is [bold]{found['times_as_fast']:.2f}[/] times as fast as SwitchTransformers by the medians (goal: "
        f"{found['goal']:g}), middle half {low:.2f} - {high:.2f}. {_HALF} Equal weights, losses "
        f"{found['loss_difference']:.1g} apart."
    )
    return table


def _table(title: str, *columns: str) -> Table:
    table = figures(title, columns, frame=box.SIMPLE_HEAD, no_wrap=True)
    table.caption_justify = "left"
    table.collapse_padding = True
    table.columns[0].no_wrap = False  # names break where there is no room
    return table


def _noted(table: Table, notes: Sequence[str]) -> RenderableType:
    """The table, and below it what its cells have no room for."""
    return Group(table, *notes)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"
