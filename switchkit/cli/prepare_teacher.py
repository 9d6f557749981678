"""``switchkit prepare --teacher``: what a teacher says of the training data, written down for its students."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace

from switchkit.cli.errors import UserError
from switchkit.cli.reading import stops_cleanly

__all__ = ["prepare_teacher"]


def prepare_teacher(options: Namespace) -> int:
    """Write the folder, and say what is in it."""
    if len(options.files) > 1:
        raise UserError(
            f"prepare --teacher reads one text, or a folder of tokens; got {len(options.files)}: write them into one "
            "folder with `switchkit prepare` first"
        )
    from switchkit.cli.checkpoint import checkpoint_path
    from switchkit.cli.devices import device_of
    from switchkit.cli.plugins import bring_in

    device = device_of(options.device)
    bring_in(options.plugins)
    path = checkpoint_path(options.teacher, "runs", "teacher")

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from switchkit.data.shard_writer import refuse_existing
    from switchkit.distill.shared_text import data_of, open_all
    from switchkit.distill.stored import is_stored
    from switchkit.distill.storing import store
    from switchkit.distill.teacher import open_teacher
    from switchkit.models.inputs import check_inputs

    refuse_existing(options.out)
    if is_stored(path):
        raise UserError(f"--teacher {options.teacher}: this is what a teacher said already; name its checkpoint")
    opened = open_all([path])[0]
    text = options.files[0] if options.files else None
    windows = {"stride": options.stride, "draws": options.draws, "context": options.context}
    data = data_of(opened, text, "prepare --teacher CKPT FILE", stage="fit", **windows)
    teacher = open_teacher(path)
    check_inputs(teacher.net, data)
    columns = (TextColumn("Asking the teacher"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with stops_cleanly(), Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("")
        index = store(
            teacher,
            data,
            options.out,
            k=min(64, teacher.vocab_size) if options.k is None else options.k,
            temperature=options.temperature,
            dtype=options.dtype,
            device=device,
            told=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    size = sum(index.bytes.values())
    at = "" if index.temperature == 1 else f" --model.temperature {index.temperature:g}"
    print(
        f"switchkit: {options.out}: {index.k} of {index.vocab_size:,} symbols for each of {index.tokens:,} tokens in "
        f"{index.examples:,} examples, {size / 2**20:,.1f} MiB; learn from it with --config distill "
        f"--model.teacher {shlex.quote(str(options.out))}{at}",
        file=sys.stderr,
    )
    return 0
