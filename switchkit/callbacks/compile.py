"""Training through torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from switchkit.checks import one_of

__all__ = ["Compile"]

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class Compile(L.Callback):
    """Runs the model's training steps through `torch.compile`, in place: kernels made for its sizes.

    The forward and backward pass of ``net`` alone: the losses on records, the optimizer, evaluation and generation
    run as they are, and names of weights in checkpoints stay. The first steps wait for the compiler, up to a minute.
    Dropout and jitter draw other numbers than uncompiled, from the same generators: a run resumed under the same torch
    goes on as it would have. Models whose batches differ in length are compiled a second time, for any length. When
    training ends torch's compiler forgets all that it has compiled in this process (`torch.compiler.reset`).

    Args:
        mode: as of `torch.compile`. "reduce-overhead" records all of a step's kernels as CUDA graphs: a small model on
            a GPU waits for Python otherwise. They need memory of their own, and batches of few sizes. On a CPU it
            is the same as "default".

    Raises:
        ValueError: an unknown mode; at the start of training, a module without ``net``, a strategy that cuts the model
            up (`ExpertParallelStrategy` has a `compile` of its own), distillation that watches layers by hooks; at the
            first step, a compiler that does not work on this machine (it needs a C++ compiler on a CPU, and Triton and
            a C compiler on a GPU).

    Source: switchkit.
    """

    def __init__(self, mode: Mode = "default") -> None:
        self.mode = one_of("mode", mode, get_args(Mode))
        self._net: nn.Module | None = None
        self._call: Callable[..., Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        net = getattr(pl_module, "net", None)
        if not isinstance(net, nn.Module):
            raise ValueError(
                f"Compile compiles the model in a module's net, and {type(pl_module).__name__} has none: call "
                ".compile() on what is to be compiled in its configure_model, and leave the callback out"
            )
        strategy = trainer.strategy
        if isinstance(strategy, ModelParallelStrategy | FSDPStrategy):
            raise ValueError(
                f"Compile compiles the model as a whole, and {type(strategy).__name__} cuts it up: leave the callback "
                "out, and give switchkit's ExpertParallelStrategy compile: true"
            )
        if getattr(getattr(pl_module, "matching", None), "active", False):
            raise ValueError(
                "Compile does not go together with hidden_weight or attention_weight, whose layers are watched by "
                "hooks: leave the callback out"
            )
        self._net = net

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._net is not None
        rank_zero_info("Compile: the first steps wait for torch.compile, up to a minute")
        self._call = _told(torch.compile(self._net._call_impl, mode=self.mode))
        self._net._compiled_call_impl = self._call

    # Evaluation within training is short, and would be compiled on its own.

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._net is not None:
            self._net._compiled_call_impl = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._net is not None:
            self._net._compiled_call_impl = self._call

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._let_go()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self._net is not None:
            self._net._compiled_call_impl = None
        if self._call is not None:
            # Graphs hold their memory; and the next run's, of the same code, would go on from graphs of weights that
            # are gone (seen in torch 2.11: "CUDA driver error: invalid argument").
            torch.compiler.reset()
        self._net = self._call = None


def _told(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, with what a compiler says in one line."""

    def call(*inputs: Any, **named: Any) -> Any:
        # What the graphs of the last step put out may be written over now.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        try:
            return compiled(*inputs, **named)
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0][:300]
            raise ValueError(
                f"torch.compile does not work for this model on this machine ({type(error).__name__}: {reason}); it "
                "needs a C++ compiler on a CPU, and Triton and a C compiler on a GPU. Leave the callback Compile out "
                "to train without it"
            ) from error

    return call
