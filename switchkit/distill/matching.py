"""Terms on what lies within both models: hidden states, and how tokens relate to one another in attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from switchkit.attention import Attention
from switchkit.blocks import Block
from switchkit.distill.loss import hidden_loss, real, relation_loss
from switchkit.experts.base import init_linear
from switchkit.parallel.place import part_like

__all__ = ["Inside", "Matching", "even_map", "watched"]


@dataclass
class Inside:
    """What was seen of one forward pass, filled while it runs."""

    hidden: dict[int, Float[Tensor, "B S D"]] = field(default_factory=dict)
    """Outputs of blocks, by the block's number, the encoder's first."""
    projected: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    """Queries, keys and values of self-attention [B, S, heads * width], before positions turn them."""


@contextmanager
def watched(net: nn.Module, hidden: Sequence[int] = (), projected: Sequence[int] = ()) -> Iterator[Inside]:
    """Collect from the next forward pass of `net` the outputs of some blocks and the projections of others.

    By hooks that are gone afterwards, so that the model itself knows nothing of it.
    """
    inside, blocks, handles = Inside(), blocks_of(net), []
    for number in hidden:

        def keep(block: nn.Module, given: Any, out: Any, number: int = number) -> None:
            inside.hidden[number] = out[0]

        handles.append(blocks[number].register_forward_hook(keep))
    for number in projected:
        attention: Any = blocks[number].attention
        width, heads, kv = attention.head_width, attention.num_heads, attention.num_kv_heads
        sizes = (heads * width, kv * width, kv * width)

        def split(
            part: nn.Module, given: Any, out: Tensor, number: int = number, sizes: tuple[int, ...] = sizes
        ) -> None:
            q, k, v = out.split_with_sizes(sizes, -1)
            inside.projected[number] = q, k, v

        handles.append(attention.qkv.register_forward_hook(split))
    try:
        yield inside
    finally:
        for handle in handles:
            handle.remove()


def even_map(student: Sequence[int], teacher: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of layers: layer i of n goes with the teacher's at the same share of its depth, the last with the last.

    What is shallower than the teacher's first layer goes with that one.
    """
    share = len(teacher) / len(student)
    return [(number, teacher[max(round((i + 1) * share), 1) - 1]) for i, number in enumerate(student)]


def blocks_of(net: nn.Module) -> list[Block]:
    return [part for part in net.modules() if isinstance(part, Block)]


