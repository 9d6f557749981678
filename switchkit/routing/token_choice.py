"""Routers where each token chooses its experts by a learned score."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchkit.checks import finite_above, from_0_below_1, one_of
from switchkit.records import Routing
from switchkit.registry import register
from switchkit.routing.base import LinearRouter, best_expert, check_k, softmax, token_choice
from switchkit.routing.grouping import check_groups, limit_to_groups

__all__ = ["Normalize", "Switch", "TopK", "check_normalize"]

Normalize = Literal["before", "after", "never"]


@register("switch")
class Switch(LinearRouter):
    """The best expert of a token, weighted by its raw probability, so that the router gets a gradient.

    Exploration happens in training only: `jitter` multiplies the router's input by U[1-jitter, 1+jitter],
    `input_dropout` drops entries of it, `sample` draws the expert from ``softmax(logits / temperature)`` instead of
    taking the best. The paper found jitter best (its Table 11); all are off by default, as small models need none.

    `init_std` draws the weights from a normal of that deviation; None: a truncated one, std ``sqrt(init_scale /
    d_model)``, the paper's. `offset` adds a learned bias to the logits. `precision` "bfloat16" computes logits,
    probabilities and the losses on them in bfloat16, as the paper's Table 2 does to show that it diverges; leave it at
    "float32", whatever the trainer's precision is, unless that is the question.

    Elsewhere: t5x starts at a deviation of 0.02, Hugging Face at 1, where most tokens are certain from the start;
    labml's router has a bias.

    Raises:
        ValueError: jitter or input_dropout outside [0, 1), temperature not above 0, a temperature without sampling, an
            init_std or init_scale that is not a finite number above 0, both of them, another precision.

    Source: arXiv 2101.03961, equations 1 and 2 and appendix C.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        jitter: float = 0.0,
        input_dropout: float = 0.0,
        sample: bool = False,
        temperature: float = 1.0,
        init_std: float | None = None,
        init_scale: float = 0.1,
        precision: Literal["float32", "bfloat16"] = "float32",
        offset: bool = False,
    ) -> None:
        super().__init__(
            d_model,
            num_experts,
            jitter=jitter,
            init_std=init_std,
            init_scale=init_scale,
            precision=precision,
            offset=offset,
        )
        from_0_below_1(input_dropout=input_dropout)
        finite_above(0, temperature=temperature)
        if temperature != 1 and not sample:
            raise ValueError(f"temperature={temperature} does nothing without sample=True: set it, or leave it out")
        self.input_dropout, self.sample, self.temperature = input_dropout, sample, temperature

    def forward(
        self,
        tokens: Float[Tensor, "G S D"],
        limit: int | None,
        valid: Bool[Tensor, "G S"],
        ids: Int[Tensor, "G S"] | None = None,
    ) -> Routing:
        logits = self.logits(F.dropout(tokens, self.input_dropout, self.training))
        probs = softmax(logits)
        if self.training and self.sample:
            # Gumbel's trick: the largest of (logit / temperature + Gumbel noise) is a draw from the softmax.
            scores = logits / self.temperature - torch.empty_like(logits).exponential_().log()
        else:
            scores = logits
        expert = best_expert(scores.detach())
        weight = probs.gather(-1, expert)
        return token_choice(logits, probs, expert, weight, valid, extras=self.extras())


@register("top_k")
class TopK(LinearRouter):
    """The k best experts of a token by softmax probability.

    `softmax`: "before" the choice, over all experts, or "after" it, over the logits of the k chosen ones, whose
    weights then sum to one whatever `normalize` says. `normalize` divides the k weights by their sum: "before" the
    drop, "after" it (by the sum of those that found room, which the capacity policy does), or "never"; None means
    "before" for k >= 2 and "never" for k = 1, where dividing would leave the router without a gradient. With
    `groups` > 1 the experts form so many groups of neighbours, one per device for instance, and a token chooses among
    the experts of the `top_groups` groups whose best expert is best. `scale` multiplies the weights, after they
    are normalised, as DeepSeek-V2 does to make up for small ones that are not. `jitter` and `init_std` as in `switch`.

    Elsewhere: Mixtral takes the softmax after (equal to "before", normalised), Megatron offers both and never
    normalises after a drop; GShard and Tutel normalise before the drop, DeepSpeed and NLLB-MoE after it; V-MoE,
    OpenMoE and DeepSeekMoE never.

    Raises:
        ValueError: k outside 1 ... num_experts, jitter outside [0, 1), groups that do not divide num_experts, too few
            experts left in top_groups, an unknown word, a scale or init_std that is not a finite number above 0, or
            weights that are always 1: k = 1 with softmax="after" or with normalize="before" or "after".

    Source: arXiv 2006.16668 (k = 2), arXiv 2401.04088 (section 2.1, Mixtral), arXiv 2405.04434 (section 2.2.2, groups).
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        k: int = 2,
        softmax: Literal["before", "after"] = "before",
        normalize: Normalize | None = None,
        groups: int = 1,
        top_groups: int | None = None,
        scale: float = 1.0,
        jitter: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__(d_model, num_experts, jitter=jitter, init_std=init_std)
        self.k = check_k(k, num_experts)
        one_of("softmax", softmax, ("before", "after"))
        if softmax == "after" and k == 1:
            raise ValueError(
                "softmax='after' with k=1 makes every weight 1 and leaves the router without a gradient: use 'before'"
            )
        finite_above(0, scale=scale)
        self.softmax, self.normalize, self.scale = softmax, check_normalize(normalize, k), scale
        self.groups, self.top_groups = groups, check_groups(groups, top_groups, k=k, num_experts=num_experts)

    def forward(
        self,
        tokens: Float[Tensor, "G S D"],
        limit: int | None,
        valid: Bool[Tensor, "G S"],
        ids: Int[Tensor, "G S"] | None = None,
    ) -> Routing:
        logits = self.logits(tokens)
        probs = softmax(logits)
        scores = logits if self.softmax == "after" else probs
        if self.groups == 1:
            weight, expert = scores.topk(self.k, dim=-1)
        else:
            expert = limit_to_groups(scores.detach(), self.groups, self.top_groups, best=1).topk(self.k, dim=-1).indices
            weight = scores.gather(-1, expert)
        if self.softmax == "after":
            weight = weight.softmax(-1)
        elif self.normalize == "before":
            weight = weight / weight.sum(-1, keepdim=True)
        after = self.normalize == "after"
        if self.scale != 1 and not after:
            weight = self.scale * weight
        extras, scale = self.extras(), self.scale
        return token_choice(logits, probs, expert, weight, valid, extras=extras, renormalize=after, scale=scale)


def check_normalize(normalize: Normalize | None, k: int) -> Normalize:
    """When the k weights are divided by their sum; None: "before" the drop for k >= 2, "never" for k = 1."""
    one_of("normalize", normalize, ("before", "after", "never", None))
    if normalize in ("before", "after") and k == 1:
        raise ValueError(
            f"normalize={normalize!r} with k=1 makes every weight 1 and leaves the router without a gradient: "
            "use 'never', or leave it out"
        )
    return normalize or ("before" if k > 1 else "never")
