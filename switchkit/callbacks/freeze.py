"""Routers that stop learning."""

from __future__ import annotations

import lightning as L
import torch

from switchkit.checks import at_least
from switchkit.routing.base import Router

__all__ = ["FreezeRouter"]


class FreezeRouter(L.Callback):
    """Keeps the parameters of all routers as they are, from one optimizer step to another.

    Their gradients are taken away before the optimizer steps, so that it skips them altogether: with a gradient of
    zero, momentum and weight decay would go on moving them. They still are computed, which costs what it did before;
    in return nothing about the parameters changes, and resuming, DDP and the optimizer's state need no care, as they
    would with ``requires_grad_(False)``. The optimizer's state waits: training goes on from it at `until`. Gradient
    clipping does not see the frozen ones. Use it to tune experts under a routing that holds still, or to train on
    fixed random routers (from step 0). Loads can still shift, as the tokens that the routers read do.

    Elsewhere: StableMoE (arXiv 2204.08396) distils its router and freezes it for the rest of training.

    Args:
        after: first optimizer step, counted from 0, that leaves the routers alone.
        until: first step that moves them again; null: none.

    Raises:
        ValueError: after below 0, until not above it; at the start of training, a model whose routers have no
            parameters.

    Source: switchkit.
    """

    needs_sparse_layers = True

    def __init__(self, after: int = 0, until: int | None = None) -> None:
        at_least(0, after=after)
        if until is not None and until <= after:
            raise ValueError(f"until must be above after={after}, or null to freeze to the end; got {until}")
        self.after, self.until = after, until

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and not _parameters(pl_module):
            raise ValueError("FreezeRouter found no router with parameters: leave the callback out")

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.after <= trainer.global_step and (self.until is None or trainer.global_step < self.until):
            for parameter in _parameters(pl_module):
                parameter.grad = None


def _parameters(module: L.LightningModule) -> list[torch.nn.Parameter]:
    return [p for part in module.modules() if isinstance(part, Router) for p in part.parameters()]
