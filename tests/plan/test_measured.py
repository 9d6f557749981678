"""A plan against what gloo processes really hold and send: memory of each kind, bytes of each collective."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from distributed import Ranks, run, worlds
from equal import MOE, NET, VOCABULARY, Case, train
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from switchkit import GatedMlp, MoELayer, Shared, TopK
from switchkit.parallel import ExpertParallelStrategy, Layout
from switchkit.plan import PRECISIONS, Arrangement, Estimate, Gpu, Plan, Work, plan

ADAM = partial(torch.optim.AdamW, lr=1e-3)
NAMES = {
    "all_gather_into_tensor": "all_gather",
    "all_gather_single": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all",
}
"""torch renamed two of them."""


@dataclass
class Measured:
    """Bytes of one process after a step, and of the calls in it by kind, dtype and size of the group."""

    parameters: int
    gradients: int
    optimizer: int
    whole: Counter[tuple[str, torch.dtype, int]]
    sent: int
    """Rows that left for other processes."""


class Gradients(L.Callback):
    """Bytes of gradients before a step."""

    bytes = 0

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        if isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy.model.register_comm_hook(None, summed)

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        self.bytes = stored(p.grad for p in module.parameters() if p.grad is not None)
        self.optimizer, self.module = optimizer, module


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def stored(tensors: Any) -> int:
    """Bytes of the storages, each once."""
    found = {local(t).untyped_storage().data_ptr(): local(t).untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def watch(whole: Counter[tuple[str, torch.dtype, int]], rows: list[int]) -> None:
    """Count the calls of collectives in this process."""

    def counted(name: str) -> Any:
        made = getattr(dist, name)

        def call(*given: Any, **named: Any) -> Any:
            group = named.get("group")
            size = dist.get_world_size(group)
            tensors = [value for value in (*given, *named.values()) if isinstance(value, Tensor)]
            # The output of an all-gather and the input of a reduce-scatter hold all of it.
            largest = max(tensors, key=lambda tensor: tensor.numel())
            own = tensors[1] if name == "all_to_all_single" else largest
            whole[NAMES[name], own.dtype, size] += own.numel() * own.element_size()
            splits = [value for value in given if isinstance(value, list)]
            if name == "all_to_all_single" and splits:
                away = sum(splits[1]) - splits[1][dist.get_rank(group)]
                rows[0] += away * own.shape[1] * own.element_size()
            return made(*given, **named)

        return call

    for name in NAMES:
        if hasattr(dist, name):
            setattr(dist, name, counted(name))


def as_measured(rank: int, world: int, cases: dict[str, tuple[Case, Any, str]]) -> dict[str, Measured]:
    found = {}
    whole: Counter[tuple[str, torch.dtype, int]] = Counter()
    rows = [0]
    watch(whole, rows)
    for name, (case, strategy, precision) in cases.items():
        whole.clear()
        rows[0] = 0
        kept = Gradients()
        batches = [shares[rank] for shares in case.batches()]
        options = {"strategy": strategy(), "devices": world, "plugins": [Ranks(rank, world)], "precision": precision}
        train(case, batches, case.micro, [kept], **options)
        states = [v for state in kept.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        found[name] = Measured(
            stored(kept.module.parameters()),
            kept.bytes,
            sum(local(v).numel() * local(v).element_size() for v in states),
            Counter(whole),
            rows[0],
        )
    return found


def strategy(expert: int, copies: int, checkpointing: bool = False) -> Any:
    return partial(
        ExpertParallelStrategy,
        expert_parallel_size=expert,
        data_parallel_replicate=copies,
        activation_checkpointing=checkpointing,
    )


GIVEN = {"steps": 1, "padded": False, "optimizer": ADAM, "rows": 16}
TOP2 = Case(**GIVEN)
# Nothing here divides by anything: a vocabulary of 11, experts of width 23, shared ones whose stack has one entry.
SHARED = Case(
    **GIVEN,
    moe=partial(MoELayer, router=partial(TopK, k=2), experts=partial(Shared, experts=GatedMlp)),
    net=partial(NET, d_ff=23, sparse="last(1)", tied=False),
)

CASES: dict[int, dict[str, tuple[Case, tuple[int, int, bool], str]]] = {
    2: {
        "sharded": (TOP2, (1, 1, False), "32-true"),
        "experts": (SHARED, (2, 1, False), "32-true"),
        "copies": (TOP2, (1, 2, False), "32-true"),
        "half": (TOP2, (2, 1, False), "bf16-true"),
        "accumulated": (replace(TOP2, micro=2), (2, 1, False), "32-true"),
        "mixed": (TOP2, (2, 1, False), "bf16-mixed"),
    },
    4: {
        "experts": (replace(TOP2, ranks=4), (2, 1, False), "32-true"),
        "again": (replace(TOP2, ranks=4), (2, 1, True), "32-true"),
        "copies": (replace(SHARED, ranks=4), (2, 2, False), "32-true"),
        "more than experts": (replace(TOP2, ranks=4, net=partial(NET, num_experts=2)), (1, 1, False), "32-true"),
    },
}

GPU = Gpu("test", 1e12, 1e12, 1e12, 1e9, 1e8)


def planned(case: Case, precision: str, world: int, checkpointing: bool) -> Plan:
    work = Work(case.rows, 8, PRECISIONS[precision], case.micro)
    return plan(case.module().net, ADAM, work, GPU, nodes=1, gpus=world, checkpointing=checkpointing)


def arranged(found: Plan, world: int, sizes: tuple[int, int, bool]) -> Estimate:
    expert, copies, checkpointing = sizes
    wanted = Arrangement("expert_parallel", Layout(copies, world // copies, expert), checkpointing)
    (one,) = (one for one in found.fits if one.arrangement == wanted)
    return one


@pytest.fixture(scope="module", params=worlds(*CASES))
def measured(request: pytest.FixtureRequest) -> tuple[int, list[dict[str, Measured]]]:
    world = request.param
    made = {name: (case, strategy(*sizes), precision) for name, (case, sizes, precision) in CASES[world].items()}
    return world, run(world, as_measured, made)


@pytest.mark.slow
def test_memory_is_what_the_first_process_holds(measured: Any) -> None:
    """Parameters and optimizer state to the byte; gradients too, which the last micro-batch has scattered."""
    world, found = measured
    for name, (case, sizes, precision) in CASES[world].items():
        own, counted = found[0][name], arranged(planned(case, precision, world, sizes[2]), world, sizes).memory
        whole = counted.gradients - (counted.gradients - counted.parameters if case.micro > 1 else 0)
        assert (own.parameters, own.gradients, own.optimizer) == (
            counted.parameters,
            whole,
            counted.optimizer,
        ), name


@pytest.mark.slow
def test_bytes_are_those_of_the_collectives(measured: Any) -> None:
    """Gathers, scatters and sums over copies to the byte; rows to the byte too, as long as none is dropped."""
    world, found = measured
    for name, (case, sizes, precision) in CASES[world].items():
        one = arranged(planned(case, precision, world, sizes[2]), world, sizes)
        every = found[0][name].whole
        for kind in ("all_gather", "reduce_scatter", "all_reduce"):
            wanted = Counter({part.group.size: 0 for part in one.collectives})
            for part in one.collectives:
                if part.kind == kind and part.what != "counts":
                    wanted[part.group.size] += part.whole
            # What is logged is float64, and counts are integers.
            own: Counter[int] = Counter()
            for (called, dtype, size), amount in every.items():
                if called == kind and dtype in (torch.float32, torch.bfloat16) and size > 1:
                    own[size] += amount
            assert +own == +wanted, f"{name}: {kind}"
        rows = [part for part in one.collectives if part.kind == "all_to_all"]
        sent = {what: sum(part.whole for part in rows if part.what == what) for what in ("tokens", "counts")}
        floats = sum(n for (kind, dtype, _), n in every.items() if kind == "all_to_all" and dtype.is_floating_point)
        integers = sum(n for (kind, dtype, _), n in every.items() if kind == "all_to_all" and dtype == torch.int64)
        # Rows go out once by each process, and their gradients come back to it: what it takes in depends on the load.
        total = sum(
            amount
            for process in found
            for (kind, dtype, _), amount in process[name].whole.items()
            if kind == "all_to_all" and dtype.is_floating_point
        )
        assert total == world * sent["tokens"], name
        assert integers == sent["counts"], name
        assert (floats > 0) == (sizes[0] > 1)


@pytest.mark.slow
def test_rows_leave_as_an_even_load_has_it(measured: Any) -> None:
    world, found = measured
    for name, (case, sizes, precision) in CASES[world].items():
        one = arranged(planned(case, precision, world, sizes[2]), world, sizes)
        wanted = sum(part.sent for part in one.collectives if part.what == "tokens")
        mean = sum(process[name].sent for process in found) / world
        assert mean == pytest.approx(wanted, rel=0.1), name


@pytest.mark.slow
def test_the_sum_of_counts(measured: Any) -> None:
    world, found = measured
    for name, (case, sizes, precision) in CASES[world].items():
        one = arranged(planned(case, precision, world, sizes[2]), world, sizes)
        (wanted,) = (part.whole for part in one.collectives if part.what == "counts" and part.kind == "all_reduce")
        # Two numbers more are summed in a run of one step, when its callbacks close.
        assert 0 <= found[0][name].whole["all_reduce", torch.int64, world] - wanted <= 16, name


SUMMED: list[int] = []


def summed(state, bucket):  # torch takes no annotation here but its own
    SUMMED.append(bucket.buffer().numel() * bucket.buffer().element_size())
    return allreduce_hook(state, bucket)


def as_copy(rank: int, world: int, case: Case) -> tuple[Measured, int]:
    made = {"ddp": (case, DDPStrategy, "32-true")}
    return as_measured(rank, world, made)["ddp"], sum(SUMMED)


def test_ddp() -> None:
    found = planned(TOP2, "32-true", 2, False)
    (one,) = (one for one in found.fits if one.arrangement.strategy == "ddp")
    for own, bytes_summed in run(2, as_copy, TOP2):
        assert (own.parameters, own.gradients) == (one.memory.parameters, one.memory.gradients)
        assert own.optimizer == one.memory.optimizer
        (part,) = (part for part in one.collectives if part.what == "gradients")
        assert bytes_summed == part.whole == 4 * sum(p.numel() for p in TOP2.module().parameters())


def test_the_small_model_is_this_small() -> None:
    """So that the sizes above are not all nothing."""
    assert VOCABULARY == 11
    assert MOE.func is MoELayer
    assert sum(p.numel() for p in TOP2.module().parameters()) > 10_000
