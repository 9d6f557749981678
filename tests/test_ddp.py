"""``--trainer.strategy ddp``: buffers are the first process's at the start, and no process's are sent again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from distributed import Ranks, run
from equal import Case, Loader, alone, as_rank, worst
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from switchkit import Balance, MoELayer, RouterZ, Sigmoid
from switchkit.ddp import DataParallelStrategy, use_for_ddp

CASE = Case(
    moe=partial(MoELayer, router=partial(Sigmoid, k=2)),
    losses=(partial(Balance, weight=0.5, scope="global"), partial(RouterZ, weight=0.1)),
    options={"bias": True},
    micro=2,
    steps=3,
)


def biases(module: Any) -> torch.Tensor:
    return torch.stack([buffer.clone() for name, buffer in module.named_buffers() if name.endswith("bias")])


class Apart(L.Callback):
    """Looks at the biases when the second process begins, and changes its own before the second step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        self.seen.append(biases(module))
        if index == 1 and trainer.global_rank == 1:
            for name, buffer in module.named_buffers():
                if name.endswith("bias"):
                    buffer.add_(3.0)


def changed(rank: int, world: int, strategy: Any) -> list[torch.Tensor]:
    """The biases before each step of three, where the second process starts with others and changes them later."""
    module, apart = CASE.module(), Apart()
    for name, buffer in module.named_buffers():
        if name.endswith("bias"):
            buffer.fill_(float(rank + 1))
    own = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy(), plugins=[Ranks(rank, world)], callbacks=[apart],
        max_steps=3, limit_val_batches=0, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False,
    )  # fmt: skip
    batches = [shares[rank] for shares in CASE.batches()]
    own.fit(module, Loader(batches), Loader(batches[:1]))
    return apart.seen


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "sent"), [(DataParallelStrategy, False), (DDPStrategy, True)])
def test_buffers_are_taken_from_the_first_process_once(strategy: type, sent: bool) -> None:
    """Lightning's own DDP sends them before each forward pass too, which is how the test sees the difference."""
    first, second = run(2, changed, strategy)
    assert torch.equal(first[0], torch.ones_like(first[0]))
    assert torch.equal(second[0], first[0])
    assert torch.equal(first[2], first[0])
    assert torch.equal(second[2], first[0] if sent else first[0] + 3.0)


@pytest.mark.slow
def test_biases_are_equal_because_all_compute_them_from_all_counts() -> None:
    ranks, expected = run(2, as_rank, CASE, DataParallelStrategy), alone(CASE)
    for found in ranks:
        where, gap = worst(found, expected)
        assert gap < 2e-6, f"{where}: {gap:.1e}"
        names = [name for name in found.buffers if name.endswith("bias")]
        assert names
        assert all(torch.equal(found.buffers[name], ranks[0].buffers[name]) for name in names)
        assert any(found.buffers[name].any() for name in names)


@pytest.fixture
def _names_as_before() -> Iterator[None]:
    before = dict(StrategyRegistry)
    yield
    StrategyRegistry.clear()
    StrategyRegistry.update(before)


@pytest.mark.usefixtures("_names_as_before")
def test_the_names_of_lightning_mean_it() -> None:
    StrategyRegistry.register("ddp", DDPStrategy, override=True, start_method="popen")
    use_for_ddp()
    use_for_ddp()
    assert type(StrategyRegistry.get("ddp")) is DataParallelStrategy
    unused = StrategyRegistry.get("ddp_find_unused_parameters_true")
    assert type(unused) is DataParallelStrategy
    assert unused._ddp_kwargs["find_unused_parameters"] is True


def test_a_timeout_that_is_none() -> None:
    with pytest.raises(ValueError, match="timeout_seconds must be a finite number > 0; got -1"):
        DataParallelStrategy(timeout_seconds=-1)
