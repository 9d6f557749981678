"""Numbers of the sparse layers that change during training: functions of the step, so that a resumed run is exact."""

from __future__ import annotations

from typing import Any

import lightning as L

from switchkit.capacity.policies import Factor
from switchkit.checks import at_least, finite_above, from_0_below_1
from switchkit.layers import moe_layers
from switchkit.models.base import causal_layers
from switchkit.routing.base import Router

__all__ = ["CapacitySchedule", "JitterSchedule", "linear"]


def linear(step: int, start: float, end: float, steps: int, begin: int = 0) -> float:
    """`start` up to step `begin`, `end` from `steps` later on, a straight line between them."""
    if step >= begin + steps:
        return end
    return start + (end - start) * max(0, step - begin) / steps


class CapacitySchedule(L.Callback):
    """Moves the training capacity factor of every `factor` policy along a line over optimizer steps.

    From `start` to `end` within `steps`, from step `begin` on. A falling factor drops little while routers are still
    uneven and saves work later; a rising one does the reverse, and with ``end=None`` the factor stays at `start` and
    training ends dropless, as evaluation is. The factor of evaluation is left alone. `torch.compile` compiles a layer
    anew for each value, and after 8 (``torch._dynamo.config.recompile_limit``) leaves it uncompiled.

    Elsewhere: Mesh TensorFlow and flaxformer train at 1.25 and evaluate at 2.0, both constant throughout.

    Args:
        start: factor up to step `begin`.
        end: factor in the end; null: dropless after the last of `steps`.
        steps: optimizer steps from `start` to `end`.
        begin: optimizer steps before that.

    Raises:
        ValueError: a factor that is not a finite number above 0, steps below 1, begin below 0; at the start of
            training, a model without a `factor` policy, or one in which the factor would let a causal model see the
            future, which it could not when it was built dropless (without `allow_leak`).

    Source: switchkit.
    """

    needs_sparse_layers = True

    def __init__(self, start: float, end: float | None, steps: int, begin: int = 0) -> None:
        finite_above(0, start=start)
        if end is not None:
            finite_above(0, end=end)
        at_least(1, steps=steps)
        at_least(0, begin=begin)
        self.start, self.end, self.steps, self.begin = start, end, steps, begin

    def factor(self, step: int) -> float | None:
        """The factor at an optimizer step, counted from 0; None: dropless."""
        if self.end is None:
            return self.start if step < self.begin + self.steps else None
        return linear(step, self.start, self.end, self.steps, self.begin)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        layers = moe_layers(pl_module).values()
        if stage == "fit" and not any(isinstance(layer.capacity, Factor) for layer in layers):
            kinds = sorted({type(layer.capacity).__name__ for layer in layers}) or ["no sparse layer"]
            raise ValueError(
                f"CapacitySchedule found no `factor` policy, only {', '.join(kinds)}: "
                "use `capacity: factor`, or leave the callback out"
            )
        if stage != "fit":
            return
        net = getattr(pl_module, "net", pl_module)
        guarded = [] if getattr(net, "allow_leak", False) else [*causal_layers(net).values()]
        for layer in layers:
            if isinstance(layer.capacity, Factor):
                refused = layer.leaks
                layer.capacity.train = self.start
                if layer in guarded and refused is None and layer.leaks is not None:
                    raise ValueError(f"CapacitySchedule would make a dropless layer leak: {layer.leaks}")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        factor = self.factor(trainer.global_step)
        for layer in moe_layers(pl_module).values():
            if isinstance(layer.capacity, Factor) and layer.capacity.train != factor:
                layer.capacity.train = factor


class JitterSchedule(L.Callback):
    """Moves the jitter of every router that has one along a line over optimizer steps.

    From `start` to `end` within `steps`, from step `begin` on: noise that explores while routers learn, and ends when
    they have. Jitter multiplies the router's input by U[1 - jitter, 1 + jitter], in training only. `torch.compile`
    compiles a layer anew for each value, and after 8 leaves it uncompiled.

    Elsewhere: a constant 0.01 in Mesh TensorFlow and Hugging Face's Switch, none in flaxformer's recipes.

    Args:
        start: jitter up to step `begin`.
        end: jitter in the end.
        steps: optimizer steps from `start` to `end`.
        begin: optimizer steps before that.

    Raises:
        ValueError: a jitter outside [0, 1), steps below 1, begin below 0; at the start of training, a model without a
            router that has a jitter.

    Source: switchkit; the jitter is that of arXiv 2101.03961, appendix C.
    """

    needs_sparse_layers = True

    def __init__(self, start: float, end: float, steps: int, begin: int = 0) -> None:
        from_0_below_1(start=start, end=end)
        at_least(1, steps=steps)
        at_least(0, begin=begin)
        self.start, self.end, self.steps, self.begin = start, end, steps, begin

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and not _jittery(pl_module):
            raise ValueError(
                "JitterSchedule found no router with a jitter: use one that has it, such as `switch` or `top_k`, "
                "or leave the callback out"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        jitter = linear(trainer.global_step, self.start, self.end, self.steps, self.begin)
        for router in _jittery(pl_module):
            router.jitter = jitter  # type: ignore[assignment]


def _jittery(module: L.LightningModule) -> list[Router]:
    return [part for part in module.modules() if isinstance(part, Router) and hasattr(part, "jitter")]
