"""The sparse layer, and the dense one that it replaces."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from switchkit.capacity.base import CapacityFactory, CapacityPolicy, placed_by
from switchkit.capacity.policies import Dropless
from switchkit.checks import one_of, whole
from switchkit.dispatch.base import Dispatcher, DispatcherFactory, sum_choices
from switchkit.dispatch.sorted import Sorted
from switchkit.experts.base import ACTIVATIONS, Activation, Experts, ExpertsFactory, check, init_linear
from switchkit.experts.feed_forward import Mlp
from switchkit.records import Routing, undropped_weights
from switchkit.registry import named
from switchkit.routing.base import Router, RouterFactory, full_precision
from switchkit.routing.token_choice import Switch
from switchkit.shown import options

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

__all__ = ["FeedForward", "FeedForwardFactory", "MoEFactory", "MoELayer", "moe_layers"]


class MoELayer(nn.Module):
    """A mixture of experts in place of a feed-forward layer.

    The parts are factories, each called once with the sizes: a class, a `functools.partial` or a YAML part. Defaults:
    `switch` router, `dropless` capacity, `mlp` experts, `sorted` dispatcher.

    Args:
        d_model: width of a token.
        num_experts: experts of this layer.
        d_ff: hidden width of an expert.
        router: builds the router, see `switchkit list routers`.
        capacity: builds the capacity policy, see `switchkit list capacity`.
        experts: builds the experts, see `switchkit list experts`.
        dispatcher: builds the dispatcher, see `switchkit list dispatchers`.
        group: tokens that share an expert's capacity: "sequence" (independent of the batch, and causal), "batch", or a
            number of consecutive tokens.
        dropped: what a dropped assignment contributes: "zero", so that only the residual remains; "input", the token
            itself where none of its assignments was kept; "weighted_input", the token times the weight that the
            assignment has where nothing is dropped (labml).
        granularity: pieces that each expert is cut into: the layer then has ``num_experts * granularity`` experts of
            width ``d_ff / granularity`` (fine-grained segmentation, arXiv 2401.06066, section 3.1). The parameters stay
            as many; so do the operations when the router's k grows by the same factor.

    Raises:
        ValueError: an option that is not one of those above, a part or its name in place of what builds it, a router
            whose k is no integer, a capacity that says who is served with a router whose experts choose.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        d_ff: int,
        router: RouterFactory | None = None,
        capacity: CapacityFactory | None = None,
        experts: ExpertsFactory | None = None,
        dispatcher: DispatcherFactory | None = None,
        group: Literal["sequence", "batch"] | int = "sequence",
        dropped: Literal["zero", "input", "weighted_input"] = "zero",
        granularity: int = 1,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "num_experts": num_experts, "d_ff": d_ff, "granularity": granularity}
        for name, size in sizes.items():
            whole(name, size)
        if granularity < 1 or d_ff % granularity:
            raise ValueError(f"granularity must be at least 1 and divide d_ff={d_ff}; got {granularity}")
        num_experts, d_ff = num_experts * granularity, d_ff // granularity
        if group not in ("sequence", "batch") and not (isinstance(group, int) and group >= 1):
            raise ValueError(f"group must be 'sequence', 'batch' or a number of tokens >= 1; got {group!r}")
        one_of("dropped", dropped, ("zero", "input", "weighted_input"))
        self.d_model, self.num_experts, self.d_ff = d_model, num_experts, d_ff
        self.group, self.dropped = group, dropped
        for what, factory, base in (
            ("router", router, Router),
            ("capacity", capacity, CapacityPolicy),
            ("experts", experts, Experts),
            ("dispatcher", dispatcher, Dispatcher),
        ):
            _check_factory(what, factory, base)
        self.router = (router or Switch)(d_model=d_model, num_experts=num_experts)
        whole(f"{type(self.router).__name__}.k", self.router.k)
        self.capacity = (capacity or Dropless)()
        if self.router.full and (idle := self.capacity.serves_by) is not None:
            raise ValueError(
                f"{idle} does nothing with {type(self.router).__name__}, where no token queues for an expert: take the "
                "capacity factor, its order 'arrival'"
            )
        self.experts = (experts or Mlp)(d_model=d_model, d_ff=d_ff, num_experts=num_experts)
        self.dispatcher = (dispatcher or Sorted)()

    def extra_repr(self) -> str:
        parts = f"capacity={type(self.capacity).__name__}, dispatcher={type(self.dispatcher).__name__}"
        return f"{options(self)}, {parts}"

    @property
    def leaks(self) -> str | None:
        """Why a causal model would see the future through this layer; None: it would not."""
        return self.router.leaks or self.capacity.leaks(self.router.k)

    @property
    def uncacheable(self) -> str | None:
        """Why tokens one at a time would be routed otherwise than all at once in evaluation; None: they would not."""
        name = type(self.router).__name__
        if self.router.leaks:
            return f"{name} decides on several tokens at once"
        if self.router.by_position:
            return f"{name} decides by the place of a token in the batch it is given"
        if self.capacity.limit(1, self.num_experts, self.router.k, training=False) is not None:
            return f"{type(self.capacity).__name__} limits the capacity in evaluation, and one token never fills it"
        return None

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        valid: Bool[Tensor, "B S"] | None = None,
        ids: Int[Tensor, "B S"] | None = None,
    ) -> tuple[Float[Tensor, "B S D"], Routing]:
        """The mixed outputs and the record of what was decided. `valid`: True for real tokens; `ids`: token ids.

        Raises:
            ValueError: x of another width, valid or ids of another shape or type, a router that needs ids without
                them, or a part that returns what its kind does not: a capacity that is no integer, no record, rows of
                another shape.
        """
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be [B, S, {self.d_model}] (d_model={self.d_model}); got {list(x.shape)}")
        if self.router.needs_ids and ids is None:
            raise ValueError(f"{type(self.router).__name__} routes by token ids: call layer(x, valid, ids)")
        batch, length, _ = x.shape
        if ids is not None and (ids.shape != (batch, length) or ids.dtype not in INTEGERS):
            raise ValueError(
                f"ids must be an integer tensor of shape [{batch}, {length}], the token ids; "
                f"got {ids.dtype} of {list(ids.shape)}"
            )
        if valid is not None:
            if valid.shape != (batch, length) or valid.dtype != torch.bool:
                raise ValueError(
                    f"valid must be a bool tensor of shape [{batch}, {length}], True for real tokens; "
                    f"got {valid.dtype} of {list(valid.shape)}"
                )
            # What padding holds, NaN included, must not reach an output or a gradient.
            x = x.masked_fill(~valid.unsqueeze(-1), 0)
            # What was chosen and kept is made of it, and looked at token by token as a view.
            valid = valid.contiguous()
        tokens = self._groups(x)
        real = self._groups(torch.ones(batch, length, dtype=torch.bool, device=x.device) if valid is None else valid)
        names = None if ids is None else self._groups(ids)
        limit = self.capacity.limit(tokens.shape[1], self.num_experts, self.router.k, training=self.training)
        if isinstance(limit, float):
            raise ValueError(f"{type(self.capacity).__name__}.limit must return an integer or None; got {limit}")
        with full_precision(x.device):
            routing = self.router(tokens, limit, real, names)
        if not isinstance(routing, Routing):
            raise ValueError(
                f"{type(self.router).__name__}.forward must return a Routing, as token_choice makes one; "
                f"got {type(routing).__name__}"
            )
        routing = placed_by(self.capacity, replace(routing, batch=batch, length=length), limit, training=self.training)
        rows = self.dispatcher.dispatch(tokens, routing)
        out = self.experts(rows)
        # Of the width alone: how many rows a loop over loads gives cannot be asked under torch.compile.
        if not isinstance(out, Tensor) or out.shape[-1] != self.d_model:
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"{type(self.experts).__name__}.forward must return an output for each row, of shape "
                f"{list(rows.x.shape)} as rows.x is; got {got}"
            )
        y = self.dispatcher.combine(out, rows, routing)
        if self.dropped != "zero":
            y = y + self._left_behind(tokens, routing)
        y = self._ungrouped(y, x.shape)
        always = self.experts.always(x)
        if always is not None:
            y = self.experts.mix(y, always, x)
            y = y if valid is None else y.masked_fill(~valid.unsqueeze(-1), 0)
        return y, routing

    def _groups(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [G, S', ...]; a ragged last group is filled up with zeros, that is with padding."""
        if self.group == "sequence":
            return x
        flat = x.flatten(0, 1)
        if self.group == "batch":
            return flat.unsqueeze(0)
        size = int(self.group)
        groups = -(-flat.shape[0] // size)
        fill = flat.new_zeros(groups * size - flat.shape[0], *flat.shape[1:])
        return torch.cat([flat, fill]).view(groups, size, *flat.shape[1:])

    def _ungrouped(self, y: Tensor, size: torch.Size) -> Tensor:
        """[G, S', D] -> [B, S, D]; what filled up the last group is left out."""
        if self.group == "sequence":
            return y
        rows, real = y.flatten(0, 1), size[0] * size[1]
        # A slice of everything is not free: its gradient is copied into zeros.
        return (rows if len(rows) == real else rows[:real]).view(size)

    def _left_behind(self, tokens: Float[Tensor, "G S D"], routing: Routing) -> Float[Tensor, "G S D"]:
        """What dropped assignments bring back when it is not zero."""
        assert routing.kept is not None
        if self.dropped == "weighted_input":
            share = undropped_weights(routing).masked_fill(routing.kept | ~routing.chosen, 0)
            return sum_choices(share.reshape(-1, 1), routing).to(tokens.dtype) * tokens
        # A group of one token may have one value for all its choices.
        kept = sum_choices(routing.kept.reshape(-1, 1).to(tokens.dtype), routing)
        return tokens * ((kept == 0) & routing.valid.unsqueeze(-1))


def moe_layers(net: nn.Module) -> dict[str, MoELayer]:
    """The sparse layers of a model by their names in it, in the order of `named_modules`, which is that of its records.

    One that stands in two places has the first name alone.
    """
    return {name: part for name, part in net.named_modules() if isinstance(part, MoELayer)}


def _check_factory(what: str, factory: object, base: type) -> None:
    """A ValueError for a part, or the name of one, where a factory is expected."""
    cls: type | None
    if isinstance(factory, str):
        cls, got = named(base).get(factory), f"the name {factory!r}"
    elif factory is not None and (isinstance(factory, base) or not callable(factory)):
        cls, got = type(factory), f"an instance of {type(factory).__name__}"
    else:
        return
    name = cls.__name__ if cls is not None and issubclass(cls, base) else f"MyOwn{base.__name__}"
    raise ValueError(
        f"{what} must be what builds a {base.__name__}, so that each layer has its own: a class or a functools.partial "
        f"of one, such as {what}={name} or {what}=partial({name}, ...); got {got}"
    )


class MoEFactory(Protocol):
    """Anything that builds a sparse layer for given sizes: `MoELayer`, a `functools.partial` of it, a YAML part."""

    def __call__(self, *, d_model: int, num_experts: int, d_ff: int) -> MoELayer: ...


class FeedForward(nn.Module):
    """The dense layer that a mixture replaces: one expert for every token, ``act(x W1) W2`` without bias.

    Initialised as the experts are: truncated normal, std ``sqrt(init_scale / fan_in)``.

    Args:
        d_model: width of a token.
        d_ff: hidden width.
        dropout: on the hidden activations.
        activation: as of the experts; ReLU by default (T5, and the paper's experts).
        gated: ``(act(x W1) * x V) W2`` instead (arXiv 2002.05202), as llama (silu) and T5 v1.1 (gelu_tanh) have it.
        init_scale: of the initial weights; 0.1 as in the paper (section 2.4 of arXiv 2101.03961).

    Raises:
        ValueError: an unknown activation, dropout outside [0, 1), an init_scale not above 0.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        dropout: float = 0.0,
        activation: Activation = "relu",
        gated: bool = False,
        init_scale: float = 0.1,
    ) -> None:
        super().__init__()
        self.activation, self.dropout = check(activation, dropout)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.gate = nn.Linear(d_model, d_ff, bias=False) if gated else None
        self.down = nn.Linear(d_ff, d_model, bias=False)
        for part in (self.up, self.gate, self.down):
            if part is not None:
                init_linear(part.weight, part.in_features, init_scale)

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        act = ACTIVATIONS[self.activation]
        hidden = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return self.down(F.dropout(hidden, self.dropout, self.training))


class FeedForwardFactory(Protocol):
    """Anything that builds a dense layer for given sizes: `FeedForward`, a `functools.partial` of it, a YAML part."""

    def __call__(self, *, d_model: int, d_ff: int, dropout: float = ...) -> nn.Module: ...
