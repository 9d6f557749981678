"""Token choice with Gaussian noise on the logits."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from switchkit.checks import one_of
from switchkit.records import Routing
from switchkit.registry import register
from switchkit.routing.base import LinearRouter, check_k, full_precision, project, softmax, token_choice

__all__ = ["NoisyTopK"]


@register("noisy_top_k")
class NoisyTopK(LinearRouter):
    """The k best experts of a token after Gaussian noise on its logits, in training only.

    `noise`: "learned", ``H = x W^T + N(0, 1) * softplus(x W_noise^T)``, the k largest of H, weights their softmax over
    the k, which sum to one; or "gaussian", ``p = softmax(x W^T + N(0, std^2))``, the k largest of p, which are the
    weights as they are. `std` is that of "gaussian" noise; None: 1/num_experts, as in V-MoE. `W_noise` starts at zero,
    that is with a deviation of log 2. `zero_init` starts W at zero too, as the source has it, so that only noise
    decides at first; until the first update all tokens are then sent to the same k experts in evaluation. Off by
    default: W starts as in `switch`.

    `logits` and `probs` of the record are without noise, which is what V-MoE's importance loss reads; the importance of
    the source adds up `weight`. `extras` has what tells how likely a token were to choose an expert if its noise were
    drawn again: "noisy" [G, S, E], the logits that decided (in evaluation the clean ones), and "std" [G, S, E], the
    deviation of their noise.

    Elsewhere: tensor2tensor adds 0.01 to the learned deviation; Tutel has Gaussian noise of deviation 1/num_experts
    times a factor, as V-MoE's code has.

    Raises:
        ValueError: k outside 1 ... num_experts, an unknown noise, a std that is not a finite number above 0, a std for
            learned noise, learned noise with k = 1, where every weight is 1 and the router gets no gradient (a single
            expert excepted, where there is nothing to learn).

    Source: arXiv 1701.06538, equations 3 to 5 and appendix A; arXiv 2106.05974 (V-MoE), section 2.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        k: int = 2,
        noise: Literal["learned", "gaussian"] = "learned",
        std: float | None = None,
        zero_init: bool = False,
    ) -> None:
        super().__init__(d_model, num_experts)
        self.k = check_k(k, num_experts)
        one_of("noise", noise, ("learned", "gaussian"))
        if noise == "learned" and std is not None:
            raise ValueError(f"std={std} does nothing with learned noise: leave it out, or set noise='gaussian'")
        if std is not None and not (math.isfinite(std) and std > 0):
            raise ValueError(f"std must be a finite number > 0; got {std}; without noise use the router top_k")
        if noise == "learned" and k == 1 and num_experts > 1:
            raise ValueError(
                "k=1 with learned noise makes every weight 1 and leaves the router without a gradient: "
                "use k >= 2 or noise='gaussian'"
            )
        self.noise, self.zero_init = noise, zero_init
        self.std = 1 / num_experts if std is None else std
        if noise == "learned":
            self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))
        if zero_init:
            nn.init.zeros_(self.weight)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        # The base class calls this before the options are known.
        if getattr(self, "zero_init", False):
            nn.init.zeros_(self.weight)
        if hasattr(self, "noise_weight"):
            nn.init.zeros_(self.noise_weight)

    def forward(
        self,
        tokens: Float[Tensor, "G S D"],
        limit: int | None,
        valid: Bool[Tensor, "G S"],
        ids: Int[Tensor, "G S"] | None = None,
    ) -> Routing:
        logits = self.logits(tokens)
        std = self._std(tokens, logits)
        # Zero times the deviation in evaluation: weights of the noise then have a gradient of zero, not none.
        noisy = logits + std * (torch.randn_like(logits) if self.training else torch.zeros_like(logits))
        if self.noise == "learned":
            best, expert = noisy.topk(self.k, dim=-1)
            weight = best.softmax(-1)
        else:
            weight, expert = softmax(noisy).topk(self.k, dim=-1)
        extras = {**self.extras(), "noisy": noisy, "std": std}
        return token_choice(logits, softmax(logits), expert, weight, valid, extras=extras)

    def _std(self, tokens: Float[Tensor, "G S D"], logits: Float[Tensor, "G S E"]) -> Float[Tensor, "G S E"]:
        """Deviation of the noise on each logit."""
        if self.noise == "gaussian":
            return logits.new_full((), self.std).expand_as(logits)
        with full_precision(tokens.device):
            return F.softplus(project(tokens.to(logits.dtype), self.noise_weight))
