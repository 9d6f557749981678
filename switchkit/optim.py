"""Which parameters decay, and how the learning rate runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Protocol

import lightning as L
import torch
from torch import nn

from switchkit.attention import RelativeBias
from switchkit.experts.base import Experts
from switchkit.routing.base import Router

__all__ = [
    "OptimizerFactory",
    "adamw",
    "check_clipping",
    "check_optimizer",
    "decay_groups",
    "last_step",
    "learning_rate",
    "why_whole",
]


class OptimizerFactory(Protocol):
    """Anything that builds an optimizer for parameter groups: a class of torch.optim, a partial, a YAML part."""

    def __call__(self, params: Iterable[dict[str, Any]]) -> torch.optim.Optimizer: ...


adamw = partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
"""The optimizer of a `LanguageModule` that names none."""


def check_optimizer(factory: OptimizerFactory) -> None:
    """Build it for a made-up matrix and vector, so that its options are refused before a run has begun.

    What fails for another reason, as one that needs a GPU or a process group, is left to the run.

    Raises:
        ValueError: the optimizer's own complaint, or a learning rate or decay that is no finite number.
    """
    matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    try:
        made = factory([{"params": [matrix]}, {"params": [vector], "weight_decay": 0.0}])
    except (ValueError, TypeError) as error:
        if "process group" in str(error):
            return
        raise ValueError(f"optimizer: {error}") from error
    except Exception:
        return
    for option in ("lr", "weight_decay"):
        value = getattr(made, "defaults", {}).get(option)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"optimizer {type(made).__name__}: {option} must be a finite number; got {value}")


def check_clipping(optimizer: torch.optim.Optimizer, precision: str, clip: float | None) -> None:
    """Raises ValueError for a fused optimizer whose gradients are to be clipped in mixed precision.

    Lightning refuses it in the first step: under a loss scale the optimizer itself would undo the scale, too late.
    """
    if clip and precision in ("16-mixed", "bf16-mixed") and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"a fused {type(optimizer).__name__} does not go together with gradient_clip_val={clip:g} in precision "
            f"{precision}: leave fused: true out, or set gradient_clip_val to null, or a precision that is not mixed"
        )


def why_whole(optimizer: torch.optim.Optimizer) -> str | None:
    """Why an optimizer cannot step on parameters of which each device has a part; None: it can, as far as is known."""
    if not isinstance(optimizer, torch.optim.Adafactor):
        return None
    return (
        "Adafactor of torch cannot step on parameters of which each device has a part, as it takes means over whole "
        "rows and columns: take another optimizer, such as AdamW, or strategy ddp"
    )


def last_step(trainer: L.Trainer) -> float:
    """The optimizer step that a run ends with, by `max_steps` or `max_epochs`; infinite where nothing ends it."""
    # Epochs end nothing where they are not given; how many batches one has need not be asked of the data then.
    steps = trainer.max_steps if trainer.max_epochs in (None, -1) else trainer.estimated_stepping_batches
    return math.inf if steps < 0 else steps


def learning_rate(warmup: int, steps: int, schedule: str, final: float, step: int) -> float:
    """Share of the peak rate at optimizer step `step` (from 0).

    A cosine comes to `final` at step `steps`, which would be one after the last.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def decay_groups(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with and without weight decay: norms, biases, embeddings and routers are spared.

    A relative position bias is spared as a bias, and so are the vectors of experts, such as gains.
    """
    spared = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, (nn.Embedding, nn.LayerNorm, nn.RMSNorm, RelativeBias, Router))
        for parameter in part.parameters()
    }
    spared.update(id(vector) for part in module.modules() if isinstance(part, Experts) for vector in _vectors(part))
    decay: list[nn.Parameter] = []
    spare: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        bias = name.rpartition(".")[2] in ("bias", "b1", "b2")
        (spare if bias or parameter.dim() < 2 or id(parameter) in spared else decay).append(parameter)
    return decay, spare


def _vectors(experts: Experts) -> Iterator[nn.Parameter]:
    """Biases, gains and the like, one of each for an expert: stacked as [E, width] they look like matrices."""
    always = {id(parameter) for parameter in experts.always_parameters()}
    return (p for p in experts.parameters(recurse=False) if p.dim() == 2 and id(p) not in always)
