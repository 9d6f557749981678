"""Experts on several devices: meshes, the exchange of tokens, norms and files of sharded tensors. No Lightning.

The strategy is ``switchkit.parallel.ExpertParallelStrategy``, fetched when asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

from switchkit.parallel.exchange import Exchange
from switchkit.parallel.experts import shard_experts
from switchkit.parallel.mesh import Layout, Meshes, layout
from switchkit.parallel.norm import clip_norm, total_norm

__all__ = ["Exchange", "Layout", "Meshes", "clip_norm", "layout", "shard_experts", "total_norm"]


def __getattr__(name: str) -> Any:
    if name == "ExpertParallelStrategy":
        return getattr(importlib.import_module("switchkit.strategies"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
