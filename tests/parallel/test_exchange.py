"""A layer whose experts live in several processes computes what the layer does in one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run
from equal import distance, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from switchkit import (
    Einsum,
    ExpertChoice,
    Experts,
    Factor,
    GatedMlp,
    Mixed,
    Mlp,
    MoELayer,
    Padded,
    Shared,
    Soft,
    Switch,
    TopK,
)
from switchkit.parallel import Exchange, shard_experts
from switchkit.parallel.experts import stacked

D, E, S = 8, 8, 6
LAYERS: dict[str, Any] = {
    "sorted": partial(MoELayer, router=partial(TopK, k=2)),
    "padded": partial(MoELayer, router=partial(TopK, k=2), dispatcher=Padded),
    "einsum": partial(MoELayer, router=partial(TopK, k=2), dispatcher=Einsum, capacity=partial(Factor, train=1.0)),
    "drops": partial(MoELayer, router=partial(TopK, k=2), capacity=partial(Factor, train=0.5), dropped="input"),
    "one choice": partial(MoELayer, router=Switch, capacity=partial(Factor, train=0.7), experts=GatedMlp),
    "bias": partial(MoELayer, router=partial(TopK, k=2), experts=partial(Mlp, bias=True, activation="gelu")),
    "expert choice": partial(MoELayer, router=ExpertChoice),
    "soft": partial(MoELayer, router=Soft),
    "shared": partial(MoELayer, router=partial(TopK, k=2), experts=partial(Shared, mix="gate")),
    "mixed": partial(MoELayer, router=partial(TopK, k=2), experts=partial(Mixed, widths=[[E, 5]])),
}


def layer(name: str) -> MoELayer:
    torch.manual_seed(3)
    made: MoELayer = LAYERS[name](D, E, d_ff=12)
    for parameter in made.parameters():
        parameter.data.normal_(std=0.4)
    return made.double()


def tokens(ranks: int, to_one: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences for each rank, padded unevenly; `to_one`: nearly alike, so that most
    processes get no rows."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2 * ranks, S, D, generator=generator, dtype=torch.double)
    if to_one:
        x = x[:1, :1] + 1e-3 * x
    valid = torch.arange(S) < torch.randint(1, S + 1, (2 * ranks, 1), generator=generator)
    return x, valid


def target(y: torch.Tensor, routing: Any) -> torch.Tensor:
    """Weights every output differently, and the router's own numbers too."""
    return (y.sin() * torch.arange(1, D + 1)).sum() + routing.probs[routing.valid].square().sum()


def shared_out(rank: int, world: int, to_one: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Outputs, and the gradients of the sum over processes of their targets."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("expert",))
    found = {}
    for name in LAYERS:
        own = layer(name)
        shard_experts("layer", own.experts, mesh["expert"])
        own.dispatcher = Exchange(own.dispatcher, mesh.get_group())
        x, valid = tokens(world, to_one)
        mine = x[2 * rank : 2 * rank + 2].requires_grad_()
        y, routing = own(mine, valid[2 * rank : 2 * rank + 2])
        target(y, routing).backward()
        result = {"y": y.detach(), "x": mine.grad, "rows": routing.load.sum()}
        for key, parameter in own.named_parameters():
            gradient = parameter.grad
            assert gradient is not None, key
            if hasattr(gradient, "full_tensor"):
                # Means over the processes, as parameters that all hold have: times their number, the sums.
                result[key] = whole(gradient) * world
            else:
                dist.all_reduce(gradient)
                result[key] = gradient
        found[name] = result
    return found


def in_one_place(name: str, world: int, to_one: bool) -> dict[str, torch.Tensor]:
    own = layer(name)
    x, valid = tokens(world, to_one)
    x.requires_grad_()
    y, routing = own(x, valid)
    target(y, routing).backward()
    return {"y": y.detach(), "x": x.grad, **{key: p.grad for key, p in own.named_parameters()}}


@pytest.mark.daily("2-False")
@pytest.mark.parametrize(("world", "to_one"), [(2, False), (4, False), (4, True)])
def test_exchanged_layers_equal_whole_ones(world: int, to_one: bool) -> None:
    ranks = run(world, shared_out, to_one)
    for name in LAYERS:
        expected = in_one_place(name, world, to_one)
        for rank, found in enumerate(one[name] for one in ranks):
            assert found["rows"] > 0
            assert found.keys() - {"rows"} == expected.keys()
            for key, value in expected.items():
                part = value[2 * rank : 2 * rank + 2] if key in ("x", "y") else value
                assert distance(found[key], part) < 1e-12, f"{name}, rank {rank}: {key}"


class Heads(Experts):
    """One matrix for all experts: nothing to share out."""

    def __init__(self, d_model: int, d_ff: int, num_experts: int) -> None:
        super().__init__(d_model, d_ff, num_experts)
        self.weight = torch.nn.Parameter(torch.zeros(d_model, d_model))


def refused(rank: int, world: int) -> list[str]:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("expert",))
    told = []
    for experts in (Heads(4, 8, 6), Mlp(4, 8, 5), Mixed(4, 8, 6)):
        try:
            shard_experts("blocks.1.mlp", experts, mesh)
        except ValueError as error:
            told.append(str(error))
    return told


def test_experts_that_cannot_be_shared_out_are_refused() -> None:
    heads, odd, mixed = run(2, refused)[1]
    assert "blocks.1.mlp.experts.weight is [4, 4], where expert parallelism needs weights stacked as [6, ...]" in heads
    assert "the 5 experts of blocks.1.mlp cannot be shared out over expert_parallel_size=2 processes: use 1 or 5" in odd
    assert "stacks.0.w1 is [3, 4, 4]" in mixed


class Beside(Mlp):
    """An always-on matrix on the module of the stacked weights."""

    def __init__(self, d_model: int, d_ff: int, num_experts: int) -> None:
        super().__init__(d_model, d_ff, num_experts)
        self.every = nn.Parameter(torch.eye(d_model))

    def always(self, x: Tensor) -> Tensor:
        return x @ self.every

    def always_parameters(self) -> Iterator[nn.Parameter]:
        yield self.every


def test_what_every_token_meets_is_no_part_of_what_is_shared_out() -> None:
    with pytest.raises(ValueError, match=r"blocks.0.mlp.experts holds every, .*: put it into a child module"):
        stacked("blocks.0.mlp", Beside(4, 8, 2))
    assert [type(part) for part in stacked("blocks.0.mlp", Mlp(4, 8, 2))] == [Mlp]
