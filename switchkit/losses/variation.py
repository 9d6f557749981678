"""Losses on the spread between experts: the squared coefficient of variation of what each one gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from switchkit.checks import one_of
from switchkit.losses.base import Loss, over_layers
from switchkit.records import Routing, sum_probs, sum_weights
from switchkit.registry import register

__all__ = ["Importance", "Load", "importance", "load_variation", "smooth_load", "squared_variation"]


def squared_variation(x: Float[Tensor, "E"]) -> Float[Tensor, ""]:
    """``(std / mean) ** 2`` with the population's standard deviation; zero where the mean is zero."""
    mean = x.mean()
    return ((x - mean) / torch.where(mean == 0, 1, mean)).square().mean()


def importance(routing: Routing, *, of: Literal["weight", "probs"] = "weight") -> Float[Tensor, ""]:
    """Squared coefficient of variation of the summed weights, or probabilities, of the experts of one layer."""
    return squared_variation(sum_weights(routing) if of == "weight" else sum_probs(routing).squeeze(0))


def smooth_load(routing: Routing, *, excluding: bool) -> Float[Tensor, "E"]:
    """Expected number of tokens of each expert if its own noise were drawn again, the noise of the others as it is.

    ``sum_x Phi((logits_e - threshold) / std)``, where the threshold is the k-th largest noisy logit among the other
    experts (`excluding`) or among all. Reads `extras["noisy"]` and `extras["std"]` [G, S, E].

    Raises:
        ValueError: a router without noise, or without k choices per token.
    """
    k, experts = routing.k, routing.logits.shape[-1]
    if k is None or "noisy" not in routing.extras or "std" not in routing.extras:
        raise ValueError(
            "the load loss needs extras 'noisy' and 'std' and k choices per token, which the router noisy_top_k "
            f"provides; got extras {sorted(routing.extras)} and k={k}: use that router, or the loss importance"
        )
    # Padding must not reach the arithmetic: what is not finite there would spoil the gradient of the rest.
    padding = ~routing.valid.unsqueeze(-1)
    clean, noisy = (x.masked_fill(padding, 0) for x in (routing.logits, routing.extras["noisy"]))
    std = routing.extras["std"].masked_fill(padding, 1).clamp(min=torch.finfo(clean.dtype).eps)
    if excluding and k >= experts:
        chance = torch.ones_like(clean)
    else:
        best = noisy.topk(k + 1 if excluding else k, dim=-1).values
        threshold = best[..., k - 1 : k]
        if excluding:
            # Without one of the k best, the k-th of the others is the one after them.
            threshold = torch.where(noisy > best[..., k:], best[..., k:], threshold)
        chance = torch.special.ndtr((clean - threshold) / std)
    return chance.masked_fill(padding, 0).sum((0, 1))


def load_variation(routing: Routing, *, threshold: Literal["excluding", "kth"] = "excluding") -> Float[Tensor, ""]:
    """Squared coefficient of variation of the smooth load of the experts of one layer."""
    return squared_variation(smooth_load(routing, excluding=threshold == "excluding"))


@register("importance")
class Importance(Loss):
    """Squared coefficient of variation of the total weight that each expert gets from the batch.

    ``CV(I)^2 = (std / mean)^2`` of ``I_e = sum_x G_e(x)``, with the population's standard deviation (divided by E, not
    E - 1): 0 when even, E - 1 when one expert gets all. The weight of 0.1 is that of the paper's best row (Table 6),
    where `load` stands beside it with the same.

    Args:
        weight: the factor of this term in the loss.
        of: "weight", the weights of the chosen assignments, before the drop (the paper); or "probs", the full
            probabilities, so that an expert that nobody chose gets a gradient too (V-MoE).
        layers: "mean" over the sparse layers, or "sum".

    Elsewhere: V-MoE takes of="probs" without noise, in groups of their own, with a weight of 0.005 (its appendix A.2);
    Tutel and tensor2tensor take the weights.

    Raises:
        ValueError: a negative or non-finite weight, another word for `of` or `layers`.

    Source: arXiv 1701.06538, equations 6 and 7.
    """

    def __init__(
        self,
        weight: float = 0.1,
        *,
        of: Literal["weight", "probs"] = "weight",
        layers: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__(weight)
        self.of = one_of("of", of, ("weight", "probs"))
        self.layers = one_of("layers", layers, ("mean", "sum"))

    def __call__(self, routings: Sequence[Routing]) -> Float[Tensor, ""]:
        return over_layers([importance(r, of=self.of) for r in routings], self.layers)


@register("load")
class Load(Loss):
    """Squared coefficient of variation of a smooth count of the tokens of each expert, for the router `noisy_top_k`.

    The count of an expert is ``sum_x P_e(x)``, where P is the chance that e is among the k best if its own noise were
    drawn again: ``Phi((logits_e - threshold) / std_e)``. Unlike a count it has a gradient. The weight of 0.1 is that of
    the paper's best row (Table 6), beside `importance` with the same. 0 when even.

    Args:
        weight: the factor of this term in the loss.
        threshold: the k-th largest noisy logit "excluding" the expert itself (the paper, where P is exact), or the
            "kth" of all (V-MoE), which asks an expert among the best to beat its own noise.
        layers: "mean" over the sparse layers, or "sum".

    Elsewhere: V-MoE takes threshold="kth", a constant std of 1/E, groups of their own, and a weight of 0.005.

    Raises:
        ValueError: a negative or non-finite weight, another word for `threshold` or `layers`; when called, a router
            that does not provide its noise.

    Source: arXiv 1701.06538, equations 8 to 11.
    """

    def __init__(
        self,
        weight: float = 0.1,
        *,
        threshold: Literal["excluding", "kth"] = "excluding",
        layers: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__(weight)
        self.threshold = one_of("threshold", threshold, ("excluding", "kth"))
        self.layers = one_of("layers", layers, ("mean", "sum"))

    def __call__(self, routings: Sequence[Routing]) -> Float[Tensor, ""]:
        return over_layers([load_variation(r, threshold=self.threshold) for r in routings], self.layers)
