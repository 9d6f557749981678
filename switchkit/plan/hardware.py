"""What a device can hold and do, as a plan counts with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["GIB", "GPUS", "PRECISIONS", "Gpu", "Precision", "gpu_from", "precision_named"]

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One device of many. Bytes, operations per second, bytes per second in one direction."""

    name: str
    memory: float
    """Bytes that torch can allocate."""
    bf16_flops: float
    """Peak of matrix products in half precision."""
    fp32_flops: float
    """Peak of those in float32, as torch computes them by default (no TF32)."""
    node_bandwidth: float
    """Of a device to the others of its machine."""
    network_bandwidth: float
    """Of a device to other machines."""
    efficiency: float = 0.4
    """Share of the peak that a step reaches where it computes; 38 to 43 % is what Llama 3 had on 8,192 to 16,384 H100
    (arXiv 2407.21783, Table 4)."""


GPUS = {
    "h100": Gpu("h100", 79 * GIB, 989e12, 67e12, 450e9, 50e9),
    "h200": Gpu("h200", 139 * GIB, 989e12, 67e12, 450e9, 50e9),
    "a100": Gpu("a100", 79 * GIB, 312e12, 19.5e12, 300e9, 25e9),
}
"""SXM modules of 80, 141 and 80 GB, rounded down to what is free of them. Peaks (dense) and NVLink are of NVIDIA's data
sheets, NVLink halved to one direction; the network is one NIC for each device, 400 Gbit/s as in DGX H100 and H200, 200
as in DGX A100."""

REQUIRED = ("memory_gib", "bf16_tflops", "fp32_tflops", "node_gb_per_s", "network_gb_per_s")
OPTIONAL = ("name", "efficiency")


def gpu_from(values: Mapping[str, Any], where: str) -> Gpu:
    """A device of a file's numbers; `where` names the file in errors.

    Raises:
        ValueError: a key that is missing or unknown, a value that is no number above 0, an efficiency above 1.
    """
    known = (*REQUIRED, *OPTIONAL)
    if missing := [key for key in REQUIRED if values.get(key) is None]:
        raise ValueError(f"{where} lacks {', '.join(missing)}; a GPU is {', '.join(REQUIRED)} and may have "
                         f"{', '.join(OPTIONAL)}")  # fmt: skip
    if unknown := [str(key) for key in values if key not in known]:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(known)}")
    for key in (*REQUIRED, "efficiency"):
        value = values.get(key, 0.4)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{where}: {key} must be a number > 0; got {value!r}")
    efficiency = float(values.get("efficiency", 0.4))
    if efficiency > 1:
        raise ValueError(f"{where}: efficiency is a share of the peak, at most 1; got {efficiency}")
    return Gpu(
        str(values.get("name", where)),
        values["memory_gib"] * GIB,
        values["bf16_tflops"] * 1e12,
        values["fp32_tflops"] * 1e12,
        values["node_gb_per_s"] * 1e9,
        values["network_gb_per_s"] * 1e9,
        efficiency,
    )


@dataclass(frozen=True)
class Precision:
    """Bytes of one number in each role, under one of Lightning's precisions."""

    name: str
    weight: int
    """Of a parameter, of its gradient, and of the optimizer's state."""
    product: int
    """Of what goes into and comes out of matrix products."""
    stream: int
    """Of what runs from block to block, and of the rows that are sent to experts."""

    @property
    def casts(self) -> bool:
        """Whether matrices are copied to half precision, and the copies kept for the backward pass (autocast)."""
        return self.product < self.weight


PRECISIONS = {
    "32-true": Precision("32-true", 4, 4, 4),
    "bf16-mixed": Precision("bf16-mixed", 4, 2, 4),
    "16-mixed": Precision("16-mixed", 4, 2, 4),
    "bf16-true": Precision("bf16-true", 2, 2, 2),
    "16-true": Precision("16-true", 2, 2, 2),
}
_OTHER_WORDS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "None": "32-true"}


def precision_named(name: Any) -> Precision:
    """One of Lightning's precisions, by any of its words; null: float32.

    Raises:
        ValueError: another one; names those that are known.
    """
    word = _OTHER_WORDS.get(str(name), str(name))
    if word not in PRECISIONS:
        raise ValueError(f"precision {name!r} is not planned here: use {', '.join(PRECISIONS)}")
    return PRECISIONS[word]
