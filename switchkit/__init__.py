"""switchkit: Switch Transformers and every other Mixture-of-Experts routing scheme, on PyTorch Lightning.

Importing the package imports nothing heavy; each public name is fetched when first used. Registered parts are public
names too (``from switchkit import TopK, Factor, Sorted``), your own included once registered.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Routing": "records",
    "Rows": "records",
    "load": "records",
    "mean_probs": "records",
    "mean_square_logsumexp": "records",
    "register": "registry",
    "named": "registry",
    "Router": "routing.base",
    "LinearRouter": "routing.base",
    "token_choice": "routing.base",
    "CapacityPolicy": "capacity.base",
    "Experts": "experts.base",
    "Loss": "losses.base",
    "Dispatcher": "dispatch.base",
    "MoELayer": "layers",
    "FeedForward": "layers",
    "Attention": "attention",
    "LatentAttention": "attention",
    "Decoder": "models",
    "EncoderDecoder": "models",
    "Cache": "models",
    "every": "models",
    "last": "models",
    "LanguageModule": "module",
    "DistillModule": "distill",
    "distillation_loss": "distill",
    "percent_preserved": "distill",
    "ByteTokenizer": "data",
    "CausalLM": "data",
    "CharTokenizer": "data",
    "FileTokenizer": "data",
    "Mixture": "data",
    "PrefixLM": "data",
    "SpanCorruption": "data",
    "SpanData": "data",
    "StreamData": "data",
    "UL2": "data",
    "PairData": "data",
    "TextData": "data",
    "DroppedByPosition": "metrics",
    "RoutingAgreement": "metrics",
    "RoutingInformation": "metrics",
    "RoutingMetrics": "metrics",
    "TokenAccuracy": "metrics",
    "preset": "presets",
    "preset_parts": "presets",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name[:1].isupper():
        from switchkit import registry

        known = [cls for cls in registry.all_parts().values() if cls.__name__ == name]
        # A part of the user's own never hides one of ours.
        for cls in sorted(known, key=lambda cls: not cls.__module__.startswith(f"{__name__}.")):
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
