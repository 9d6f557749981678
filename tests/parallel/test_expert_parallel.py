"""FSDP2 and expert parallelism do what one process does on all of the data, in every layout."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run, worlds
from equal import MOE, NET, Case, Observed, alone, as_rank, as_ranks, differences, one_by_one, worst

from switchkit import Balance, ExpertChoice, Factor, GatedMlp, MoELayer, RouterZ, Shared, Sigmoid
from switchkit.parallel import ExpertParallelStrategy, exchange, experts, norm

GLOBAL = (partial(Balance, weight=0.5, scope="global"), partial(RouterZ, weight=0.1))
DROPS = partial(MOE, capacity=partial(Factor, train=0.5))
Z = [partial(RouterZ, weight=0.1)]


def cases(ranks: int) -> dict[str, Case]:
    return {
        "dropless": Case(losses=GLOBAL, ranks=ranks, clip=0.05, steps=3),
        "drops": Case(losses=GLOBAL, ranks=ranks, moe=DROPS, micro=2, clip=0.05),
        "expert choice": Case(
            losses=Z,
            ranks=ranks,
            moe=partial(MoELayer, router=ExpertChoice),
            # A sequence that begins with the same token twice would have a tie without positions in its values.
            net=partial(NET, allow_leak=True, positions="learned"),
        ),
        "bias": Case(
            losses=GLOBAL,
            ranks=ranks,
            moe=partial(MoELayer, router=partial(Sigmoid, k=2), experts=partial(Shared, experts=GatedMlp, mix="gate")),
            options={"bias": True},
            micro=2,
        ),
        # Stacks of fewer entries than there are devices are cut along another dimension.
        "few experts": Case(losses=GLOBAL, ranks=ranks, net=partial(NET, num_experts=2), moe=partial(MOE), clip=0.05),
        "micro": Case(losses=(partial(Balance, weight=0.5), *Z), ranks=ranks, micro=2),
        "learned positions, attention": Case(
            losses=GLOBAL, ranks=ranks, net=partial(NET, positions="learned", sparse_attention=[1], tied=False)
        ),
    }


def layouts(ranks: int) -> dict[str, Any]:
    sizes = {2: [(1, 1), (2, 1), (1, 2)], 4: [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]}[ranks]
    return {
        f"expert {expert}, copies {copies}": partial(
            ExpertParallelStrategy, expert_parallel_size=expert, data_parallel_replicate=copies
        )
        for expert, copies in sizes
    }


def chosen(ranks: int) -> dict[str, tuple[Case, Any]]:
    """Every layout with drops and accumulation, and every case in the layout that mixes most."""
    every = cases(ranks)
    found = {f"drops; {name}": (every["drops"], made) for name, made in layouts(ranks).items()}
    most = list(layouts(ranks))[1]
    found |= {f"{name}; {most}": (case, layouts(ranks)[most]) for name, case in every.items()}
    again = partial(layouts(ranks)[most], activation_checkpointing=True)
    return found | {f"drops; {most}, recomputed": (every["drops"], again)}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", worlds(2, 4))
def test_every_layout_equals_one_process(ranks: int) -> None:
    """Losses, every clipped gradient, the norm that is logged, parameters and biases after all steps."""
    found = run(ranks, as_ranks, chosen(ranks))
    references: dict[str, Observed] = {}
    gaps = {}
    for label, (case, _) in chosen(ranks).items():
        name = label.partition(";")[0]
        if name not in references:
            references[name] = one_by_one(case) if name == "micro" else alone(case)
        for rank in found:
            gaps[label] = max(
                gaps.get(label, ("", 0.0)), worst(rank[label], references[name]), key=lambda pair: pair[1]
            )
    for label, (where, gap) in gaps.items():
        assert gap < 2e-6, f"{label}: {where} differs by {gap:.1e}"


def lost_gradient() -> None:
    """Tokens get no gradient from experts in other processes (st-moe-pytorch slices where it should reduce)."""

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        whole = exchange._all_to_all(grad, ctx.arrived, ctx.sent, ctx.group)
        parts = list(whole.split(list(ctx.sent)))
        own = dist.get_rank(ctx.group)
        return torch.cat([p if i == own else torch.zeros_like(p) for i, p in enumerate(parts)]), None, None, None

    exchange._AllToAll.backward = staticmethod(backward)  # type: ignore[method-assign]


def unscaled_experts() -> None:
    """The gradients of experts are as many times too large as processes share them."""
    experts._Scaled.backward = staticmethod(lambda ctx, grad: (grad, None))  # type: ignore[method-assign]


def averaged_norm() -> None:
    """The squares of the shards are averaged over processes and not added up."""
    norm._copies = lambda grad: dist.get_world_size()


def own_norm() -> None:
    """Each process clips by the norm of what it holds itself."""
    norm.dist.all_reduce = lambda squares: squares  # type: ignore[attr-defined]


FAULTS = {fault.__name__: fault for fault in (lost_gradient, unscaled_experts, averaged_norm, own_norm)}


def faulty(rank: int, world: int, case: Case, fault: str) -> Observed:
    all_reduce = dist.all_reduce
    FAULTS[fault]()
    if fault == "own_norm":
        # Only the norm is of one process; counts and logged values are summed as ever.
        def only_others(x: torch.Tensor, *rest: Any, **more: Any) -> Any:
            return x if x.dim() == 0 and x.dtype == torch.float64 else all_reduce(x, *rest, **more)

        dist.all_reduce = only_others
    return as_rank(rank, world, case, partial(ExpertParallelStrategy, expert_parallel_size=2))


@pytest.mark.daily("lost_gradient")
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_leave_the_loss_alone_are_seen(fault: str) -> None:
    clip = 0.05 if "norm" in fault else None
    case = Case(losses=GLOBAL, steps=1, clip=clip)
    expected = alone(case)
    gaps = differences(run(2, faulty, case, fault)[0], expected)
    assert max(gap for name, gap in gaps.items() if name.endswith(("train/loss", "train/cross_entropy"))) < 1e-6
    assert max(gap for name, gap in gaps.items() if name.startswith("gradient")) > 1e-2
