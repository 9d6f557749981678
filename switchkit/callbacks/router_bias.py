"""Even load without a loss: a bias on the choice of experts, moved after each step."""

from __future__ import annotations

from typing import cast

import lightning as L
import torch
from jaxtyping import Float, Int
from torch import Tensor

from switchkit.checks import finite_above
from switchkit.layers import MoELayer, moe_layers
from switchkit.module import LanguageModule
from switchkit.step_callback import StepCallback

__all__ = ["UpdateRouterBias", "bias_update"]


def bias_update(load: Int[Tensor, "E"], rate: float, *, center: bool = False) -> Float[Tensor, "E"]:
    """``rate * sign(mean load - load)``, by `center` less its mean; exact, as the counts are integers."""
    step = rate * (load.sum() - len(load) * load).sign().float()
    return step - step.mean() if center else step


class UpdateRouterBias(StepCallback):
    """Keeps the load even without a loss: experts with more than the mean load lose `rate` of bias, others gain it.

    After each optimizer step ``bias += rate * sign(mean load - load)`` in every router that has a buffer `bias` [E], as
    `sigmoid` has. The load counts chosen assignments, before any drop, over the micro-batches of the step and all
    ranks; validation does not count. The bias only decides who is chosen, no gradient passes through it.

    Elsewhere: DeepSeek-V3 uses 0.001, and 0 for its last 500 billion tokens (`freeze_step`); torchtitan subtracts the
    mean of the update (`center`), which keeps the mean of the biases where it was. Hugging Face's port of DeepSeek-V3
    has the bias and never updates it.

    Args:
        rate: step of the bias; 0.001 is the paper's.
        freeze_step: from this optimizer step on, counted from 0, the biases stay; null: never.
        center: subtract the mean of the update.

    Raises:
        ValueError: a rate that is not a finite number above 0, freeze_step below 0; at the start of training, a model
            without such a router, or a bias of less than 32 bits, in which steps of 0.001 get lost.

    Source: arXiv 2408.15664, algorithm 1; arXiv 2412.19437, section 2.1.2.
    """

    def __init__(self, rate: float = 1e-3, freeze_step: int | None = None, center: bool = False) -> None:
        finite_above(0, rate=rate)
        if freeze_step is not None and freeze_step < 0:
            raise ValueError(f"freeze_step must be at least 0, or null for never; got {freeze_step}")
        self.rate, self.freeze_step, self.center = rate, freeze_step, center

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not in setup: only now has the trainer cast the model to its precision.
        assert isinstance(pl_module, LanguageModule)
        found = {name: bias for name, bias in _biases(pl_module).items() if bias is not None}
        if not found:
            routers = sorted({type(layer.router).__name__ for layer in moe_layers(pl_module.net).values()})
            raise ValueError(
                f"UpdateRouterBias found no router with a buffer `bias`, only {', '.join(routers)}: "
                "use the router `sigmoid`, or leave the callback out"
            )
        for name, bias in found.items():
            if torch.finfo(bias.dtype).bits < 32:
                raise ValueError(
                    f"the router bias of {name} is {bias.dtype}, where steps of {self.rate} get lost in rounding: "
                    "keep the buffer in float32, as `sigmoid` does, whatever the model is cast to"
                )

    def after_optimizer_step(
        self, trainer: L.Trainer, pl_module: LanguageModule, load: Int[Tensor, "L E"], tokens: Int[Tensor, "L"]
    ) -> None:
        if self.freeze_step is not None and trainer.global_step >= self.freeze_step:
            return
        for counts, bias in zip(load, _biases(pl_module).values(), strict=True):
            if bias is not None:
                bias += bias_update(counts[: len(bias)], self.rate, center=self.center)


def _biases(module: LanguageModule) -> dict[str, Tensor | None]:
    """By sparse layer, in the order of the counts."""
    # By name: after every step, a walk through the whole model would be for nothing.
    routers = {name: cast(MoELayer, module.net.get_submodule(name)).router for name in module.sparse_layers}
    return {name: dict(router.named_buffers(recurse=False)).get("bias") for name, router in routers.items()}
