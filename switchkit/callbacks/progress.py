"""The progress bar of training."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from switchkit.checks import at_least
from switchkit.metrics.routing import RoutingMetrics, imbalance_of
from switchkit.optim import last_step

__all__ = ["TrainingBar"]

REDRAWN = 2
"""Times a second: drawing takes milliseconds of a core, and of Python's lock, that steps wait for."""

_Handler: TypeAlias = "logging.StreamHandler[Any]"


class TrainingBar(ProgressBar):
    """One rich bar over the whole training, and below it what matters for a sparse language model.

    Training loss, validation bits per token, tokens per second (padding counted, validation not), worst load imbalance
    (largest over mean load of any sparse layer) and share of dropped assignments. Values are read every `refresh_rate`
    steps, so that nothing waits for the device in between. Where the output is no terminal, one line per validation
    instead. Of other modules and data it shows what they have of it.

    Args:
        refresh_rate: optimizer steps between two updates.

    Raises:
        ValueError: refresh_rate below 1.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__()
        at_least(1, refresh_rate=refresh_rate)
        self.refresh_rate = refresh_rate
        self._console = Console(emoji=False)
        self._bar: Progress | None = None
        self._above: list[tuple[_Handler, Any]] = []
        self._shown: dict[str, str] = {}
        self._enabled = True
        self._tokens, self._seconds, self._moment = 0, 0.0, 0.0

    def __getstate__(self) -> dict[str, Any]:
        # Callbacks that average weights copy the model, and with it the whole Trainer; a console holds a lock.
        return {name: value for name, value in vars(self).items() if name not in ("_console", "_bar", "_above")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _console=Console(emoji=False), _bar=None, _above=[])

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tokens, self._seconds, self._moment, self._shown = 0, 0.0, time.perf_counter(), {}
        steps = last_step(trainer)
        self._open("training", None if steps == math.inf else int(steps), trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, Mapping) and "tokens" in batch:
            self._tokens += batch["tokens"].numel() * trainer.world_size
        if trainer.global_step % self.refresh_rate and trainer.global_step != trainer.max_steps:
            return
        now = time.perf_counter()
        self._seconds += now - self._moment
        self._moment = now
        found = outputs if isinstance(outputs, Mapping) else {}
        if found.get("loss") is not None:
            # Lightning has divided what is minimised among the batches of a step.
            loss = found.get("own_loss", found["loss"] * trainer.accumulate_grad_batches)
            self._shown["loss"] = f"{float(loss):.3f}"
        if self._tokens:
            self._shown["tokens/s"] = f"{self._tokens / self._seconds:,.0f}"
        if found.get("stats") is not None and found["stats"]["load"].numel():
            self._shown |= _routing(found["stats"], _experts(pl_module, found["stats"]["load"]))
        self._update(trainer.global_step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._tokens and trainer.state.fn == "fit":
            self._seconds += time.perf_counter() - self._moment
        if trainer.state.fn != "fit":
            self._evaluate(trainer.num_val_batches)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluate(trainer.num_test_batches)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluate(trainer.num_predict_batches)

    def _evaluate(self, batches: Sequence[int | float]) -> None:
        """`batches`: of each loader; infinity where it has no length."""
        total = sum(batches)
        self._open("evaluating", None if math.isinf(total) else int(total))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._moment = time.perf_counter()
        bits = trainer.callback_metrics.get("val/bits")
        if trainer.sanity_checking or bits is None:
            return
        # The loss first, then the bits, then whatever else the bar showed.
        self._shown = {"loss": "-", "val bits": "", **self._shown} | {"val bits": f"{float(bits):.3f}"}
        if trainer.state.fn == "fit" and self._enabled and not self._console.is_interactive:
            values = "  ".join(f"{name} {value}" for name, value in self._shown.items())
            self._console.print(f"step {trainer.global_step:>6}  {values}", highlight=False, soft_wrap=True)
        self._update(trainer.global_step)

    def _evaluated(self, trainer: L.Trainer, batch_idx: int) -> None:
        if trainer.state.fn != "fit":
            self._update(batch_idx + 1)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int,
                                dataloader_idx: int = 0) -> None:  # fmt: skip
        self._evaluated(trainer, batch_idx)

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _open(self, what: str, total: int | None, done: int = 0) -> None:
        self._close()
        if not (self._enabled and self._console.is_interactive):
            return
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
                   TextColumn("<"), TimeRemainingColumn())  # fmt: skip
        self._bar = _TwoLines(*columns, console=self._console, transient=True, refresh_per_second=REDRAWN)
        errors = sys.stderr
        self._bar.start()
        self._above = _redirected(errors, sys.stderr)
        self._bar.add_task(what, total=total, completed=done, values="")

    def _update(self, done: int) -> None:
        if self._bar is not None:
            values = "  ".join(f"{name} [bold]{value}[/]" for name, value in self._shown.items())
            self._bar.update(self._bar.task_ids[0], completed=done, values=values)

    def _close(self) -> None:
        if self._bar is not None:
            for handler, stream in self._above:
                handler.setStream(stream)
            self._bar.stop()
            self._bar, self._above = None, []


def _redirected(before: Any, now: Any) -> list[tuple[_Handler, Any]]:
    """Let what loggers write to a terminal's errors go where rich prints above the bar; their streams until then.

    rich redirects `sys.stderr`, but a handler holds the stream of the time when it was made (Lightning's, at import),
    and its lines would run into the bar, and leave it standing.
    """
    named = [logger for logger in logging.Logger.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    found = []
    for handler in {handler for logger in (logging.root, *named) for handler in logger.handlers}:
        if isinstance(handler, logging.StreamHandler) and handler.stream in (before, sys.__stderr__):
            found.append((handler, handler.stream))
            handler.setStream(now)
    return found


class _TwoLines(Progress):
    """The values below the bar: beside it, the narrow terminal of every day would cut the step off."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["values"]:
                yield Text.from_markup(task.fields["values"], overflow="ellipsis")


def _experts(module: L.LightningModule, load: Tensor) -> list[int]:
    """Of each layer of `load` [L, E]; those of a module that does not say have E each."""
    metrics = getattr(module, "train_routing", None)
    return metrics.num_experts if isinstance(metrics, RoutingMetrics) else [load.shape[1]] * load.shape[0]


def _routing(stats: dict[str, Tensor], num_experts: Sequence[int]) -> dict[str, str]:
    load = stats["load"]
    worst = imbalance_of(load, num_experts).max()
    dropped = (stats["dropped"] / load.sum(-1).clamp(min=1)).mean()
    imbalance, share = torch.stack([worst, dropped]).tolist()
    return {"imbalance": f"{imbalance:.2f}", "dropped": f"{100 * share:.1f}%"}
