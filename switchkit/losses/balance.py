"""The losses that keep the load even, over a batch and within each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from switchkit.checks import one_of
from switchkit.losses.base import Loss, by_stack, check_stacks, over_layers
from switchkit.records import Routing, count_choices, count_tokens, sum_probs, target_k
from switchkit.registry import register

__all__ = ["Balance", "SequenceBalance", "balance", "evenness"]


def evenness(
    counts: Int[Tensor, "rows bins"],
    total: Int[Tensor, "rows"],
    probs: Float[Tensor, "rows bins"],
    tokens: Int[Tensor, "rows"],
) -> Float[Tensor, ""]:
    """``bins * sum_i (counts_i / total) (probs_i / tokens)``, averaged over the rows that hold a real token."""
    share = counts.to(probs.dtype) / total.clamp(min=1).unsqueeze(-1)
    mean = probs / tokens.clamp(min=1).unsqueeze(-1)
    return counts.shape[-1] * (share * mean).sum() / (tokens > 0).sum().clamp(min=1)


def balance(
    *routings: Routing,
    load: Literal["before", "after"] = "before",
    choices: Literal["all", "first"] = "all",
    per: Literal["batch", "sequence", "group"] = "batch",
    counted: Int[Tensor, "E"] | None = None,
) -> Float[Tensor, ""]:
    """``E * sum_e f_e P_e``: f the share of assignments (before the drop), P the mean probability.

    1 at uniform probabilities for every k, E/k at the worst; zero when every token is padding. (1 is not its minimum:
    a load that opposes the probabilities gives less.) The options are those of `Balance`. With several routings the
    tokens of all are pooled before the product. `counted`: assignments per expert to take f from, in place of theirs.
    """
    parts = []
    for r in routings:
        counts = count_choices(r, per, kept=load == "after", first=choices == "first")
        parts.append((counts, sum_probs(r, per), count_tokens(r, per)))
    if not parts:
        return torch.zeros(())
    shapes = {tuple(counts.shape) for counts, _, _ in parts}
    if len(shapes) > 1:
        raise ValueError(
            f"layers of different [rows, experts] cannot be pooled; got {sorted(shapes)}: use layers='mean' or 'sum'"
        )
    counts, probs, tokens = parts[0]
    for more in parts[1:]:
        counts, probs, tokens = counts + more[0], probs + more[1], tokens + more[2]
    if counted is not None:
        counts = counted.unsqueeze(0)
    return evenness(counts, counts.sum(-1), probs, tokens)


@register("balance")
class Balance(Loss):
    """The auxiliary load-balancing loss of the Switch Transformer, on the tokens of a micro-batch.

    ``E * sum_e f_e P_e``, where f is the share of assignments that expert e gets and P its mean probability. The
    gradient goes through P. The weight of 0.01 is the paper's.

    Args:
        weight: the factor of this term in the loss.
        layers: "mean" over the sparse layers (t5x), so that its weight does not depend on the depth; "sum" (the paper,
            Mesh TensorFlow, labml); "pooled": the tokens of all layers together, then one product (Hugging Face). For
            parity only: **pooled hides collapse**. Four layers that each send everything to another expert give 1,
            as if all were even, where mean gives 4: https://github.com/huggingface/transformers/issues/28255
        scale: 1 when balanced ("one"), or k ("k", Hugging Face's Mixtral family): the number of choices that a token is
            to make on average, where that varies (relu, expert_choice).
        load: f is the share of what was chosen ("before" the drop, so that dropping cannot hide an overload), or of
            what was kept ("after").
        choices: f counts "all" k choices, or only the "first" of each token (GShard, Mesh TensorFlow, t5x, ST-MoE).
        per: f and P over the "batch", or over each "sequence", then averaged over the sequences that hold a real token
            (Hugging Face's Switch): it punishes a sequence that needs few experts in a batch that is even. "group":
            over each group of tokens that share a capacity (GShard, Mesh TensorFlow, t5x).
        scope: f is counted over the "micro"-batch; over all micro-batches of the optimizer step so far, on this "rank";
            or over those of all ranks ("global"). Small micro-batches then need not be even each by itself, and experts
            may specialise (arXiv 2501.11873, section 3). P is always the micro-batch's.
        stacks: sparse layers of each stack of the model, encoder first, such as [6, 6]: each has a term of its own, and
            these are added (Hugging Face's Switch); null: all layers together.

    Elsewhere: Hugging Face's Mixtral, OLMoE and Qwen are layers="pooled", scale="k"; its Switch is layers="pooled",
    per="sequence", stacks, padding counted. GShard divides by E where Switch multiplies. Megatron, MegaBlocks and
    OLMo-core divide by k as here.

    Raises:
        ValueError: a negative or non-finite weight, another word for an option, a negative stack; when called,
            choices="first" with a router without k choices per token, best first; "pooled" over layers of different
            sizes; stacks that are not those of the model. A scope beyond the micro-batch with load, choices or per
            other than their defaults.

    Source: arXiv 2101.03961, equations 4 to 6.
    """

    def __init__(
        self,
        weight: float = 0.01,
        *,
        layers: Literal["mean", "sum", "pooled"] = "mean",
        scale: Literal["one", "k"] = "one",
        load: Literal["before", "after"] = "before",
        choices: Literal["all", "first"] = "all",
        per: Literal["batch", "sequence", "group"] = "batch",
        scope: Literal["micro", "rank", "global"] = "micro",
        stacks: list[int] | None = None,
    ) -> None:
        super().__init__(weight)
        self.layers = one_of("layers", layers, ("mean", "sum", "pooled"))
        self.scale = one_of("scale", scale, ("one", "k"))
        self.load = one_of("load", load, ("before", "after"))
        self.choices = one_of("choices", choices, ("all", "first"))
        self.per = one_of("per", per, ("batch", "sequence", "group"))
        self.scope = one_of("scope", scope, ("micro", "rank", "global"))
        self.stacks = check_stacks(stacks)
        if self.scope != "micro" and (load, choices, per) != ("before", "all", "batch"):
            raise ValueError(
                f"scope={scope!r} counts all choices of the step before the drop: leave load, choices and per at their "
                f"defaults; got load={load!r}, choices={choices!r}, per={per!r}"
            )

    def __call__(self, routings: Sequence[Routing], counted: Int[Tensor, "L E"] | None = None) -> Float[Tensor, ""]:
        rows: list[Tensor | None] = [None] * len(routings) if counted is None else list(counted)
        pairs = list(zip(routings, rows, strict=True))
        stacks = [len(pairs)] if self.stacks is None else self.stacks
        return over_layers([self._together(stack) for stack in by_stack(pairs, stacks)], "sum")

    def _together(self, pairs: Sequence[tuple[Routing, Tensor | None]]) -> Float[Tensor, ""]:
        routings = [routing for routing, _ in pairs]
        factors = [target_k(r) if self.scale == "k" else 1 for r in routings]
        if self.layers == "pooled":
            # A k that is a tensor is not read, which would wait for the device: such ones count by their mean.
            known = [factor for factor in factors if not isinstance(factor, Tensor)]
            if len(set(known)) > 1:
                raise ValueError(f"layers='pooled' with scale='k' needs one k; got {known}: use layers='mean'")
            rows = [row for _, row in pairs if row is not None]
            together = self._of(*routings, counted=torch.stack(rows).sum(0) if rows else None)
            return together * sum(factors) / max(len(factors), 1)
        terms = [factor * self._of(r, counted=row) for factor, (r, row) in zip(factors, pairs, strict=True)]
        return over_layers(terms, self.layers)

    def _of(self, *routings: Routing, counted: Tensor | None) -> Float[Tensor, ""]:
        if counted is not None:
            counted = counted[: routings[0].logits.shape[-1]]  # rows are filled up to the widest layer
        return balance(*routings, load=self.load, choices=self.choices, per=self.per, counted=counted)


@register("sequence_balance")
class SequenceBalance(Loss):
    """The balance loss within each sequence, averaged over the sequences, as DeepSeek-V3 adds it to its bias.

    Per sequence ``sum_e f_e P_e`` with f_e = E / (k T) times the choices of expert e and P_e the mean of its
    normalised score, padding apart; sequences without a real token are left out. 1 at uniform scores. `layers`: "mean"
    over the sparse layers, or "sum". The weight of 0.0001 is the paper's: only extremes within one sequence matter
    there, the bias does the rest.

    Sequences are seen whatever the groups.

    Elsewhere: OLMo-core and Megatron offer it as 'instance' and sequence-level balance loss; Hugging Face trains
    DeepSeek-V3 without any.

    Raises:
        ValueError: a negative or non-finite weight, another word for `layers`.

    Source: arXiv 2412.19437, equations 17 to 20.
    """

    def __init__(self, weight: float = 0.0001, *, layers: Literal["mean", "sum"] = "mean") -> None:
        super().__init__(weight)
        self.layers = one_of("layers", layers, ("mean", "sum"))

    def __call__(self, routings: Sequence[Routing]) -> Float[Tensor, ""]:
        return over_layers([balance(r, per="sequence") for r in routings], self.layers)
