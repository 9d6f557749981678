"""What the expert says about the language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from switchkit.metrics import RoutingInformation
from switchkit.models import Output
from switchkit.module import LanguageModule
from switchkit.records import Routing

__all__ = ["ExpertLanguage"]


class ExpertLanguage(L.Callback):
    """Logs the mutual information between expert and target language of each sparse layer, at each validation and test.

    As `val/language_nats/encoder.blocks.1.mlp` and so on, and `val/language_share`, the mean over the layers of its
    share of the languages' entropy: 0 when experts serve all languages alike, 1 when the expert tells the language. See
    `RoutingInformation`. The data module names its `languages`, and its batches say the `language` [B] of each sequence
    (`PairData`).

    The records are those of the evaluation itself: nothing is computed twice.

    Raises:
        ValueError: at the start, a module without sparse layers, or data without languages.

    Source: switchkit.
    """

    needs_sparse_layers = True

    def __init__(self) -> None:
        self._metric: RoutingInformation | None = None
        self._hook: RemovableHandle | None = None
        self._records: tuple[Routing, ...] = ()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, LanguageModule) or not pl_module.sparse_layers:
            raise ValueError(
                "ExpertLanguage needs a LanguageModule with sparse layers, and this model has none: leave it out"
            )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        names = getattr(getattr(trainer, "datamodule", None), "languages", None)
        if not names:
            raise ValueError("ExpertLanguage needs data with languages, as PairData; leave the callback out")
        experts = pl_module.evaluation.routing.num_experts
        metric = RoutingInformation(len(experts), max(experts), len(names))
        self._metric = metric.to(pl_module.device)
        self._hook = pl_module.net.register_forward_hook(self._keep)

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int,
                                  dataloader_idx: int = 0) -> None:  # fmt: skip
        self._records = ()

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int,
                                dataloader_idx: int = 0) -> None:  # fmt: skip
        records, self._records = self._records, ()
        if self._metric is not None:
            self._metric.update(records, _labels(batch, pl_module.sparse_layers))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(trainer, pl_module, "val")

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(trainer, pl_module, "test")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._forget()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._forget()

    def _keep(self, net: Any, inputs: Any, output: Output) -> None:
        # The first of a batch: another callback may run the model too, before this one's turn.
        self._records = self._records or output.routings

    def _log(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if self._metric is not None and not trainer.sanity_checking:
            found = self._metric.compute()
            values = {f"{stage}/language_share": found["share"].mean().float()}
            for name, nats in zip(pl_module.sparse_layers, found["nats"], strict=True):
                values[f"{stage}/language_nats/{name}"] = nats.float()
            # The metric is summed over ranks already.
            pl_module.log_dict(values, sync_dist=True)
        self._forget()

    def _forget(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._metric, self._hook, self._records = None, None, ()


def _labels(batch: Mapping[str, Tensor], layers: list[str]) -> list[Tensor]:
    """The language of each token of each layer: an encoder's are the source's."""
    rows = {side: batch["language"][:, None].expand_as(batch[side]) for side in ("source", "tokens")}
    return [rows["source" if name.startswith("encoder.") else "tokens"] for name in layers]
