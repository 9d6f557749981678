"""The loss that keeps the load even."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from switchkit.losses.base import Loss, over_layers
from switchkit.records import Routing, load, mean_probs
from switchkit.registry import register

__all__ = ["Balance", "balance"]


def balance(routing: Routing) -> Float[Tensor, ""]:
    """``E * sum_e f_e P_e`` of one layer: f the share of assignments (before the drop), P the mean probability.

    1 at uniform probabilities for every k, E/k at the worst; zero when every token is padding. (1 is not its minimum:
    a load that opposes the probabilities gives less.)
    """
    counts, probs = load(routing), mean_probs(routing)
    share = counts.to(probs.dtype) / counts.sum().clamp(min=1)
    return len(counts) * (share * probs).sum()


@register("balance")
class Balance(Loss):
    """The auxiliary load-balancing loss of the Switch Transformer, on the tokens of a micro-batch.

    `layers`: "mean" over the sparse layers (t5x), so that its weight does not depend on the depth, or "sum" (the
    paper, Mesh TensorFlow, labml). `scale`: 1 when balanced ("one"), or k ("k", Hugging Face). The weight of 0.01 is
    the paper's.

    Raises:
        ValueError: a negative or non-finite weight, another word for `layers` or `scale`.

    Source: arXiv 2101.03961, equations 4 to 6.
    """

    def __init__(
        self,
        weight: float = 0.01,
        *,
        layers: Literal["mean", "sum"] = "mean",
        scale: Literal["one", "k"] = "one",
    ) -> None:
        super().__init__(weight)
        if layers not in ("mean", "sum"):
            raise ValueError(f"layers must be 'mean' or 'sum'; got {layers!r}")
        if scale not in ("one", "k"):
            raise ValueError(f"scale must be 'one' or 'k'; got {scale!r}")
        self.layers, self.scale = layers, scale

    def __call__(self, routings: Sequence[Routing]) -> Float[Tensor, ""]:
        factors = [(r.k or 1) if self.scale == "k" else 1 for r in routings]
        return over_layers([factor * balance(r) for factor, r in zip(factors, routings, strict=True)], self.layers)
