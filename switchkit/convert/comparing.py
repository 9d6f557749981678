"""How far a converted model is from the one that it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from switchkit.metrics import cross_entropy
from switchkit.models import EncoderDecoder
from switchkit.models.base import evaluating
from switchkit.module import LanguageModule

__all__ = ["Change", "change"]


@dataclass(frozen=True)
class Change:
    """Of a converted model, from the one that it was made of."""

    logits: float
    """The largest difference of a logit, as a share of the largest logit."""
    before: float
    """Cross-entropy of the model before, in nats per token; on random tokens it says something by comparison only."""
    after: float
    tokens: int


@torch.no_grad()
def change(before: LanguageModule, after: LanguageModule, *, sequences: int = 4, length: int = 64) -> Change:
    """Both models in evaluation on the same random tokens (seed 0), each sequence `length` long at most."""
    vocabulary = int(before.net.get_parameter("embed.weight").shape[0])
    length = min(length, int(getattr(before.net, "context", length)))
    draw = torch.Generator().manual_seed(0)
    shape = (sequences, length + 1)
    first, second = (torch.randint(vocabulary, shape, generator=draw).to(before.device) for _ in range(2))
    tokens, targets = first[:, :-1], first[:, 1:]
    source = {"source": second} if isinstance(before.net, EncoderDecoder) else {}
    logits = [_logits(module.net, tokens, source) for module in (before, after)]
    old, new = (float(cross_entropy(found, targets, None)[0]) / targets.numel() for found in logits)
    apart = (logits[1] - logits[0]).abs().max() / logits[0].abs().max().clamp(min=torch.finfo(logits[0].dtype).tiny)
    return Change(float(apart), old, new, targets.numel())


def _logits(net: nn.Module, tokens: Int[Tensor, "B S"], source: Mapping[str, Tensor]) -> Tensor:
    with evaluating(net):
        found: Tensor = net(tokens, **source).logits
    return found
