"""Where kernels run."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

__all__ = ["usable"]


def usable(x: Tensor) -> bool:
    """True for tensors of a GPU where Triton works; elsewhere plain operations do, with the same results.

    Under torch.compile they do too: it makes kernels of its own from them and sees more of what is around.
    """
    return x.is_cuda and not torch.compiler.is_compiling() and _works(x.device.index)


@functools.cache
def _works(device: int) -> bool:
    """Tried once: Triton needs a C compiler and Python's headers at run time, which not every machine has."""
    if importlib.util.find_spec("triton") is None:
        return False
    from switchkit.kernels.rows import clear_tail

    try:
        with torch.no_grad():
            ends = torch.zeros(1, dtype=torch.int32, device=f"cuda:{device}")
            clear_tail(torch.ones(1, 1, device=ends.device), ends)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200]
        warnings.warn(
            f"Triton does not work on this machine ({type(error).__name__}: {reason}), so that sparse layers take "
            "slower operations. It needs a C compiler (gcc or clang, or CC) and Python's headers",
            stacklevel=2,
        )
        return False
    return True
