"""What every router is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral
from typing import ClassVar, Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from switchkit.checks import at_least, finite_above, from_0_below_1, one_of
from switchkit.kernels.precision import full_precision
from switchkit.records import Routing
from switchkit.shown import options

__all__ = [
    "LinearRouter",
    "Router",
    "RouterFactory",
    "best_expert",
    "check_k",
    "full_precision",
    "project",
    "softmax",
    "token_choice",
]


class Router(nn.Module):
    """Decides the assignments of one sparse layer.

    A subclass sets the integer `k` (mean choices of a token) and defines `forward`. It computes in float32 at least,
    outside autocast (selective precision, section 2.4 of arXiv 2101.03961), draws random numbers in training only and
    from torch's generator, and changes nothing on itself.
    """

    k: int = 1
    needs_ids: ClassVar[bool] = False
    """True: `forward` needs the token ids, as a hash router does."""
    leaks: str | None = None
    """Why a causal model would see the future with this router; None: it would not."""
    by_position: ClassVar[bool] = False
    """True: in evaluation too it decides by a token's place in the group, not by the token."""
    full: ClassVar[bool] = False
    """True: experts choose, or work on mixtures, so that each computes as many rows as the next, as `rows` says."""
    uneven: str | None = None
    """Why nobody can say beforehand how many experts a token costs; None: what `rows` says, whatever the data."""

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__()
        at_least(1, num_experts=num_experts)
        self.d_model, self.num_experts = d_model, num_experts

    def forward(
        self,
        tokens: Float[Tensor, "G S D"],
        limit: int | None,
        valid: Bool[Tensor, "G S"],
        ids: Int[Tensor, "G S"] | None = None,
    ) -> Routing:
        """Route each group of tokens; `limit` is the capacity, for routers that need one to choose (None: dropless)."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return options(self, "k")

    def rows(self, size: int, limit: int | None) -> int:
        """Rows that experts compute for a group of `size` real tokens, drops not taken off; `limit` as in `forward`."""
        return size * self.k


class RouterFactory(Protocol):
    """Anything that builds a router for given sizes: a class, a `functools.partial`, a YAML part."""

    def __call__(self, *, d_model: int, num_experts: int) -> Router: ...


class LinearRouter(Router):
    """A router whose logits are one matrix product, in float32 or better, plus a bias where `offset` asks for one.

    Initialised by a truncated normal, std ``sqrt(init_scale / d_model)`` with 0.1 (section 2.4 of arXiv 2101.03961),
    or by a normal with the deviation `init_std`; the bias starts at zero. `precision` "bfloat16" computes the logits,
    and what follows from them, in bfloat16: the router that the source's Table 2 compares with, for experiments.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        jitter: float = 0.0,
        init_std: float | None = None,
        init_scale: float = 0.1,
        precision: Literal["float32", "bfloat16"] = "float32",
        offset: bool = False,
    ) -> None:
        super().__init__(d_model, num_experts)
        from_0_below_1(jitter=jitter)
        if init_std is not None and not (math.isfinite(init_std) and init_std > 0):
            raise ValueError(f"init_std must be a finite number > 0, or null for sqrt(0.1 / d_model); got {init_std}")
        finite_above(0, init_scale=init_scale)
        if init_std is not None and init_scale != 0.1:
            raise ValueError(f"init_scale={init_scale} does nothing beside init_std={init_std}: leave one of them out")
        one_of("precision", precision, ("float32", "bfloat16"))
        self.jitter, self.init_std, self.init_scale, self.precision = jitter, init_std, init_scale, precision
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.offset = nn.Parameter(torch.empty(num_experts)) if offset else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init_std is None:
            std = math.sqrt(self.init_scale / self.d_model)
            nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        else:
            nn.init.normal_(self.weight, std=self.init_std)
        if self.offset is not None:
            nn.init.zeros_(self.offset)

    def logits(self, tokens: Float[Tensor, "G S D"]) -> Float[Tensor, "G S E"]:
        """``x W^T`` of the tokens, jittered in training."""
        with full_precision(tokens.device):
            half = self.precision == "bfloat16"
            x = tokens.to(torch.bfloat16 if half else torch.promote_types(tokens.dtype, torch.float32))
            if self.training and self.jitter:
                # Out of place: the experts see the tokens without noise.
                x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            logits = project(x, self.weight)
            return logits if self.offset is None else logits + self.offset.to(x.dtype)

    def extras(self) -> dict[str, Tensor]:
        """What losses read of the router itself, for `token_choice(..., extras=...)`: "rows" [E, D], its weights."""
        # A copy: FSDP frees the gathered parameter after forward, before a loss reads it.
        return {"rows": self.weight.clone()}


