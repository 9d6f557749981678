"""The shapes that are measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["CPU_SHAPES", "CUDA_SHAPES", "Shape", "goal", "read_shape"]


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer: T tokens of width d, E experts of width f, k of them per token.

    A gated expert is three products, another two.
    """

    tokens: int
    d_model: int
    d_ff: int
    experts: int
    k: int
    gated: bool = False

    def __str__(self) -> str:
        sizes = (self.tokens, self.d_model, self.d_ff, self.experts, self.k)
        return ",".join(map(str, sizes)) + (",gated" if self.gated else "")

    @property
    def flops(self) -> int:
        """Of the products in forward and backward, a multiply-add counting as two; the router left out."""
        return 3 * 2 * (3 if self.gated else 2) * self.tokens * self.k * self.d_model * self.d_ff

    def groups(self, longest: int) -> tuple[int, int]:
        """The tokens as sequences of equal length: how many, and how long."""
        length = math.gcd(self.tokens, longest)
        return self.tokens // length, length


CPU_SHAPES = (Shape(4096, 256, 1024, 8, 2), Shape(2048, 128, 256, 4, 1), Shape(4096, 256, 512, 64, 1))
CUDA_SHAPES = (Shape(16384, 1024, 4096, 8, 1, True), Shape(65536, 2048, 1408, 64, 8, True))

_GOALS = dict(zip(CPU_SHAPES, (1.10, 1.40, 1.65), strict=True))


def goal(shape: Shape, dispatcher: str, device: str, dtype: str) -> float | None:
    """The ratio to dense that the project wants at most, where it has set one: two CPU cores, float32."""
    return _GOALS.get(shape) if (dispatcher, device, dtype) == ("sorted", "cpu", "fp32") else None


def read_shape(text: str) -> Shape:
    """``4096,256,1024,8,2`` or ``16384,1024,4096,8,1,gated``.

    Raises:
        ValueError: anything else; says what is wrong with it.
    """
    numbers, gated = text.split(","), False
    if numbers[-1] == "gated":
        numbers, gated = numbers[:-1], True
    if len(numbers) != 5 or not all(number.strip().isdecimal() and int(number) > 0 for number in numbers):
        raise ValueError(f"expected T,d,f,E,k or T,d,f,E,k,gated in whole numbers above 0, got {text!r}")
    tokens, d_model, d_ff, experts, k = map(int, numbers)
    shape = Shape(tokens, d_model, d_ff, experts, k, gated)
    if shape.k > shape.experts:
        raise ValueError(f"{text}: a token cannot choose k={shape.k} of E={shape.experts} experts")
    return shape
