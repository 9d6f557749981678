"""A sparsity loss whose weight looks for the right sparsity."""

from __future__ import annotations

from typing import Any

import lightning as L
from jaxtyping import Int
from torch import Tensor

from switchkit.checks import at_least, finite_above
from switchkit.losses.base import Loss
from switchkit.module import LanguageModule
from switchkit.registry import name_of
from switchkit.step_callback import StepCallback

__all__ = ["AdaptiveL1"]


class AdaptiveL1(StepCallback):
    """Drives the mean number of active experts to `k` by the weight of a sparsity loss: ReMoE's controller.

    After each optimizer step ``weight *= factor ** sign(active - k)``, `active` being the chosen assignments of a real
    token, averaged over the step's tokens, the sparse layers and the ranks: more than k, and the weight grows. Reads
    two numbers from the device per step. The weight is in the checkpoint.

    Args:
        k: active experts of a token to aim for.
        factor: of a step; 1.2 is the paper's. The weight crosses a factor of 10 within 13 steps.
        loss: registered name of the loss term, whose `weight` is where the controller starts (1e-8 in the paper).

    Raises:
        ValueError: k below 1, a factor not above 1; at the start of training, no or several terms of that name, a
            weight of 0, which no factor moves, k above the number of experts.

    Source: arXiv 2412.14711, section 3.3.
    """

    def __init__(self, k: int, factor: float = 1.2, loss: str = "l1") -> None:
        at_least(1, k=k)
        finite_above(1, factor=factor)
        self.k, self.factor, self.loss = k, factor, loss
        self._weight: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self._weight}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._weight = state_dict["weight"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._weight = None
        assert isinstance(pl_module, LanguageModule)
        self._term(pl_module)
        fewest = min(pl_module.train_routing.num_experts)
        if self.k > fewest:
            raise ValueError(f"k={self.k} active experts are impossible: a sparse layer has {fewest}")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        term = self._term(pl_module)
        if self._weight is None:
            self._weight = term.weight
        term.weight = self._weight

    def after_optimizer_step(
        self, trainer: L.Trainer, pl_module: LanguageModule, load: Int[Tensor, "L E"], tokens: Int[Tensor, "L"]
    ) -> None:
        # As integers: the sign is exact.
        gap = int(load.sum() - self.k * tokens.sum())
        term = self._term(pl_module)
        term.weight = self._weight = term.weight * self.factor ** ((gap > 0) - (gap < 0))

    def _term(self, module: LanguageModule) -> Loss:
        names = [name_of(type(term)) for term in module.losses]
        if names.count(self.loss) != 1:
            raise ValueError(
                f"AdaptiveL1 needs one loss term {self.loss!r}; the model has {', '.join(names) or 'none'}: "
                "add it to `losses`, or name another by `loss`"
            )
        term = module.losses[names.index(self.loss)]
        if not term.weight > 0:
            raise ValueError(f"the loss {self.loss!r} has weight {term.weight}, which no factor moves: start at 1e-8")
        return term
