"""Whether autocast is at work, and how to keep it out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["autocasts", "full_precision"]


def autocasts(device: torch.device) -> bool:
    """True where products on this device are cast; never on the meta device, which has no autocast to ask about."""
    kind = device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Outside autocast; nothing at all where there is none, for its context costs as much as a small product."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()
