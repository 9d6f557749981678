"""A capacity policy that gives overflow a second chance."""

from __future__ import annotations

from dataclasses import replace

import torch

from switchkit.capacity.base import place_by_arrival
from switchkit.capacity.policies import Factor, Rounding
from switchkit.checks import at_least, whole
from switchkit.records import Routing, experts_of
from switchkit.registry import register

__all__ = ["NoTokenLeftBehind"]


@register("no_token_left_behind")
class NoTokenLeftBehind(Factor):
    """What does not fit asks the token's next-best expert, round by round, and is dropped after `rounds` rounds.

    The first round is the router's own. An expert that is full already is asked all the same and takes up a round, as
    in the paper, where the second stage sends to the second-best expert whether it has room or not. A choice that the
    router did not make, such as a second one below a threshold, has asked nobody: its expert may be the next-best one.
    One of probability 0 is never asked.

    An assignment that moves from expert a to expert b keeps its weight times ``p_b / p_a``, that is p_b for raw
    probabilities. `load` and `asked` stay what the tokens asked for, so that a balance loss sees the overflow; `taken`
    and `expert` are what the experts got. The capacity is that of `factor`. Four rounds are Mesh TensorFlow's
    `ntlb_top_k`; the paper found no gain in quality.

    Raises:
        ValueError: as `factor`; rounds that is no integer or below 1; a router whose tokens do not all make the same
            number of choices.

    Source: arXiv 2101.03961, appendix B.
    """

    def __init__(
        self,
        train: float | None = 1.25,
        eval: float | None = None,
        *,
        rounds: int = 4,
        rounding: Rounding = "ceil",
        minimum: int = 1,
        multiple: int = 1,
    ) -> None:
        super().__init__(train, eval, rounding=rounding, minimum=minimum, multiple=multiple)
        whole("rounds", rounds)
        at_least(1, rounds=rounds)
        self.rounds = rounds

    @property
    def serves_by(self) -> str:
        return f"rounds={self.rounds}"

    def leaks(self, k: int) -> str | None:
        if self.rounds == 1 or (self.train is None and self.eval is None):
            return None
        return "no_token_left_behind serves first tries of later tokens before second tries of earlier ones"

    def serve(self, routing: Routing, limit: int | None, *, training: bool) -> Routing:
        if routing.k is None:
            raise ValueError("no_token_left_behind needs a router whose tokens choose; take `factor` with this one")
        asked = place_by_arrival(routing, limit)
        assert asked.slot is not None
        assert asked.kept is not None
        assert asked.load is not None
        if limit is None:
            return asked
        expert, slot, kept = asked.expert, asked.slot, asked.kept
        taken = asked.load.clamp(max=limit)
        open_ = ~experts_of(asked)
        for _ in range(self.rounds - 1):
            waiting = routing.chosen & ~kept
            expert, waiting, open_ = _next_best(routing, expert, waiting, open_)
            again = place_by_arrival(replace(routing, expert=expert, chosen=waiting), None)
            assert again.slot is not None
            assert again.load is not None
            place = again.slot + taken.gather(1, expert)
            fits = waiting & (place < limit)
            slot, kept = torch.where(fits, place, slot), kept | fits
            taken = (taken + again.load).clamp(max=limit)
        old, new = (
            routing.probs.flatten(1).gather(1, routing.token * routing.probs.shape[-1] + index)
            for index in (routing.expert, expert)
        )
        moved = kept & (expert != routing.expert)
        tiny = torch.finfo(old.dtype).tiny
        weight = torch.where(moved, routing.weight * new / old.clamp(min=tiny), routing.weight)
        expert = torch.where(kept, expert, routing.expert)
        sent = replace(asked, expert=expert, weight=weight, slot=slot, kept=kept, taken=taken)
        return replace(sent, asked=routing.expert, given=routing.weight)


def _next_best(
    routing: Routing, expert: torch.Tensor, waiting: torch.Tensor, open_: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each waiting assignment's next expert, best first choice first; without one it waits no more in this round.

    An expert of probability 0 is none: it is closed to the token, or would give it nothing.
    """
    assert routing.k is not None
    groups, size, _ = routing.logits.shape
    choices = list(expert.view(groups, size, routing.k).unbind(-1))
    waits = list(waiting.view(groups, size, routing.k).unbind(-1))
    probs = routing.probs.detach()
    for j in range(routing.k):
        best, index = probs.masked_fill(~open_, -1).max(-1)
        waits[j] = waits[j] & (best > 0)
        choices[j] = torch.where(waits[j], index, choices[j])
        spent = torch.zeros_like(open_).scatter(-1, index.unsqueeze(-1), waits[j].unsqueeze(-1))
        open_ = open_ & ~spent
    return torch.stack(choices, -1).flatten(1), torch.stack(waits, -1).flatten(1), open_