def project(x: Float[Tensor, "G S D"], weight: Float[Tensor, "E D"]) -> Float[Tensor, "G S E"]:
    """``x W^T`` in the dtype of x, with the experts first in memory."""
    # With few experts, a softmax over a last dimension that is contiguous is ten times slower on a CPU.
    by_expert = torch.mm(weight.to(x.dtype), x.flatten(0, 1).t())
    return by_expert.view(len(weight), *x.shape[:2]).permute(1, 2, 0)


def best_expert(scores: Float[Tensor, "G S E"]) -> Int[Tensor, "G S 1"]:
    """The expert of the largest score, along the layout in which `project` has them."""
    # There `max` takes a tenth of the time of `argmax` on a CPU.
    return scores.permute(2, 0, 1).max(0).indices.unsqueeze(-1)


def softmax(logits: Float[Tensor, "G S E"]) -> Float[Tensor, "G S E"]:
    """Softmax over the experts, along the layout in which `LinearRouter.logits` has them."""
    return logits.permute(2, 0, 1).softmax(0).permute(1, 2, 0)


def check_k(k: int, num_experts: int) -> int:
    """`k`, or a ValueError that says what would do."""
    if isinstance(k, bool) or not isinstance(k, Integral):
        raise ValueError(f"k={k!r} choices of a token are impossible: k must be an integer")
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} choices of a token are impossible: k must be from 1 to num_experts={num_experts}")
    return k


def token_choice(
    logits: Float[Tensor, "G S E"],
    probs: Float[Tensor, "G S E"],
    expert: Int[Tensor, "G S K"],
    weight: Float[Tensor, "G S K"],
    valid: Bool[Tensor, "G S"],
    chosen: Bool[Tensor, "G S K"] | None = None,
    extras: Mapping[str, Tensor] | None = None,
    *,
    renormalize: bool = False,
    scale: float = 1.0,
    ranked: bool = True,
) -> Routing:
    """The record of a router where each token chooses K experts; padding is never chosen.

    Raises:
        ValueError: a tensor of another shape, such as `expert` [G, S] of a single choice, which is [G, S, 1].
    """
    _check_shapes(logits, probs, expert, weight, valid, chosen)
    groups, size, k = expert.shape
    token = torch.arange(size, device=expert.device)
    if k > 1:
        token = token.repeat_interleave(k)
    if chosen is not None:
        made = (valid.unsqueeze(-1) & chosen).reshape(groups, size * k)
    else:
        made = valid if k == 1 else valid.unsqueeze(-1).expand_as(expert).reshape(groups, size * k)
    return Routing(
        logits=logits,
        probs=probs,
        token=token.expand(groups, size * k),
        expert=expert.reshape(groups, size * k),
        weight=weight.reshape(groups, size * k),
        chosen=made,
        valid=valid,
        k=k,
        extras=extras or {},
        renormalize=renormalize,
        scale=scale,
        ranked=ranked,
    )


def _check_shapes(
    logits: Tensor, probs: Tensor, expert: Tensor, weight: Tensor, valid: Tensor, chosen: Tensor | None
) -> None:
    tokens = tuple(valid.shape)
    for name, value, last in (
        ("logits", logits, "E"),
        ("probs", probs, "E"),
        ("expert", expert, "K"),
        ("weight", weight, "K"),
        ("chosen", chosen, "K"),
    ):
        if value is None:
            continue
        like = logits if last == "E" else expert
        if value.dim() != 3 or value.shape[:2] != tokens or value.shape != like.shape:
            wanted = f"[{', '.join(map(str, tokens))}, {last if like is value else like.shape[-1]}]"
            one = "; a single choice of each token is .unsqueeze(-1)" if last == "K" and value.dim() == 2 else ""
            raise ValueError(
                f"{name} must be [G, S, {last}] = {wanted}, as valid is [G, S]; got {list(value.shape)}{one}"
            )
