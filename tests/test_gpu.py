"""What only a GPU shows: bfloat16 products with loads that stay on the device, no wait for it, and runs.

The contract of every part runs on it too, see `test_contract.py`.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from small import KillAt, data, fit, module, trainer, weights
from torch import Tensor

from switchkit import Decoder, Dispatcher, Dropless, Experts, Factor, MoELayer, Router, TopK, named
from switchkit.bench.layer import waits
from switchkit.callbacks import Compile
from switchkit.generation import generate
from switchkit.testing.cases import gradients, takes

pytestmark = pytest.mark.gpu

SIZES = {"d_model": 64, "num_experts": 8, "d_ff": 96}
DEVICE = torch.device("cuda")
WAITS = {"base"}  # solves an assignment problem, whose end must be asked for


def poison() -> None:
    """Memory that is given out next holds NaN."""
    blocks = [torch.full((2**size,), float("nan"), device="cuda") for size in range(8, 22) for _ in range(4)]
    del blocks


def layer_of(router: str = "switch", *, capacity: Any = Dropless, experts: str = "mlp", **more: Any) -> MoELayer:
    torch.manual_seed(0)
    cls = named(Router)[router]
    k = {"k": 2} if takes(cls, "k") else {}
    layer = MoELayer(
        **{**SIZES, **more}, router=partial(cls, **k), capacity=capacity, experts=partial(named(Experts)[experts])
    )
    for parameter in layer.router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.cuda().bfloat16()


def batch(width: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """2 sequences of 96 tokens; the second ends in padding."""
    torch.manual_seed(1)
    x = torch.randn(2, 96, width, device="cuda").bfloat16()
    valid = torch.ones(2, 96, dtype=torch.bool, device="cuda")
    valid[1, 70:] = False
    return x, valid, torch.randint(0, 50, (2, 96), device="cuda")


def results(layer: MoELayer, x: Tensor, valid: Tensor, call: Any = None) -> dict[str, Tensor]:
    """Outputs and the gradient of everything, for a random gradient of the outputs."""
    x = x.detach().requires_grad_()
    y, _ = (layer if call is None else call)(x, valid)
    torch.manual_seed(2)
    probe = torch.randn(y.shape).bfloat16().to(y)
    return {"y": y.detach(), **gradients((y * probe).sum(), x=x, **dict(layer.named_parameters()))}


def off(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("width", [64, 60], ids="width_{}".format)
@pytest.mark.parametrize("experts", ["mlp", "gated_mlp"])
@pytest.mark.parametrize("capacity", [Dropless, partial(Factor, train=0.5)], ids=["dropless", "drops"])
@pytest.mark.parametrize("router", ["switch", "top_k"])
def test_bfloat16_is_float64_rounded(router: str, capacity: Any, experts: str, width: int) -> None:
    """Outputs and every gradient, where memory held NaN before; 60 numbers are no multiple of 16 bytes.

    Against one-hot products on the CPU, which share neither rows nor kernels with it.
    """
    layer = layer_of(router, capacity=capacity, experts=experts, d_model=width)
    exact = copy.deepcopy(layer).double().cpu()
    exact.dispatcher = named(Dispatcher)["einsum"]()
    x, valid, _ = batch(width)
    wanted = results(exact, x.double().cpu(), valid.cpu())
    poison()
    found = results(layer, x, valid)
    for name, value in found.items():
        # Each of some six roundings in a row is off by up to 2^-8; an expert or a token mixed up by 0.1 and more.
        assert off(value, wanted[name]) < 4e-2, name


@pytest.mark.parametrize("dropped", [0.0, 0.5])
def test_one_expert_gets_everything(dropped: float) -> None:
    """The others' gradients are zeros, not what the memory held."""
    layer = layer_of(capacity=partial(Factor, train=8 * (1 - dropped)))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[3] = 1
    x = batch()[0].abs()
    poison()
    found = results(layer, x, torch.ones(2, 96, dtype=torch.bool, device="cuda"))
    for name in ("experts.w1", "experts.w2"):
        assert torch.isfinite(found[name]).all()
        assert (found[name].flatten(1).norm(dim=1) > 0).tolist() == [expert == 3 for expert in range(8)]


@pytest.mark.parametrize("capacity", [Dropless, partial(Factor, train=0.5)], ids=["dropless", "drops"])
@pytest.mark.parametrize("router", list(named(Router)))
def test_nothing_waits_for_the_device(router: str, capacity: Any) -> None:
    layer = layer_of(router, capacity=capacity)
    x, valid, ids = batch()
    x.requires_grad_()

    def step() -> None:
        y, _ = layer(x, valid, ids)
        y.backward(torch.ones_like(y))

    step()  # compiles what is compiled at first use
    assert waits(step, DEVICE) is (router in WAITS)


@pytest.mark.parametrize("experts", list(named(Experts)))
def test_no_expert_waits_for_the_device(experts: str) -> None:
    layer = layer_of("top_k", experts=experts)
    x, valid, _ = batch()
    x.requires_grad_()

    def step() -> None:
        y, _ = layer(x, valid)
        y.backward(torch.ones_like(y))

    assert waits(step, DEVICE) is False


