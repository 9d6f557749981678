"""What a family is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from switchkit.experts.base import Activation
from switchkit.interop.config import Config
from switchkit.interop.keys import Keys
from switchkit.layers import MoELayer
from switchkit.losses.base import Loss, LossFactory

__all__ = ["ACTIVATIONS", "EVERY_MODEL", "Family", "Plan", "activation_word", "refuse_changes", "shape_of"]

ACTIVATIONS: Mapping[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}
"""Hugging Face's words for activations, and ours."""

EVERY_MODEL = (r".*rotary_emb\.inv_freq",)
"""Tensors that no model of today reads: old llama files hold the angles of their positions."""


@dataclass(frozen=True)
class Plan:
    """What a configuration builds, as `LanguageModule` takes it."""

    vocab_size: int
    net: partial[Any]
    moe: partial[MoELayer] | None = None
    losses: Sequence[LossFactory] = ()


@dataclass(frozen=True)
class Family:
    """One model family of transformers."""

    name: str
    """Its `model_type`."""
    architecture: str
    """The class that its files are made for."""
    plan: Callable[[Config, bool, int | None], Plan]
    """Reads a config; `tied` says whether the output layer shares the embedding, `context` (null: as the config has it)
    the longest sequence."""
    net: type[nn.Module]
    """The class of ours that it becomes."""
    keys: Callable[[nn.Module], Iterator[Keys]]
    """The table of a model's tensors."""
    describe: Callable[[nn.Module, Sequence[Loss]], dict[str, Any]]
    """The config of a model, which may turn out not to be one of this family: `plan` of it must build the same."""
    tied: Callable[[Config], bool]
    """Whether the config has the output layer share the embedding."""
    ignored: Callable[[Config], Sequence[str]] = lambda config: ()
    """Patterns of tensors that transformers leaves unread in this family."""


def refuse_changes(config: Config) -> None:
    """Refuses what changes any model: quantized weights, other settings in some layers, a decoder that looks ahead.

    Raises:
        ValueError: names the key.
    """
    for name, why in (
        ("quantization_config", "the weights are quantized: save the model without quantization first"),
        ("per_layer_config", "layers with settings of their own are not built here"),
    ):
        if config.values.get(name):
            config.refuse(name, why)
    # Null is false there, too.
    if not config.values.get("is_causal", True):
        config.refuse("is_causal", "a decoder that sees what follows is not built here")


def activation_word(activation: str, tanh: str = "gelu_pytorch_tanh") -> str:
    """Hugging Face's word for one of our activations; it has two for GELU by tanh, one of which is T5's."""
    return tanh if activation == "gelu_tanh" else activation


def shape_of(part: nn.Module, name: str, kind: type[nn.Module], family: str) -> Any:
    """`part`, which must be of one class.

    Raises:
        ValueError: names the place and the class.
    """
    if type(part) is not kind:
        raise ValueError(f"{name} is a {type(part).__name__}, where {family} has a {kind.__name__}")
    return part
