"""Losses on how undecided the router is, token by token and on average."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from switchkit.checks import one_of
from switchkit.losses.base import Loss, over_layers
from switchkit.records import Routing, count_tokens, entropy, mean_entropy, mean_probs
from switchkit.registry import register

__all__ = ["Entropy", "MutualInformation", "mutual_information", "router_entropy"]


def router_entropy(
    routing: Routing, *, of: Literal["token", "mean"] = "mean", maximize: bool = True
) -> Float[Tensor, ""]:
    """``log E - H`` of one layer, or H with maximize=False: both from 0 to log E, and zero without a real token."""
    found = mean_entropy(routing) if of == "token" else entropy(mean_probs(routing))
    if not maximize:
        return found
    some = (count_tokens(routing) > 0).squeeze(0)
    return (math.log(routing.logits.shape[-1]) - found).masked_fill(~some, 0)


def mutual_information(routing: Routing) -> Float[Tensor, ""]:
    """``-(H(mean p) - mean H(p))`` of one layer: from -log E to 0."""
    return mean_entropy(routing) - entropy(mean_probs(routing))


@register("entropy")
class Entropy(Loss):
    """How far the entropy of the router's distribution is from the largest, log E, or from zero.

    A distribution p of a token is its probabilities divided by their sum, entropies H are in nats. The term is
    ``log E - H`` with maximize=True, so that training raises H, and ``H`` with maximize=False; never below 0.

    Args:
        weight: the factor of this term in the loss; 0.01 as for `balance`.
        of: "mean", the entropy of the mean distribution (the source's global entropy): raising it evens the experts
            out and leaves each token free to be certain; or "token", the mean of the tokens' entropies (its local
            entropy): raising it keeps the router exploring, lowering it makes it decide.
        maximize: True raises the entropy, False lowers it. Lowering that of the mean collapses the router.
        layers: "mean" over the sparse layers, or "sum".

    Elsewhere: LIMoE lowers the local and raises the global entropy of each modality, the latter up to a threshold.

    Raises:
        ValueError: a negative or non-finite weight, another word for `of` or `layers`.

    Source: arXiv 2206.02770 (LIMoE), section 2.
    """

    def __init__(
        self,
        weight: float = 0.01,
        *,
        of: Literal["token", "mean"] = "mean",
        maximize: bool = True,
        layers: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__(weight)
        self.of, self.maximize = one_of("of", of, ("token", "mean")), maximize
        self.layers = one_of("layers", layers, ("mean", "sum"))

    def __call__(self, routings: Sequence[Routing]) -> Float[Tensor, ""]:
        return over_layers([router_entropy(r, of=self.of, maximize=self.maximize) for r in routings], self.layers)


@register("mutual_information")
class MutualInformation(Loss):
    """Minus the mutual information of tokens and experts: each token certain, all experts in use.

    ``-(H(mean p) - mean H(p))`` in nats, p being the probabilities of a token divided by their sum: 0 when all tokens
    have the same distribution (uniform or collapsed alike), -log E at best, with each token certain and the experts
    even. `layers`: "mean" over the sparse layers, or "sum". The weight is 0.01, as for `balance`.

    Elsewhere: Mod-Squad takes the information between tasks and experts, ModuleFormer (arXiv 2306.04640) that between
    tokens and experts, as here; LIMoE weighs the two entropies apart (`entropy`, twice).

    Raises:
        ValueError: a negative or non-finite weight, another word for `layers`.

    Source: arXiv 2212.08066 (Mod-Squad), arXiv 2206.02770 (LIMoE).
    """

    def __init__(self, weight: float = 0.01, *, layers: Literal["mean", "sum"] = "mean") -> None:
        super().__init__(weight)
        self.layers = one_of("layers", layers, ("mean", "sum"))

    def __call__(self, routings: Sequence[Routing]) -> Float[Tensor, ""]:
        return over_layers([mutual_information(r) for r in routings], self.layers)