class Waits(L.Callback):
    """What each step of training waits for."""

    def __init__(self) -> None:
        self.found: list[list[str]] = []

    def on_train_batch_start(self, *rest: Any) -> None:
        torch.cuda.set_sync_debug_mode("warn")
        self.caught = warnings.catch_warnings(record=True)
        self.seen = self.caught.__enter__()
        warnings.simplefilter("always")

    def on_train_batch_end(self, *rest: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.caught.__exit__(None, None, None)
        self.found.append([str(w.message) for w in self.seen if "synchroniz" in str(w.message)])


def test_a_step_waits_once(tmp_path: Path) -> None:
    source = data(tmp_path)
    seen = Waits()
    loop = trainer(tmp_path, steps=6, every=100, accelerator="gpu", precision="bf16-mixed", log_every_n_steps=25)
    loop.callbacks.append(seen)
    loop.fit(module(source), source)
    # Once, for its flag. The first step sets the device up, and the last one is validated and saved.
    assert [len(found) for found in seen.found[1:-1]] == [1] * 4, seen.found


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_killed_run_resumes(tmp_path: Path, precision: str) -> None:
    """The random state of the device is restored: dropout and jitter are drawn from it."""
    how = {"accelerator": "gpu", "precision": precision}
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = weights(fit(tmp_path / "whole", **how)).cpu()
    with pytest.raises(KeyError, match="killed"):
        fit(tmp_path / "cut", KillAt(17), **how)
    again = weights(fit(tmp_path / "cut", resume=True, **how)).cpu()
    # Sums on a GPU may run in another order each time; other draws of dropout move the weights by 0.01 and more.
    assert off(again, whole) < 1e-4


def test_generation_is_that_of_the_cpu() -> None:
    torch.manual_seed(0)
    moe = partial(MoELayer, router=partial(TopK, k=2))
    net = Decoder(vocab_size=30, d_model=32, num_layers=2, num_heads=2, d_ff=48, num_experts=4, context=64, moe=moe)
    net.eval()
    prompt = torch.randint(0, 30, (3, 5))
    wanted = generate(net, prompt, max_new_tokens=20, temperature=0.0).tokens
    assert torch.equal(generate(net.cuda(), prompt.cuda(), max_new_tokens=20, temperature=0.0).tokens.cpu(), wanted)


@pytest.mark.parametrize("router", ["switch", "top_k"])
def test_compiled_with_its_default_backend(router: str, unchecked: None) -> None:
    layer = layer_of(router, capacity=partial(Factor, train=1.0))
    x, valid, _ = batch()
    wanted = results(layer, x, valid)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        found = results(layer, x, valid, torch.compile(layer, fullgraph=True))
    for name, value in found.items():
        assert off(value, wanted[name]) < 4e-2, name


def test_frozen_experts_pass_the_gradient_on() -> None:
    """They have none of their own, and the tokens' is what it was."""
    layer = layer_of("top_k")
    x, valid, _ = batch()
    wanted = results(layer, x, valid)
    layer.experts.requires_grad_(False)
    x = x.detach().requires_grad_()
    y, _ = layer(x, valid)
    torch.manual_seed(2)
    (y * torch.randn(y.shape).bfloat16().to(y)).sum().backward()
    assert x.grad is not None
    assert off(x.grad, wanted["x"]) < 4e-2
    assert all(weight.grad is None for weight in layer.experts.parameters())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_killed_run_resumes_compiled(tmp_path: Path, unchecked: None, mode: str) -> None:
    """CUDA graphs draw dropout from the device's generator too, whose state a checkpoint holds."""
    how = {"accelerator": "gpu", "precision": "bf16-mixed", "steps": 20}
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        whole = weights(fit(tmp_path / "whole", Compile(mode), **how)).cpu()
        with pytest.raises(KeyError, match="killed"):
            fit(tmp_path / "cut", KillAt(13), Compile(mode), **how)
        again = weights(fit(tmp_path / "cut", Compile(mode), resume=True, **how)).cpu()
    assert off(again, whole) < 1e-4


@pytest.mark.parametrize("router", ["top_k", "base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recorded_as_graphs(router: str, dtype: torch.dtype, unchecked: None) -> None:
    """With what waits for the device between graphs: loops over loads in float32, an assignment problem."""
    layer = layer_of(router, capacity=partial(Factor, train=1.0)).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        compiled = torch.compile(layer, mode="reduce-overhead")
        for seed in range(4):  # compiled, recorded, then played back
            torch.manual_seed(seed)
            x = torch.randn(2, 96, 64, device="cuda").to(dtype)
            valid = torch.ones(2, 96, dtype=torch.bool, device="cuda")
            wanted = results(layer, x, valid)
            torch.compiler.cudagraph_mark_step_begin()
            found = results(layer, x, valid, compiled)
            for name, value in wanted.items():
                assert off(found[name], value) < 4e-2, (seed, name)
