"""A layer and its inputs, small enough for loops, and what is looked at when it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from switchkit.capacity.base import CapacityPolicy
from switchkit.dispatch.base import Dispatcher
from switchkit.experts.base import Experts
from switchkit.layers import MoELayer
from switchkit.losses.balance import Balance
from switchkit.losses.router_z import RouterZ
from switchkit.records import Routing
from switchkit.registry import named
from switchkit.routing.base import Router
from switchkit.testing.expect import expect

__all__ = [
    "EXACT",
    "TIGHT",
    "Case",
    "collapsed",
    "gradients",
    "learned",
    "make_equal",
    "measured",
    "objective",
    "results",
    "run",
    "seeded",
    "takes",
]

T = TypeVar("T")

# Capacities that drop some of the tokens below; a policy not named here is used as it comes.
TIGHT: dict[str, dict[str, Any]] = {
    "factor": {"train": 0.5, "eval": 0.5},
    "fixed": {"train": 1, "eval": 1},
    "no_token_left_behind": {"train": 0.5, "eval": 0.5, "rounds": 2},
}
EXACT = 1e-10
"""For float64: rounding stays below 1e-14 here, the smallest planted fault is 1e-6."""


def seeded(number: int) -> None:
    """`torch.manual_seed`, which formats a stack trace for each of three kinds of GPU that are not there."""
    if torch.accelerator.is_available():
        torch.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)


@dataclass(frozen=True)
class Case:
    """A layer and its inputs: 3 sequences of 7 tokens, two of them with padding. A part is a name or a class."""

    router: str | type[Router] = "top_k"
    k: int | None = None
    capacity: str | type[CapacityPolicy] = "factor"
    dispatcher: str | type[Dispatcher] = "sorted"
    experts: str | type[Experts] = "mlp"
    group: Any = "sequence"
    dropped: Any = "zero"
    options: tuple[tuple[str, Any], ...] = ()
    """Further options of the router."""
    capacity_options: tuple[tuple[str, Any], ...] | None = None
    expert_options: tuple[tuple[str, Any], ...] = ()
    training: bool = False
    num_experts: int = 4
    d_model: int = 6
    d_ff: int = 5
    shape: tuple[int, int] = (3, 7)
    seed: int = 0
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    subject: str | None = None
    """The part that a failure is about; None: the whole case."""

    def __str__(self) -> str:
        router = _name(self.router)
        parts = [router if self.k is None else f"{router}{self.k}", _name(self.capacity), _name(self.dispatcher)]
        parts += [_name(self.experts)] * (self.experts != "mlp")
        parts += [f"group={self.group}"] * (self.group != "sequence")
        given = (*self.options, *(self.capacity_options or ()), *self.expert_options)
        parts += [f"{name}={value}" for name, value in given]
        parts += [f"dropped={self.dropped}"] * (self.dropped != "zero")
        return "-".join(parts + ["training"] * self.training)

    @property
    def router_class(self) -> type[Router]:
        return _class(self.router, Router)

    def layer(self, *, training: bool | None = None) -> MoELayer:
        seeded(self.seed)
        k = {} if self.k is None else {"k": self.k}
        given = self.capacity_options
        options = TIGHT.get(_name(self.capacity), {}) if given is None else dict(given)
        layer = MoELayer(
            self.d_model,
            self.num_experts,
            d_ff=self.d_ff,
            router=partial(self.router_class, **k, **dict(self.options)),
            capacity=partial(_class(self.capacity, CapacityPolicy), **options),
            experts=partial(_class(self.experts, Experts), **dict(self.expert_options)),
            dispatcher=_class(self.dispatcher, Dispatcher),
            group=self.group,
            dropped=self.dropped,
        )
        # Again, for releases of torch differ in how many numbers a truncated normal takes.
        seeded(self.seed)
        for name, parameter in layer.named_parameters():
            # Biases start at zero and routers small: move both to where they matter.
            if name.rpartition(".")[2].startswith("b") or name.startswith("router"):
                nn.init.normal_(parameter)
        return layer.to(self.device, self.dtype).train(self.training if training is None else training)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, which of them are real (padding right in the second sequence, left in the third), ids."""
        seeded(self.seed + 1)
        batch, length = self.shape
        x = torch.randn(batch, length, self.d_model, dtype=torch.float64)
        valid = torch.ones(batch, length, dtype=torch.bool)
        if batch > 1:
            valid[1, length - length // 3 :] = False
        if batch > 2:
            valid[2, : length // 2] = False
        ids = torch.randint(0, 50, (batch, length))
        return x.to(self.device, self.dtype), valid.to(self.device), ids.to(self.device)


def _class(part: str | type[T], base: type[T]) -> type[T]:
    return named(base)[part] if isinstance(part, str) else part


def _name(part: str | type) -> str:
    return part if isinstance(part, str) else part.__name__


def run(layer: Any, x: Tensor, valid: Tensor | None = None, ids: Tensor | None = None) -> tuple[Tensor, Routing]:
    """The layer with the same random numbers every time."""
    seeded(0)
    if ids is None:
        ids = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
    found: tuple[Tensor, Routing] = layer(x, valid, ids)
    return found


def objective(y: Tensor, balance: Tensor, z: Tensor, valid: Tensor) -> Tensor:
    """A loss of everything that a layer gives: every output weighs differently."""
    probe = torch.sin(torch.arange(y.numel(), device=y.device, dtype=y.dtype)).view_as(y)
    return (y * probe * valid.unsqueeze(-1)).sum() + 0.3 * balance + 0.2 * z


def make_equal(experts: Experts) -> None:
    """The weights of the first expert in all; a single number is one that they share already."""
    with torch.no_grad():
        for parameter in experts.parameters():
            if parameter.dim():
                parameter.copy_(parameter[:1].expand_as(parameter))


def learned(part: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, without frozen ones."""
    return {name: parameter for name, parameter in part.named_parameters() if parameter.requires_grad}


def gradients(loss: Tensor, **wanted: Tensor) -> dict[str, Tensor]:
    """The gradient of each tensor; one that is not reached is an error."""
    return _gradients(loss, wanted, again=True)


def _gradients(loss: Tensor, wanted: Mapping[str, Tensor], *, again: bool) -> dict[str, Tensor]:
    """As `gradients`; not `again`: the graph is used up."""
    if not wanted:
        return {}
    found = torch.autograd.grad(loss, tuple(wanted.values()), allow_unused=True, retain_graph=again)
    missing = [name for name, grad in zip(wanted, found, strict=True) if grad is None]
    expect(not missing, f"no gradient reaches {', '.join(missing)}")
    return dict(zip(wanted, found, strict=True))


def results(
    layer: MoELayer, x: Tensor, valid: Tensor, ids: Tensor, call: Callable[..., Any] | None = None
) -> dict[str, Tensor]:
    """Outputs at real tokens, losses, and the gradient of everything."""
    x = x.detach().requires_grad_()
    y, routing = run(layer if call is None else call, x, valid, ids)
    # A compiled backward pass may write into what it was given, and so refuses to be kept for a second one.
    return measured(layer, x, y, Balance()([routing]), RouterZ()([routing]), valid, again=False)


def measured(
    layer: nn.Module,
    x: Tensor,
    y: Tensor,
    balance: Tensor,
    z: Tensor,
    valid: Tensor,
    scale: float = 1.0,
    *,
    again: bool = True,
) -> dict[str, Tensor]:
    """`results` of outputs and losses that are known already."""
    values = {"y": y * valid.unsqueeze(-1), "balance loss": balance, "z-loss": z}
    loss = scale * objective(y, balance, z, valid)
    grads = _gradients(loss, {"x": x, **learned(layer)}, again=again)
    return {**values, **{f"gradient of {name}": grad for name, grad in grads.items()}}


def collapsed(expert: int, *, k: int = 1, num_experts: int = 4, tokens: int = 6, dtype: Any = torch.float64) -> Routing:
    """A record where every token chose `expert` and the k - 1 after it, with certainty."""
    chosen = (expert + torch.arange(k)) % num_experts
    logits = torch.full((1, tokens, num_experts), -1e4, dtype=dtype)
    logits[..., chosen] = 0
    assignments = tokens * k
    routing = Routing(
        logits=logits,
        probs=logits.softmax(-1),
        token=torch.arange(tokens).repeat_interleave(k).unsqueeze(0),
        expert=chosen.repeat(tokens).unsqueeze(0),
        weight=torch.full((1, assignments), 1 / k, dtype=dtype),
        chosen=torch.ones(1, assignments, dtype=torch.bool),
        valid=torch.ones(1, tokens, dtype=torch.bool),
        batch=1,
        k=k,
    )
    return CapacityPolicy().place(routing, None, training=True)


def takes(cls: type, option: str) -> bool:
    """True where a part's constructor has this option."""
    return option in inspect.signature(cls).parameters
