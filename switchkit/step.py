"""What an optimizer step is made of: micro-batches on one device or several, and what each of them weighs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from switchkit.capacity.policies import Dropless
from switchkit.layers import moe_layers

__all__ = ["MicroBatch", "NonFiniteError", "Seen", "Step", "gradient_scale", "warn_of_groups", "weighted_means"]


@dataclass(frozen=True)
class Seen:
    """Counts of one micro-batch."""

    targets: Int[Tensor, ""]
    """Real targets: what the cross-entropy is a mean over."""
    load: Int[Tensor, "L E"]
    """Chosen assignments."""
    tokens: Int[Tensor, "L"]
    """Real tokens."""
    bad: Int[Tensor, "L"]
    """Tokens that a router could not score."""

    def everywhere(self) -> Seen:
        """The sums over all devices: one all-reduce, which every device takes part in."""
        layers, experts = self.load.shape
        parts = (self.targets.view(1), self.load.flatten(), self.tokens, self.bad)
        every = torch.cat([part.long() for part in parts])
        dist.all_reduce(every)
        targets, load, tokens, bad = every.split_with_sizes([1, layers * experts, layers, layers])
        return Seen(targets.view(()), load.view(layers, experts), tokens, bad)

    def counts(self) -> Int[Tensor, "L columns"]:
        """`load`, and `tokens` as one more column: what adds up over the micro-batches of a step."""
        return torch.cat([self.load, self.tokens.unsqueeze(-1)], dim=-1)


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of a step: what this device saw, what all devices saw, and the values to log.

    A step's loss is the mean of its micro-batches' losses, weighted by their real targets, so that its cross-entropy is
    the mean over all real targets of the step, on every device. Within a micro-batch the terms on the routing records
    are means over the devices, weighted by the tokens that the routers of each saw.
    """

    own: Seen
    every: Seen
    devices: int = 1
    values: Mapping[str, Tensor] | None = None
    """Means over the targets of this device."""
    terms: Mapping[str, Tensor] | None = None
    """Means over the tokens that its routers saw. What both name is the sum of the two: the loss."""

    def weights(self, first: MicroBatch | None) -> tuple[Float[Tensor, ""], Float[Tensor, ""]] | None:
        """What to multiply the cross-entropy of this device, and the terms of this device, with; None: nothing.

        The gradient is the mean over devices afterwards, as DDP and FSDP take it. `first` is the first micro-batch of
        the step, if this is another one: weights are relative to it, and `gradient_scale` puts that right in the end,
        when the targets of all are known.
        """
        if self.devices == 1 and first is None:
            return None
        entropy = self.devices * _share(self.own.targets, self.every.targets)
        terms = self.devices * self.token_share()
        if first is not None:
            among = _share(self.every.targets, first.every.targets)
            entropy, terms = entropy * among, terms * among
        return entropy, terms

    def token_share(self) -> Float[Tensor, ""]:
        """This device's part of the tokens that the routers of all saw."""
        return _share(self.own.tokens.sum(), self.every.tokens.sum())

    def with_values(self, values: Mapping[str, Tensor], terms: Mapping[str, Tensor]) -> MicroBatch:
        """With what is logged of it, detached."""
        return replace(self, values=_detached(values), terms=_detached(terms))


class NonFiniteError(ValueError):
    """NaN or infinity in a router's input or in the loss: training stops before the optimizer steps."""


