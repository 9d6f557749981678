"""Capacity policies that follow from the sizes alone."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal, get_args

from switchkit.capacity.base import CapacityPolicy, Order, unfair
from switchkit.checks import at_least, one_of, whole
from switchkit.registry import register

__all__ = ["Dropless", "Factor", "Fixed", "Rounding"]

MOST = 2**31 - 1
"""Beyond any real number of tokens, and what is computed of it stays within 64 bits."""

Rounding = Literal["ceil", "floor", "round"]


@register("factor")
class Factor(CapacityPolicy):
    """Capacity as a multiple of the even share: ``factor * K * S / E`` tokens of a group for each expert.

    `train` and `eval` are the factors in the two modes, None meaning dropless: training drops what exceeds 1.25 times
    the even share (Table 1 of the source), evaluation nothing. The product is exact (1.2 means 6/5), then `rounding`
    applies ("round" goes to the even number at a half), then `minimum`, then the next `multiple`. `order` says who is
    served first over capacity: "arrival" (causal), "first_choices", "probability" or "random" (in training only), see
    `switchkit.capacity.base.place`. `train` may be set during training, as by `CapacitySchedule`.

    Elsewhere: floor in Mesh TensorFlow (with a minimum of 4) and labml, round in flaxformer, the next multiple of 4 in
    V-MoE and of 8 in OLMo-core; counted over the batch of a rank in DeepSpeed, Tutel and Megatron-LM, over the sequence
    in Hugging Face and st-moe-pytorch. GShard serves first choices first, Megatron-LM the largest probability, labml
    and DeepSpeed at random.

    Raises:
        ValueError: a factor that is not a finite number above 0, a minimum or multiple that is no integer or below 1,
            an unknown rounding or order.

    Source: arXiv 2101.03961, equation 3.
    """

    def __init__(
        self,
        train: float | None = 1.25,
        eval: float | None = None,
        *,
        rounding: Rounding = "ceil",
        minimum: int = 1,
        multiple: int = 1,
        order: Order = "arrival",
    ) -> None:
        self.train, self.eval = train, eval
        self.rounding, self.minimum, self.multiple, self.order = rounding, minimum, multiple, order
        one_of("order", order, get_args(Order))
        one_of("rounding", rounding, get_args(Rounding))
        for name, value in (("minimum", minimum), ("multiple", multiple)):
            whole(name, value)
            at_least(1, **{name: value})
            _check_most(name, value)

    @property
    def train(self) -> float | None:
        """The factor in training; None: dropless."""
        return self._train

    @train.setter
    def train(self, factor: float | None) -> None:
        self._train, self._train_ratio = factor, _exact("train", factor)

    @property
    def eval(self) -> float | None:
        """The factor in evaluation; None: dropless."""
        return self._eval

    @eval.setter
    def eval(self, factor: float | None) -> None:
        self._eval, self._eval_ratio = factor, _exact("eval", factor)

    def leaks(self, k: int) -> str | None:
        return None if self.train is None and self.eval is None else unfair(self.order, k)

    def limit(self, S: int, E: int, K: int, *, training: bool) -> int | None:
        ratio = self._train_ratio if training else self._eval_ratio
        if ratio is None:
            return None
        # Integers throughout: exact, and torch.compile follows them.
        above, below = ratio[0] * K * S, ratio[1] * E
        if self.rounding == "ceil":
            capacity = -(-above // below)
        elif self.rounding == "floor":
            capacity = above // below
        else:
            capacity = (2 * above + below) // (2 * below)
            if (2 * above + below) % (2 * below) == 0 and capacity % 2 == 1:
                capacity -= 1
        return -(-max(capacity, self.minimum) // self.multiple) * self.multiple


@register("fixed")
class Fixed(CapacityPolicy):
    """The same number of tokens of a group for each expert, whatever the group's length.

    `train` and `eval` are the numbers in the two modes, None meaning dropless. 64 is Hugging Face's `expert_capacity`.
    `order` says who is served first over capacity, as in `factor`.

    Elsewhere: Hugging Face uses the one number in training and in evaluation.

    Raises:
        ValueError: a number that is no integer or below 1, an unknown order.

    Source: `expert_capacity` of SwitchTransformersConfig, Hugging Face transformers.
    """

    def __init__(self, train: int | None = 64, eval: int | None = None, *, order: Order = "arrival") -> None:
        for name, value in (("train", train), ("eval", eval)):
            if value is not None:
                whole(f"{name} capacity", value)
            if value is not None and value < 1:
                raise ValueError(f"{name} capacity must be at least 1, or null for dropless; got {value}")
            _check_most(f"{name} capacity", value or 0)
        one_of("order", order, get_args(Order))
        self.train, self.eval, self.order = train, eval, order

    def leaks(self, k: int) -> str | None:
        return None if self.train is None and self.eval is None else unfair(self.order, k)

    def limit(self, S: int, E: int, K: int, *, training: bool) -> int | None:
        return self.train if training else self.eval


@register("dropless")
class Dropless(CapacityPolicy):
    """Every expert takes every token that comes: nothing is dropped.

    Source: arXiv 2211.15841 (MegaBlocks).
    """

    def limit(self, S: int, E: int, K: int, *, training: bool) -> int | None:
        return None


def _exact(name: str, factor: float | None) -> tuple[int, int] | None:
    """A factor as a ratio of integers, read from its decimal form so that 1.2 is 6/5."""
    if factor is None:
        return None
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"capacity factor {name} must be a finite number > 0, or null for dropless; got {factor}")
    _check_most(f"capacity factor {name}", factor)
    return Fraction(str(factor)).as_integer_ratio()


def _check_most(name: str, value: float) -> None:
    if value > MOST:
        raise ValueError(f"{name} must be at most {MOST}; got {value}")
