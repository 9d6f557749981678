"""What ``--device`` means, for commands without a Trainer."""

from __future__ import annotations

from switchkit.cli.errors import UserError

__all__ = ["device_of"]


def device_of(name: str | None) -> str:
    """The device of ``--device``; the fastest there is for None.

    Raises:
        UserError: it is not there, or it is of a kind that these commands do not run on.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.accelerator.current_accelerator(check_available=True)
    accepted = f"expected cpu, {found.type} or {found.type}:N" if found else "expected cpu: no GPU is found here"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise UserError(f"--device {name or repr(name)}: there is no such kind of device; {accepted}") from None
    if kind not in ("cpu", found.type if found else "cpu"):
        raise UserError(f"--device {name}: {accepted}")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).partition(chr(10))[0]}; {accepted}") from error
    return name