class Step:
    """The optimizer step that is in the making: its micro-batches so far, and what they counted."""

    def __init__(self) -> None:
        self.batches: list[MicroBatch] = []
        # Load and tokens [L, E + 1] so far: this device's, and those of all devices.
        self._counts: tuple[Tensor, Tensor] | None = None

    def count(self, micro: MicroBatch) -> None:
        """Add up what callbacks and losses of a scope beyond the micro-batch read."""
        own, every = micro.own.counts(), micro.every.counts()
        if self._counts is not None:
            # Those of a checkpoint are read before the model is on its device.
            own, every = self._counts[0].to(own.device) + own, self._counts[1].to(own.device) + every
        self._counts = own, every

    def load(self, scope: Literal["rank", "global"]) -> Int[Tensor, "L E"] | None:
        """Chosen assignments of this device or of all devices; None: nothing was counted."""
        return None if self._counts is None else self._counts[scope == "global"][:, :-1]

    def add(
        self, micro: MicroBatch, values: Mapping[str, Tensor], terms: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """Take a micro-batch in, with what is logged of it; what its cross-entropy and its terms weigh, None: 1."""
        weights = micro.weights(self.batches[0] if self.batches else None)
        self.batches.append(micro.with_values(values, terms))
        return weights

    def bad(self) -> Int[Tensor, "L"]:
        """Tokens that a router could not score, over all devices."""
        return torch.stack([batch.every.bad for batch in self.batches]).sum(0)

    def broken(self) -> Int[Tensor, ""]:
        """How many losses were not finite, over all devices: all of them stop before one steps."""
        losses = [(batch.values or {})["loss"] + (batch.terms or {})["loss"] for batch in self.batches]
        found = (~torch.isfinite(torch.stack(losses))).sum()
        if self.batches[0].devices > 1:
            dist.all_reduce(found)
        return found

    def take_counts(self) -> Int[Tensor, "L columns"] | None:
        """Those of all devices, `tokens` in the last column; the next step begins to count."""
        counted, self._counts = self._counts, None
        return None if counted is None else counted[1]

    def clear(self) -> None:
        """Forget a step that broke off."""
        self.batches.clear()
        self._counts = None

    def saved(self) -> Int[Tensor, "L columns"] | None:
        """The counts of all devices in the middle of a step, for a checkpoint."""
        return None if self._counts is None else self._counts[1].cpu()

    def restore(self, saved: Int[Tensor, "L columns"], first: bool) -> None:
        """Go on from `saved`; the counts of all devices become the own ones of the `first` device."""
        self._counts = (saved if first else torch.zeros_like(saved)), saved


def gradient_scale(batches: Sequence[MicroBatch], accumulate: int) -> Float[Tensor, ""]:
    """What the gradient of a step has to be multiplied with, where each loss was divided by `accumulate`.

    1 where all micro-batches have as many targets. A step that the end of an epoch cut short is made whole too.
    """
    total = torch.stack([batch.every.targets for batch in batches]).sum()
    return accumulate * _share(batches[0].every.targets.clamp(min=1), total)


def weighted_means(batches: Sequence[MicroBatch]) -> dict[str, Float[Tensor, ""]]:
    """The logged values over all micro-batches and devices, weighted as the step weighs them; one more all-reduce."""
    several = batches[0].devices > 1
    targets = torch.stack([batch.own.targets for batch in batches]).double()
    # Within a micro-batch by tokens, among micro-batches by the targets of all devices.
    by_tokens = torch.stack([batch.every.targets * (batch.token_share() if several else 1) for batch in batches])
    # A device without a target has a mean of nothing, which weighs nothing.
    sums = _sums([batch.values or {} for batch in batches], targets)
    for name, value in _sums([batch.terms or {} for batch in batches], by_tokens.double()).items():
        sums[name] = sums[name] + value if name in sums else value
    every = torch.stack([*sums.values(), targets.sum()])
    if several:
        dist.all_reduce(every)
    return {name: mean.float() for name, mean in zip(sums, every[:-1] / every[-1].clamp(min=1), strict=True)}


def _sums(rows: Sequence[Mapping[str, Tensor]], weights: Tensor) -> dict[str, Tensor]:
    return {name: (torch.stack([row[name] for row in rows]).double() * weights).sum() for name in rows[0]}


def _detached(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items()}


def warn_of_groups(module: nn.Module, devices: int) -> None:
    """Say so where what the layers of a module choose or drop depends on the number of devices."""
    layers = moe_layers(module).values()
    groups = {m.group for m in layers if m.router.leaks or not isinstance(m.capacity, Dropless)} - {"sequence"}
    if devices > 1 and groups:
        ways = " and ".join(f"group={group!r}" for group in sorted(groups, key=str))
        unless = "" if "batch" in groups else ", unless the number divides the tokens of that batch"
        rank_zero_warn(
            f"{ways} decides over the batch of each device: {devices} devices choose or drop otherwise than one "
            f"would{unless}. group='sequence' does not depend on the devices"
        )


def _share(part: Int[Tensor, ""], whole: Int[Tensor, ""]) -> Float[Tensor, ""]:
    return part / whole.clamp(min=1)
