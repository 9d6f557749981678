"""What launches have in common."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["block_of", "sums_in"]


def block_of(width: int) -> dict[str, int]:
    """Columns that a program holds at once, and warps that share them: rows of up to 2048 in one go."""
    block = max(16, min(triton.next_power_of_2(width), 2048))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 256))}


def sums_in(x: Tensor) -> tl.dtype:
    """Sums, products and functions are taken in float32, or in float64 where the numbers are."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32
