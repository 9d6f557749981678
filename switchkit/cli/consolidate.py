"""The command that makes one file of a sharded checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from switchkit.cli.checkpoint import checkpoint_path
from switchkit.cli.options import OptionParser, new_file

__all__ = ["run"]


def run(command: str, argv: Sequence[str]) -> int:
    """Run ``switchkit consolidate``."""
    parser = OptionParser(command, "Make one file of a checkpoint, whatever number of devices wrote it.")
    parser.add_argument("checkpoint", help="a folder NAME.ckpt; a single file passes through")
    parser.add_argument("--out", required=True, help="the file to write; it must not exist")
    given = parser.parse(argv)
    source, target = checkpoint_path(given.checkpoint, "runs", ""), new_file(given.out)

    from switchkit import checkpoints

    content = checkpoints.read(source)
    checkpoints.AtomicCheckpointIO().save_checkpoint(content, target)
    tensors = len(content["state_dict"])
    print(f"{target}: step {content['global_step']}, {tensors} tensors of the model, {target.stat().st_size:,} bytes")
    return 0
