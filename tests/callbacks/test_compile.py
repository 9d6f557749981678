"""Training through torch.compile."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from small import KillAt, data, fit, module, trainer, weights

from switchkit import Decoder, Factor, MoELayer, Switch
from switchkit.callbacks import Compile

pytestmark = pytest.mark.usefixtures("unchecked")

STEADY = {
    "net": partial(
        Decoder, d_model=16, num_layers=1, num_heads=2, d_ff=24, num_experts=3, context=8, sparse="every(1)"
    ),
    "moe": partial(MoELayer, router=Switch, capacity=partial(Factor, train=1.25)),
}


@pytest.fixture(autouse=True)
def _quiet_compiler() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own compiler does what torch deprecates
        yield


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


class Calls(L.Callback):
    """Whether the model was compiled, in training and in validation."""

    def __init__(self) -> None:
        self.training: list[bool] = []
        self.validation: list[bool] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *rest: Any) -> None:
        self.training.append(pl_module.net._compiled_call_impl is not None)

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, *rest: Any) -> None:
        self.validation.append(pl_module.net._compiled_call_impl is not None)


@pytest.mark.slow
def test_trains_as_it_would_uncompiled(tmp_path: Path) -> None:
    """Without dropout and jitter, which draw other numbers: the same weights but for rounding, and the same names."""
    found = {}
    for name, callbacks in (("plain", []), ("compiled", [Compile(), seen := Calls()])):
        (tmp_path / name).mkdir()
        source = data(tmp_path / name)
        model = module(source, **STEADY)
        begin = weights(model)
        trainer(tmp_path / name, *callbacks, steps=12).fit(model, source)
        found[name] = weights(model), set(model.state_dict())
    # Compiled all along, and nowhere else; it is the model of everyday again after training.
    assert (seen.training, any(seen.validation), model.net._compiled_call_impl) == ([True] * 12, False, None)
    assert len(seen.validation) > 0
    assert found["compiled"][1] == found["plain"][1]
    # AdamW divides by small numbers: rounding of 1e-7 grows; what training moved is 0.3 of the weights.
    assert off(found["compiled"][0], begin) > 0.05
    assert off(found["compiled"][0], found["plain"][0]) < 1e-3


@pytest.mark.slow
def test_a_killed_run_resumes(tmp_path: Path) -> None:
    """Dropout and jitter within what is compiled draw from the generators that a checkpoint holds."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = weights(fit(tmp_path / "whole", Compile(), steps=20))
    with pytest.raises(KeyError, match="killed"):
        fit(tmp_path / "cut", KillAt(13), Compile(), steps=20)
    again = weights(fit(tmp_path / "cut", Compile(), resume=True, steps=20))
    assert torch.equal(again, whole)


@pytest.mark.slow
def test_a_compiler_that_is_missing(tmp_path: Path) -> None:
    from torch._inductor import config

    source = data(tmp_path)
    # Of a size of its own: what was compiled once is found on the disk.
    model = module(source, net=partial(STEADY["net"], d_ff=22))
    # torch's own way to set an option for a while: what pytest puts back is gone.
    missing = config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with missing, pytest.raises(ValueError, match="torch.compile does not work .* Leave the callback Compile out"):
        trainer(tmp_path, Compile(), steps=2).fit(model, source)
    assert config.cpp.cxx != (None, "no-such-compiler")
    assert model.net._compiled_call_impl is None


def test_what_it_cannot_compile(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode must be 'default', 'reduce-overhead', .*; got 'fast'"):
        Compile(mode="fast")  # type: ignore[arg-type]
    loop = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", max_steps=1, callbacks=[Compile()], logger=False)
    with pytest.raises(ValueError, match="BoringModel has none: call .compile"):
        loop.fit(BoringModel())