class Matching(nn.Module):
    """The optional terms between a student and a teacher of the same family.

    Where the widths of the two differ, a learned matrix takes the student's hidden states to the teacher's width. It
    belongs to training and not to the student: the state dict does not have it (see `extra`).

    Args:
        student: the model that learns.
        teacher: the model that is matched.
        hidden_weight: of `hidden_loss`, the mean over the pairs of layers; 0: none.
        hidden_layers: pairs of a student's and a teacher's block, by number, the encoder's first; null: `even_map`.
        attention_weight: of `relation_loss`, the mean over queries, keys and values of the last block of each stack;
            0: none.
        relation_heads: heads of the relations; null: as many as the student's attention has.

    Raises:
        ValueError: a weight that is negative, blocks that do not exist or read other tokens, attention whose
            projections are no plain matrix, heads that do not divide a width, blocks or heads of a term without weight.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        hidden_weight: float = 0.0,
        hidden_layers: Sequence[Sequence[int]] | None = None,
        attention_weight: float = 0.0,
        relation_heads: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("hidden_weight", hidden_weight), ("attention_weight", attention_weight)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least 0; got {value}")
        if hidden_layers is not None and not hidden_weight:
            raise ValueError(
                f"hidden_layers {hidden_layers} does nothing while hidden_weight is 0: set it above 0, or leave "
                "hidden_layers out"
            )
        if relation_heads is not None and not attention_weight:
            raise ValueError(
                f"relation_heads {relation_heads} does nothing while attention_weight is 0: set it above 0, or leave "
                "relation_heads out"
            )
        self.hidden_weight, self.attention_weight = hidden_weight, attention_weight
        ours, theirs = blocks_of(student), blocks_of(teacher)
        stacks = list(zip(_stacks(ours), _stacks(theirs), strict=True))
        even = [pair for own, other in stacks for pair in even_map(own, other)]
        self.pairs = even if hidden_layers is None else _checked(hidden_layers, ours, theirs)
        self.pairs = self.pairs if hidden_weight else []
        self.last = [(own[-1], other[-1]) for own, other in stacks] if attention_weight else []
        self.encoder = {number for number, block in enumerate(ours) if not _causal(block)}
        self.heads = 0 if relation_heads is None else relation_heads
        for own, other in self.last:
            first, second = (_plain(block.attention, attention_weight) for block in (ours[own], theirs[other]))
            self.heads = first.num_heads if relation_heads is None else relation_heads
            for size in (*_widths(first), *_widths(second)):
                if self.heads < 1 or size % self.heads:
                    raise ValueError(
                        f"relation_heads {self.heads} does not divide {size}, the width of the queries, keys or values "
                        "of a model: choose a common divisor"
                    )
        for own, other in self.pairs:
            narrow, wide = (_width(block) for block in (ours[own], theirs[other]))
            if narrow != wide:
                weight = nn.Parameter(torch.empty(wide, narrow))
                init_linear(weight, narrow)
                self.register_parameter(f"from_{own}_to_{other}", weight)

    @property
    def active(self) -> bool:
        """Whether there is a term at all."""
        return bool(self.pairs or self.last)

    def watch(self, student: nn.Module, teacher: nn.Module) -> tuple[Any, Any]:
        """Contexts that see what the terms need of both."""
        return (
            watched(student, [own for own, _ in self.pairs], [own for own, _ in self.last]),
            watched(teacher, sorted({other for _, other in self.pairs}), [other for _, other in self.last]),
        )

    def forward(self, student: Inside, teacher: Inside, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, ""]]:
        """The unweighted terms, by name: means over real targets, as the cross-entropy is; in the encoder, over the
        source."""
        terms: dict[str, Tensor] = {}
        if self.pairs:
            each = []
            for own, other in self.pairs:
                x = student.hidden[own]
                weight = getattr(self, f"from_{own}_to_{other}", None)
                x = x if weight is None else x.float() @ weight.float().t()
                each.append(hidden_loss(x, teacher.hidden[other], self._counted(own, batch)))
            terms["hidden"] = torch.stack(each).mean()
        if self.last:
            each = [
                relation_loss(
                    x,
                    y,
                    self.heads,
                    self._valid(own, batch),
                    causal=own not in self.encoder,
                    counted=self._counted(own, batch),
                )
                for own, other in self.last
                for x, y in zip(student.projected[own], teacher.projected[other], strict=True)
            ]
            terms["relations"] = torch.stack(each).mean()
        return terms

    def weighted(self, terms: Mapping[str, Tensor]) -> Float[Tensor, ""] | float:
        weights = {"hidden": self.hidden_weight, "relations": self.attention_weight}
        return sum((weights[name] * value for name, value in terms.items()), 0.0)

    def extra(self) -> dict[str, Tensor]:
        """The learned matrices, which a checkpoint keeps beside the student; whole, so by all processes at once."""
        return {name: _whole(value.detach()).cpu() for name, value in self.named_parameters()}

    @torch.no_grad()
    def load_extra(self, values: Mapping[str, Tensor]) -> None:
        """Take them from a checkpoint.

        Raises:
            ValueError: those of other pairs of layers or widths.
        """
        own = dict(self.named_parameters())
        if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in values.items()}:
            raise ValueError(
                f"the checkpoint has projections {sorted(values)}, and this run {sorted(own)}: resume with the "
                "hidden_layers and the model of the checkpoint"
            )
        for name, value in values.items():
            like = own[name].data
            like.copy_(part_like(value, like) if isinstance(like, DTensor) else value)

    def _save_to_state_dict(self, *given: Any, **more: Any) -> None:
        """Nothing: whoever reads the student has no use for it."""

    def _load_from_state_dict(self, *given: Any, **more: Any) -> None:
        """Nothing, likewise."""

    def _valid(self, block: int, batch: Mapping[str, Tensor]) -> Tensor | None:
        return batch.get("source_valid" if block in self.encoder else "valid")

    def _counted(self, block: int, batch: Mapping[str, Tensor]) -> Tensor | None:
        """What the loss of a step is weighted by, so that micro-batches and devices add up to the whole batch."""
        valid = self._valid(block, batch)
        return valid if block in self.encoder else real(batch["targets"], valid)


def _whole(value: Tensor) -> Tensor:
    """Of a part that this process has."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _stacks(blocks: Sequence[Block]) -> list[list[int]]:
    """Numbers of the encoder's blocks, then of the decoder's; of a decoder alone all at once."""
    parts = [[n for n, block in enumerate(blocks) if _causal(block) == causal] for causal in (False, True)]
    return [part for part in parts if part]


def _causal(block: Block) -> bool:
    return bool(getattr(block.attention, "causal", True))


def _plain(attention: Any, weight: float) -> Attention:
    """Attention whose queries, keys and values are one matrix's."""
    if not (isinstance(attention, Attention) and isinstance(attention.qkv, nn.Linear)):
        raise ValueError(
            f"attention_weight {weight:g}: queries, keys and values of {type(attention).__name__} are not one plain "
            "projection, so they have no relations to match; leave attention_weight at 0"
        )
    return attention


def _width(block: Any) -> int:
    return int(block.mlp_norm.weight.shape[0])


def _widths(attention: Attention) -> tuple[int, int]:
    return attention.num_heads * attention.head_width, attention.num_kv_heads * attention.head_width


def _checked(pairs: Sequence[Sequence[int]], ours: Sequence[Block], theirs: Sequence[Block]) -> list[tuple[int, int]]:
    found = []
    for pair in pairs:
        if len(pair) != 2 or not (0 <= pair[0] < len(ours) and 0 <= pair[1] < len(theirs)):
            raise ValueError(
                f"hidden_layers pairs a block of the student, 0 to {len(ours) - 1}, with one of the teacher, 0 to "
                f"{len(theirs) - 1}, such as [[0, 1], [1, 3]]; got {list(pair)}"
            )
        if _causal(ours[pair[0]]) != _causal(theirs[pair[1]]):
            raise ValueError(
                f"hidden_layers pairs {list(pair)}, a block of an encoder and one of a decoder, which read other "
                "tokens: pair the encoder's, which are counted first, with each other, and the decoder's likewise"
            )
        found.append((pair[0], pair[1]))
    if not found:
        raise ValueError("hidden_layers is empty: name pairs of blocks, or leave it out")
    return found
