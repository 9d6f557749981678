"""Layers of other libraries, measured beside ours."""

from __future__ import annotations

import importlib
import importlib.util

from torch import nn

from switchkit.bench.shapes import Shape
from switchkit.cli.errors import UserError

__all__ = ["check_peers", "mixtral"]


def check_peers() -> None:
    """Raise where the other library is missing.

    Raises:
        UserError: transformers is not installed, or too old for grouped products.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UserError("--peers needs Hugging Face transformers: pip install 'switchkit[hf]', or leave out --peers")
    try:
        importlib.import_module("transformers.integrations.moe")
    except ImportError as error:
        raise UserError(f"--peers needs transformers 5.23 or later with its grouped experts: {error}") from error


def mixtral(shape: Shape) -> nn.Module:
    """Hugging Face's Mixtral block, router included, its experts by grouped_mm: gated, three products per expert."""
    model = importlib.import_module("transformers.models.mixtral")
    config = model.MixtralConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.k,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_hidden_layers=1,
    )
    config._experts_implementation = "grouped_mm"
    block = importlib.import_module("transformers.models.mixtral.modeling_mixtral").MixtralSparseMoeBlock(config)
    for weight in block.parameters():
        nn.init.trunc_normal_(weight, std=(0.1 / weight.shape[-1]) ** 0.5)
    assert isinstance(block, nn.Module)
    return block
