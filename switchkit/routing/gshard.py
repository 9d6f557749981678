"""Two experts per token, the second one not always."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchkit.checks import one_of
from switchkit.records import Routing
from switchkit.registry import register
from switchkit.routing.base import LinearRouter, softmax, token_choice
from switchkit.routing.token_choice import Normalize, check_normalize

__all__ = ["GShard"]


@register("gshard")
class GShard(LinearRouter):
    """The two best experts of a token, the second one only where its weight is worth it.

    With g1 and g2 the two largest probabilities, ``s = g2 / (g1 + g2)`` decides whether the second choice is sent. In
    training `second` is "proportional", where ``multiplier * s > U(0, 1)``; "threshold", where ``s > threshold``; or
    "all". Evaluation draws no random numbers: `eval_second` is "all" or "threshold". A second choice that is not sent
    is not `chosen` and takes no room. `normalize` divides g1 and g2 by their sum, sent or not, "before" the drop; by
    the sum of what was sent and found room, "after" it; or "never". With `sample` the second expert is drawn from the
    softmax over the others, in training only, and g2 is its probability. `jitter` and `init_std` as in `switch`.

    In the source all first choices take their places before any second one: that is a choice of the capacity policy.

    Elsewhere: Mesh TensorFlow and the code after it compare the same normalised s, and its random policy sends where
    ``s / threshold > U``, so that its threshold of 0.2 is a multiplier of 5, in evaluation too; DeepSpeed draws the
    second expert by Gumbel noise and normalises after the drop, as NLLB-MoE does.

    Raises:
        ValueError: fewer than 2 experts, an unknown word, jitter outside [0, 1), threshold outside [0, 0.5) (s is 0.5
            at most), multiplier not a finite number above 0, a threshold or multiplier that nothing uses.

    Source: arXiv 2006.16668, algorithm 1; arXiv 2202.08906 for the threshold of 0.2.
    """

    k = 2

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        second: Literal["all", "threshold", "proportional"] = "proportional",
        threshold: float = 0.2,
        multiplier: float = 2.0,
        eval_second: Literal["all", "threshold"] = "all",
        normalize: Normalize = "before",
        sample: bool = False,
        jitter: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__(d_model, num_experts, jitter=jitter, init_std=init_std)
        if num_experts < 2:
            raise ValueError(f"gshard sends a token to two experts: num_experts must be at least 2; got {num_experts}")
        one_of("second", second, ("all", "threshold", "proportional"))
        if eval_second not in ("all", "threshold"):
            raise ValueError(f"eval_second must be 'all' or 'threshold', which draw nothing; got {eval_second!r}")
        if not 0 <= threshold < 0.5:
            raise ValueError(f"threshold must be in [0, 0.5), as no second weight exceeds 0.5; got {threshold}")
        if not (math.isfinite(multiplier) and multiplier > 0):
            raise ValueError(
                f"multiplier must be a finite number > 0; got {multiplier}; for no second expert use switch"
            )
        if threshold != 0.2 and "threshold" not in (second, eval_second):
            raise ValueError(f"threshold={threshold} does nothing unless second or eval_second is 'threshold'")
        if multiplier != 2 and second != "proportional":
            raise ValueError(f"multiplier={multiplier} does nothing with second={second!r}: use second='proportional'")
        if eval_second == "threshold":
            self.uneven = "gshard takes a second expert only above the threshold"
        self.second, self.threshold, self.multiplier = second, threshold, multiplier
        self.eval_second, self.normalize, self.sample = eval_second, check_normalize(normalize, 2), sample

    def forward(
        self,
        tokens: Float[Tensor, "G S D"],
        limit: int | None,
        valid: Bool[Tensor, "G S"],
        ids: Int[Tensor, "G S"] | None = None,
    ) -> Routing:
        logits = self.logits(tokens)
        probs = softmax(logits)
        if self.sample and self.training:
            first = logits.detach().argmax(-1, keepdim=True)
            # Gumbel's trick: the largest of (logit + Gumbel noise) is a draw from the softmax.
            drawn = logits.detach() - torch.empty_like(logits).exponential_().log()
            expert = torch.cat([first, drawn.scatter(-1, first, float("-inf")).argmax(-1, keepdim=True)], -1)
            weight = probs.gather(-1, expert)
        else:
            weight, expert = probs.topk(2, dim=-1)
        share = weight / weight.sum(-1, keepdim=True)
        sent = torch.stack([torch.ones_like(valid), self._sent(share[..., 1].detach())], -1)
        if self.normalize == "before":
            weight = share
        after = self.normalize == "after"
        return token_choice(logits, probs, expert, weight, valid, sent, self.extras(), renormalize=after)

    def _sent(self, share: Float[Tensor, "G S"]) -> Bool[Tensor, "G S"]:
        """Where the second choice is made, given its normalised weight."""
        policy = self.second if self.training else self.eval_second
        if policy == "all":
            return torch.ones_like(share, dtype=torch.bool)
        if policy == "threshold":
            return share > self.threshold
        return self.multiplier * share > torch.rand_like(share)
