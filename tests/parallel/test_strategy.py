"""The strategy's edges: what it starts from, when gradients travel, half precision, what it refuses."""

from __future__ import annotations

import math
import shutil
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from distributed import RankError, Ranks, run
from equal import MOE, Case, Loader, alone, as_rank, whole, worst
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import StrategyRegistry

import switchkit.parallel
import switchkit.strategies
from switchkit import Balance, Dropless, ExpertChoice, Factor, MoELayer, TopK
from switchkit.parallel import ExpertParallelStrategy
from switchkit.step import warn_of_groups
from switchkit.strategies import ExpertParallelStrategy as Same

TWO = partial(ExpertParallelStrategy, expert_parallel_size=2)


class Travel(L.Callback):
    """After each backward pass: whether sharded gradients are there, which are what the devices have summed."""

    def __init__(self) -> None:
        self.there: list[set[bool]] = []

    def on_after_backward(self, trainer: L.Trainer, module: Any) -> None:
        self.there.append({p.grad is not None for p in module.parameters()})


class Start(L.Callback):
    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.weights = {name: whole(p) for name, p in module.named_parameters()}


def observed(rank: int, world: int, case: Case) -> dict[str, Any]:
    module = case.module()
    if rank:
        for parameter in module.parameters():
            parameter.data.fill_(9.0)
    first = {name: p.detach().clone() for name, p in module.named_parameters()}
    travel, start = Travel(), Start()
    own = L.Trainer(
        accelerator="cpu", strategy=TWO(), devices=world, plugins=[Ranks(rank, world)], callbacks=[travel, start],
        max_steps=case.steps, accumulate_grad_batches=case.micro, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    batches = [shares[rank] for shares in case.batches()]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        own.fit(module, Loader(batches), Loader(batches[:1]))
    local = {name: list(p.to_local().shape) for name, p in module.named_parameters()}
    return {
        "first": first,
        "started": start.weights,
        "there": travel.there,
        "local": local,
        "told": [str(warning.message) for warning in told],
    }


def test_all_start_from_the_first_and_gradients_travel_once_a_step() -> None:
    case = Case(micro=3, steps=2, moe=partial(MOE, group="batch", capacity=partial(Factor, train=1.0)))
    case = replace(case, net=partial(case.net, allow_leak=True))
    first, second = run(2, observed, case)
    for found in (first, second):
        assert found["there"] == [{False}, {False}, {True}] * 2
        for name, value in first["first"].items():
            assert torch.equal(found["started"][name], value)
        # Half of the experts each, and half of everything else.
        assert found["local"]["net.blocks.0.mlp.experts.w1"] == [4, 16, 24]
        assert found["local"]["net.blocks.0.attention.qkv.weight"] == [24, 16]
    assert any("group='batch' decides over the batch of each device" in line for line in first["told"])


NUMBER = (
    "group=6 decides over the batch of each device: 2 devices choose or drop otherwise than one would, unless the "
    "number divides the tokens of that batch. group='sequence' does not depend on the devices"
)


@pytest.mark.parametrize(
    ("router", "capacity", "warns"),
    [(TopK, Dropless, False), (TopK, Factor, True), (ExpertChoice, Dropless, True)],
)
def test_who_is_dropped_may_depend_on_the_devices(router: type, capacity: type, warns: bool) -> None:
    """Experts that choose among the tokens of a batch choose others on each device, whatever the policy says."""
    layer = MoELayer(8, 4, d_ff=16, router=router, capacity=capacity, group="batch")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warn_of_groups(layer, 2)
        assert bool(told) == warns
        told.clear()
        warn_of_groups(layer, 1)
        assert not told
        layer.group = 6
        warn_of_groups(layer, 2)
        assert [str(line.message) for line in told] == warns * [NUMBER]


def half(rank: int, world: int, case: Case, precision: str) -> list[dict[str, float]]:
    from equal import train

    batches = [shares[rank] for shares in case.batches()]
    return train(
        case, batches, 1, strategy=TWO(), devices=world, plugins=[Ranks(rank, world)], precision=precision
    ).losses


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_is_near_full_precision(precision: str) -> None:
    case = Case()
    full = run(2, as_rank, case, TWO)[0].losses
    for rows in run(2, half, case, precision):
        for mine, theirs in zip(rows, full, strict=True):
            assert math.isclose(mine["train/loss"], theirs["train/loss"], rel_tol=0.05)
            assert mine["train/loss"] != theirs["train/loss"]


def compiled(rank: int, world: int, backend: str, case: Case, layouts: list[dict[str, Any]]) -> list[tuple[Any, int]]:
    """What each layout's training did, and how many graphs were made for it."""
    from torch._dynamo.utils import counters

    real = torch.compile
    torch.compile = partial(real, backend=backend)  # type: ignore[assignment]
    found = []
    for options in layouts:
        torch.compiler.reset()
        counters.clear()
        done = as_rank(rank, world, case, partial(ExpertParallelStrategy, compile=True, **options))
        found.append((done, counters["stats"]["unique_graphs"]))
    return found


COMPILED = Case(losses=(partial(Balance, weight=0.5, scope="global"),), clip=0.05)
COMPILED = replace(COMPILED, net=partial(COMPILED.net, num_layers=6, sparse="every(2)"))


@pytest.mark.slow
def test_compiled_blocks_have_the_same_gradients() -> None:
    """A dense block makes one graph, a sparse one two, before and after what travels; blocks of a kind share them."""
    two = {"expert_parallel_size": 2}
    layouts = [two, {**two, "activation_checkpointing": True}, {}]
    expected = alone(COMPILED)
    for rank in run(2, compiled, "aot_eager", COMPILED, layouts):
        for (found, graphs), wanted in zip(rank, (3, 3, 2), strict=True):
            where, gap = worst(found, expected)
            assert gap < 2e-6, f"{where}: {gap:.1e}"
            assert graphs == wanted


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    case = replace(COMPILED, net=partial(COMPILED.net, num_layers=1, sparse="every(1)"))
    expected = alone(case)
    for ((found, graphs),) in run(2, compiled, "inductor", case, [{"expert_parallel_size": 2}]):
        where, gap = worst(found, expected)
        assert gap < 2e-6, f"{where}: {gap:.1e}"
        assert graphs == 2


def test_experts_that_do_not_divide_end_every_rank_with_the_reason() -> None:
    case = Case()
    case = replace(case, net=partial(case.net, num_experts=7))
    with pytest.raises(RankError, match="the 7 experts of net.blocks.0.mlp cannot be shared out .* use 1 or 7"):
        run(2, as_rank, case, TWO)


def test_an_optimizer_of_whole_parameters_ends_every_rank_with_the_reason() -> None:
    """Should torch learn it, the second half fails, and the refusal can go."""
    with pytest.raises(RankError, match="Adafactor of torch cannot step on parameters of which each device has a part"):
        run(2, as_rank, Case(optimizer=torch.optim.Adafactor), TWO)
    with pytest.raises(RankError, match="in-place operations that require placement changes"):
        run(2, unchecked, Case(optimizer=torch.optim.Adafactor))


def refused(rank: int, world: int, case: Case) -> list[str]:
    """What is said of callbacks that copy the model, and of a share of five rows in batches of one."""
    ends = []
    for kind in (partial(EMAWeightAveraging, decay=0.9), partial(StochasticWeightAveraging, 0.01), None):
        own = L.Trainer(
            accelerator="cpu", strategy=ExpertParallelStrategy(timeout_seconds=15), devices=world,
            plugins=[Ranks(rank, world)], callbacks=[kind()] if kind else [], max_epochs=2, logger=False,
            enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        )  # fmt: skip
        rows = [{name: x[0] for name, x in batch[0].items()} for batch in case.batches()]
        loader = torch.utils.data.DataLoader(rows, batch_size=1)  # type: ignore[arg-type]
        try:
            own.fit(case.module(), loader) if kind else own.predict(case.module(), loader)
        except ValueError as error:
            ends.append(str(error))
    return ends


@pytest.mark.slow
def test_copies_of_the_model_and_uneven_predictions_end_every_rank_with_the_reason() -> None:
    ranks = run(2, refused, Case(steps=5))
    assert ranks[0] == ranks[1]
    ema, swa, predict = ranks[0]
    assert ema.startswith("EMAWeightAveraging keeps a copy of the whole model, of which each device has a part")
    assert swa.startswith("StochasticWeightAveraging keeps a copy of the whole model")
    assert predict.startswith(
        "predict needs as many batches on every device, as all compute each block together; got 3, 2"
    )


def unchecked(rank: int, world: int, case: Case) -> None:
    switchkit.strategies.why_whole = lambda optimizer: None
    as_rank(rank, world, case, TWO)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"expert_parallel_size": 0}, "expert_parallel_size must be at least 1; got 0"),
        ({"data_parallel_replicate": -1}, "data_parallel_replicate must be at least 1; got -1"),
        ({"timeout_seconds": 0.0}, "timeout_seconds must be a finite number > 0; got 0"),
    ],
)
def test_bad_options(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ExpertParallelStrategy(**arguments)


def test_names() -> None:
    assert switchkit.parallel.ExpertParallelStrategy is Same
    assert isinstance(StrategyRegistry.get("expert_parallel"), Same)
    assert StrategyRegistry.get("expert_parallel_4").expert_parallel_size == 4
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = switchkit.parallel.Nothing
