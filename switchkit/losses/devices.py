"""Losses that keep devices evenly busy, each holding an equal run of neighbouring experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from switchkit.checks import one_of
from switchkit.losses.balance import evenness
from switchkit.losses.base import Loss, over_layers
from switchkit.records import Routing, count_choices, count_sent, count_tokens, sum_probs
from switchkit.registry import register

__all__ = ["CommunicationBalance", "DeviceBalance", "communication_balance", "device_balance"]


def device_balance(
    routing: Routing, devices: int | None = None, *, per: Literal["batch", "sequence"] = "batch"
) -> Float[Tensor, ""]:
    """``sum_d f_d P_d``: f the mean of E times the shares of a device's experts, P the sum of their probabilities."""
    counts, probs = count_choices(routing, per), sum_probs(routing, per)
    devices = _devices(devices, counts.shape[-1])
    counts, probs = _by_device(counts, devices), _by_device(probs, devices)
    return evenness(counts, counts.sum(-1), probs, count_tokens(routing, per))


def communication_balance(
    routing: Routing,
    devices: int | None = None,
    limit: int | None = None,
    *,
    per: Literal["batch", "sequence"] = "batch",
) -> Float[Tensor, ""]:
    """``sum_d f_d P_d``: f is D / (M T) times the tokens sent to device d, P the sum of its experts' probabilities."""
    probs, tokens = sum_probs(routing, per), count_tokens(routing, per)
    experts = probs.shape[-1]
    devices = _devices(devices, experts)
    most = min(routing.k or experts, devices) if limit is None else limit
    if most > devices:
        raise ValueError(f"limit={limit} devices of a token are more than devices={devices}: choose 1 ... {devices}")
    return evenness(count_sent(routing, devices, per), most * tokens, _by_device(probs, devices), tokens)


@register("device_balance")
class DeviceBalance(Loss):
    """The balance loss with the experts of a device taken together: devices even, experts on one of them free.

    ``sum_d f_d P_d`` over D devices, f_d the mean over its experts of E / (k T) times their choices, P_d the sum of
    their mean probabilities. 1 at uniform probabilities, D min(E / D, k) / k at the worst: D where a device holds k
    experts, D / k where it holds one.

    Args:
        weight: the factor of this term in the loss; 0.05 is the paper's.
        devices: how many devices hold E / devices neighbouring experts each. None: as many as experts, which fits
            every E and is the balance loss itself; the paper's own 8 would fit few small models, and a single device
            would make the term a constant.
        per: f and P over the "batch" (a device waits for all of it), or over each "sequence", as the paper writes T.
        layers: "mean" over the sparse layers, or "sum".

    Elsewhere: DeepSeekMoE (arXiv 2401.06066) has the same term with weights up to 0.05; no public code computes it.

    Raises:
        ValueError: a negative or non-finite weight, devices below 1, another word for `per` or `layers`; when called,
            devices that do not divide the number of experts.

    Source: arXiv 2405.04434 (DeepSeek-V2), equations 26 to 28.
    """

    def __init__(
        self,
        weight: float = 0.05,
        *,
        devices: int | None = None,
        per: Literal["batch", "sequence"] = "batch",
        layers: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__(weight)
        self.devices = _at_least_one("devices", devices)
        self.per = one_of("per", per, ("batch", "sequence"))
        self.layers = one_of("layers", layers, ("mean", "sum"))

    def __call__(self, routings: Sequence[Routing]) -> Float[Tensor, ""]:
        return over_layers([device_balance(r, self.devices, per=self.per) for r in routings], self.layers)


@register("communication_balance")
class CommunicationBalance(Loss):
    """The balance loss on what each device receives: a token counts once, however many experts of a device it chose.

    ``sum_d f_d P_d`` over D devices, f_d = D / (M T) times the tokens sent to device d, P_d the sum of the mean
    probabilities of its experts. 1 at uniform probabilities when every token goes to M devices. What is counted is the
    router's choice, as in the paper, whose token dropping comes after: a capacity policy that drops or moves a token
    does not change it.

    Args:
        weight: the factor of this term in the loss; 0.02 is the paper's.
        devices: how many devices hold E / devices neighbouring experts each; None: as many as experts, see
            `device_balance`.
        limit: M, the most devices a token may be sent to (3 of 8 in the paper). None: k, or all devices where that is
            less or the number of choices is not fixed. It only scales the term: the router is what keeps to it.
        per: f and P over the "batch", or over each "sequence", as the paper writes T.
        layers: "mean" over the sparse layers, or "sum".

    Elsewhere: DeepSeek-V3 dropped the term for its bias; no public code computes it.

    Raises:
        ValueError: a negative or non-finite weight, devices or limit below 1, another word for `per` or `layers`; when
            called, devices that do not divide the number of experts, a limit above the devices.

    Source: arXiv 2405.04434 (DeepSeek-V2), equations 29 to 31.
    """

    def __init__(
        self,
        weight: float = 0.02,
        *,
        devices: int | None = None,
        limit: int | None = None,
        per: Literal["batch", "sequence"] = "batch",
        layers: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__(weight)
        self.devices, self.limit = _at_least_one("devices", devices), _at_least_one("limit", limit)
        self.per = one_of("per", per, ("batch", "sequence"))
        self.layers = one_of("layers", layers, ("mean", "sum"))

    def __call__(self, routings: Sequence[Routing]) -> Float[Tensor, ""]:
        terms = [communication_balance(r, self.devices, self.limit, per=self.per) for r in routings]
        return over_layers(terms, self.layers)


def _by_device(x: Tensor, devices: int) -> Tensor:
    """[rows, E] added up to [rows, devices]."""
    return x.reshape(x.shape[0], devices, x.shape[1] // devices).sum(-1)


def _at_least_one(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, or null; got {value}")
    return value


def _devices(devices: int | None, experts: int) -> int:
    """`devices`, or as many as experts; a ValueError where they cannot hold equal runs."""
    if devices is not None and experts % devices:
        fit = [d for d in range(1, experts + 1) if experts % d == 0]
        raise ValueError(f"devices={devices} cannot hold equal shares of {experts} experts: use one of {fit}, or null")
    return devices or experts
