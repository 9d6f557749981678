"""The teacher: a model that is only asked, never trained."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from switchkit import checkpoints
from switchkit.capacity.policies import Dropless
from switchkit.checks import one_of
from switchkit.data.tokenizers import Tokenizer
from switchkit.distill.student import outside
from switchkit.layers import moe_layers
from switchkit.models import Output
from switchkit.module import LanguageModule

__all__ = ["Precision", "Teacher", "fingerprint", "frozen", "open_teacher"]

Precision = Literal["bf16"]


class Teacher:
    """A frozen model in evaluation mode and dropless, so without dropout and jitter; no part of the student's module.

    Args:
        module: holds the model; it is taken as it is, see `frozen`.
        about: what a checkpoint of the student keeps of it: ``{"path", "step", "sha256"}``.
        precision: what `cast` makes of the weights; null: nothing.
    """

    def __init__(self, module: LanguageModule, about: Mapping[str, Any], precision: Precision | None = None) -> None:
        self.module, self.about, self.precision = module, about, precision

    def cast(self) -> Teacher:
        """Keep the weights, and compute, in `precision` from now on; itself."""
        if self.precision is not None:
            self.module.to(torch.bfloat16)
        return self

    @property
    def net(self) -> nn.Module:
        """The model."""
        return self.module.net

    @property
    def spec(self) -> Mapping[str, Any]:
        """The description of the module that trained it."""
        return self.module.spec

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Its vocabulary."""
        return self.module.tokenizer

    @property
    def hugging_face(self) -> Mapping[str, Any]:
        """What the files said that it was imported from."""
        return self.module.hugging_face

    @property
    def vocab_size(self) -> int:
        """Symbols of its logits."""
        return int(self.net.get_parameter("embed.weight").shape[0])

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.net.parameters())

    def __call__(self, batch: Mapping[str, Tensor]) -> Output:
        """What it says of a batch, without a gradient; it moves to the batch's device first."""
        self.to(batch["tokens"].device)
        source = {name: batch[name] for name in ("source", "source_valid") if name in batch}
        with torch.no_grad():
            output: Output = self.net(batch["tokens"], batch.get("valid"), **source)
        return output

    def outside(self) -> dict[str, Tensor]:
        """Its weights outside sparse layers."""
        return outside(self.net)

    def to(self, device: torch.device) -> None:
        if self.module.device != device:
            self.module.to(device)


def open_teacher(
    given: str | Path | LanguageModule, precision: Precision | None = None, *, cast: bool = True
) -> Teacher:
    """The teacher of a checkpoint, or a copy of a module's model, which itself stays as it is.

    torch's random state stays as it was, so that a student begins as it would without a teacher.

    Args:
        given: a checkpoint's path, or a module.
        precision: "bf16" keeps the weights, and computes, in bfloat16; null: as they are.
        cast: False: not before `Teacher.cast` is called, so that a student can begin with the weights as they are.

    Raises:
        ValueError: see `checkpoints.read`; a module that is no LanguageModule.
    """
    one_of("teacher_precision", precision, (None, "bf16"))
    if isinstance(given, LanguageModule):
        about = {"path": None, "step": 0, "sha256": fingerprint(given)}
        # All but the Trainer that it may still know.
        module = copy.deepcopy(given, {id(given._trainer): None})
    elif isinstance(given, (str, Path)):
        with torch.random.fork_rng(devices=[]):
            module = LanguageModule.load_from_checkpoint(given)
        step = int(checkpoints.read_settings(given)["step"])
        about = {"path": str(Path(given).expanduser().absolute()), "step": step, "sha256": fingerprint(module)}
    else:
        raise ValueError(f"teacher must be the path of a checkpoint or a LanguageModule; got a {type(given).__name__}")
    made = Teacher(frozen(module), about, precision)
    return made.cast() if cast else made


def frozen(module: LanguageModule) -> LanguageModule:
    """`module` itself, made a teacher: evaluation mode, no gradients, no capacity.

    Routers that choose by capacity (expert_choice, soft) go on doing so.
    """
    for layer in moe_layers(module).values():
        layer.capacity = Dropless()
    return module.eval().requires_grad_(False)


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of all weights and their names."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
