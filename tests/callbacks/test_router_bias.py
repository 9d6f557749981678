"""Balancing without a loss: the bias moves once per step, by the counts of that step, and no other way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from small import NET, data, module, trainer, weights
from torch import Tensor

from switchkit import LanguageModule, MoELayer, Sigmoid, TopK, checkpoints
from switchkit.callbacks import UpdateRouterBias
from switchkit.callbacks.router_bias import bias_update

BIASED = partial(MoELayer, router=partial(Sigmoid, k=1))
SGD = partial(torch.optim.SGD, lr=0.1)


class BareBias(Sigmoid):
    """A router that forgot to protect its bias from casts."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return torch.nn.Module._apply(self, fn, recurse)


class Watch(L.Callback):
    """Keeps the counts of every micro-batch and the biases after it."""

    def __init__(self) -> None:
        self.counts: list[Tensor] = []
        self.biases: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, model: Any, outputs: Any, batch: Any, index: int) -> None:
        self.counts.append(outputs["stats"]["load"].clone())
        self.biases.append(biases(model))


class KillAt(L.Callback):
    def __init__(self, batch: int) -> None:
        self.left = batch

    def on_train_batch_start(self, *rest: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyError("killed")


class SaveAt(L.Callback):
    """Saves after some micro-batch, wherever in a step that is."""

    def __init__(self, batch: int, path: Path) -> None:
        self.left, self.path = batch, path

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)


def biases(model: LanguageModule) -> Tensor:
    return torch.stack([block.mlp.router.bias.clone() for block in model.net.blocks])


def fit(folder: Path, *callbacks: L.Callback, resume: Path | None = None, **options: Any) -> LanguageModule:
    folder.mkdir(exist_ok=True)
    size = options.pop("batch_size", 4)
    source = data(folder, batch_size=size)
    model = module(source, moe=BIASED)
    if resume is not None:
        torch.manual_seed(99)
    trainer(folder, *callbacks, **{"steps": 9, **options}).fit(model, source, ckpt_path=resume)
    return model


@pytest.mark.daily("3-True")
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_bias_follows_a_loop_over_micro_batches(tmp_path: Path, center: bool, accumulate: int) -> None:
    """Seven steps of which the first five count, with validations in between, by plain integers."""
    watch, callback = Watch(), UpdateRouterBias(0.01, freeze_step=5, center=center)
    fit(tmp_path, callback, watch, steps=7, accumulate_grad_batches=accumulate, val_check_interval=2)
    expected = [[0.0] * 3, [0.0] * 3]
    for step in range(7):
        for layer in range(2):
            counts = [0, 0, 0]
            for micro in range(accumulate):
                for e in range(3):
                    counts[e] += int(watch.counts[step * accumulate + micro][layer, e])
            assert sum(counts) == accumulate * 4 * 8
            # Compared without a division: counts[e] against the mean, both times 3.
            moves = [0.01 * ((3 * c < sum(counts)) - (3 * c > sum(counts))) for c in counts]
            mean = sum(moves) / 3 if center else 0
            if step < 5:
                expected[layer] = [b + move - mean for b, move in zip(expected[layer], moves, strict=True)]
        # On the first micro-batches of a step nothing moves; after the last, the step's move is there.
        for micro in range(accumulate - 1):
            before = watch.biases[step * accumulate - 1] if step else torch.zeros(2, 3)
            assert torch.equal(watch.biases[step * accumulate + micro], before)
        after = watch.biases[(step + 1) * accumulate - 1]
        torch.testing.assert_close(after, torch.tensor(expected), rtol=1e-5, atol=1e-7)
    assert (after != 0).any()


def test_accumulated_halves_move_the_bias_as_the_whole(tmp_path: Path) -> None:
    found = []
    for size, accumulate in ((8, 1), (4, 2)):
        (tmp_path / str(size)).mkdir()
        source = data(tmp_path / str(size), batch_size=size)
        torch.manual_seed(0)
        model = LanguageModule(
            partial(NET, dropout=0.0), moe=BIASED, losses=[], tokenizer=source.tokenizer, optimizer=SGD
        )
        callback = UpdateRouterBias(0.05)
        trainer(tmp_path / str(size), callback, steps=3, accumulate_grad_batches=accumulate).fit(model, source)
        found.append(biases(model))
    assert torch.equal(found[0], found[1])
    assert (found[0] != 0).any()


def test_an_uneven_load_becomes_even(tmp_path: Path) -> None:
    """What it is for: a router that sends everything to one expert, held still, spreads in some steps."""
    source = data(tmp_path)
    model = module(source, moe=BIASED, losses=[], optimizer=partial(torch.optim.SGD, lr=0.0))
    for block in model.net.blocks:
        torch.nn.init.zeros_(block.mlp.router.weight)
        block.mlp.router.weight.data[0] = 0.02 * torch.randn(16)
        block.mlp.router.bias[0] = 0.1
    watch = Watch()
    trainer(tmp_path, UpdateRouterBias(0.005), watch, steps=30).fit(model, source)
    first, last = watch.counts[0], torch.stack(watch.counts[-8:]).sum(0)
    assert (first.amax(-1) == 32).all()
    assert (last.amax(-1) * 3 / last.sum(-1) < 2).all()


@pytest.mark.daily("2")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_killed_run_resumes_bit_identical(tmp_path: Path, accumulate: int) -> None:
    options = {"accumulate_grad_batches": accumulate}
    whole = fit(tmp_path / "a", UpdateRouterBias(0.01), **options)
    with pytest.raises(KeyError):
        fit(tmp_path / "b", UpdateRouterBias(0.01), KillAt(7 * accumulate - 1), **options)
    again = fit(tmp_path / "b", UpdateRouterBias(0.01), resume=checkpoints.last(tmp_path / "b"), **options)
    assert torch.equal(biases(again), biases(whole))
    assert torch.equal(weights(again), weights(whole))


def test_counts_of_half_a_step_are_in_the_checkpoint(tmp_path: Path) -> None:
    """Saved after 4 of 9 micro-batches at 3 a step; learning rate 0, as half a step's gradients are not saved."""
    options = {"steps": 3, "accumulate_grad_batches": 3, "max_epochs": -1}
    source = data(tmp_path)
    frozen = partial(torch.optim.SGD, lr=0.0)
    found = []
    for path in (None, tmp_path / "half.ckpt"):
        model = module(source, moe=BIASED, optimizer=frozen, net=partial(NET, dropout=0.0))
        watch = Watch()
        saver = [SaveAt(4, tmp_path / "half.ckpt")] if path is None else []
        trainer(tmp_path, UpdateRouterBias(0.01), *saver, watch, **options).fit(model, source, ckpt_path=path)
        found.append((watch.counts, biases(model)))
    (every, whole), (rest, resumed) = found
    assert len(every) == 9
    assert len(rest) == 5
    assert torch.equal(whole, resumed)
    kept = checkpoints.read(tmp_path / "half.ckpt")["switchkit"]["step_counts"]
    assert torch.equal(kept[:, :-1], every[3])
    assert kept[:, -1].tolist() == [32, 32]


def test_layers_of_different_widths_ignore_the_filling() -> None:
    """Layer 0 has 2 of the 4 columns: [5, 1] moves [-, +], where columns of filling would lower the mean."""
    model = LanguageModule(NET, moe=BIASED, vocab_size=5)
    model.net.blocks[0].mlp.router = Sigmoid(16, 2, k=1)
    load = torch.tensor([[5, 1, 0], [2, 2, 2]])
    callback = UpdateRouterBias(0.5)
    callback.after_optimizer_step(L.Trainer(logger=False), model, load, load.sum(-1))
    assert model.net.blocks[0].mlp.router.bias.tolist() == [-0.5, 0.5]
    assert model.net.blocks[1].mlp.router.bias.tolist() == [0, 0, 0]


def test_small_steps_add_up_in_a_bfloat16_model(tmp_path: Path) -> None:
    """5000 steps of 0.001 make 5; in bfloat16 they would halt at 0.5."""
    source = data(tmp_path)
    model = module(source, moe=BIASED)
    loop = trainer(tmp_path, UpdateRouterBias(), steps=2, precision="bf16-true", limit_val_batches=0)
    loop.fit(model, source)
    router = model.net.blocks[0].mlp.router
    assert router.weight.dtype == torch.bfloat16
    router.bias.zero_()
    load = torch.tensor([[0, 3, 0], [1, 1, 1]])
    for _ in range(5000):
        UpdateRouterBias().after_optimizer_step(loop, model, load, load.sum(-1))
    torch.testing.assert_close(router.bias, torch.tensor([5.0, -5.0, 5.0]), rtol=1e-3, atol=0)


def test_a_bias_cast_to_bfloat16_is_refused(tmp_path: Path) -> None:
    source = data(tmp_path)
    model = module(source, moe=partial(MoELayer, router=BareBias))
    with pytest.raises(ValueError, match=r"bias of blocks\.0\.mlp is torch\.bfloat16.*keep the buffer in float32"):
        trainer(tmp_path, UpdateRouterBias(), precision="bf16-true").fit(model, source)


def test_models_without_a_bias_are_refused(tmp_path: Path) -> None:
    source = data(tmp_path)
    model = module(source, moe=partial(MoELayer, router=TopK))
    with pytest.raises(ValueError, match="no router with a buffer `bias`, only TopK: use the router `sigmoid`"):
        trainer(tmp_path, UpdateRouterBias()).fit(model, source)
    with pytest.raises(ValueError, match="this one has none: leave the callback out"):
        dense = module(source, net=partial(NET, sparse=[]))
        trainer(tmp_path, UpdateRouterBias()).fit(dense, source)
    with pytest.raises(ValueError, match="needs a LanguageModule, which counts; got a BoringModel"):
        from lightning.pytorch.demos.boring_classes import BoringModel

        UpdateRouterBias().setup(L.Trainer(logger=False), BoringModel(), "fit")


def test_update_is_exact_at_the_mean() -> None:
    """Counts of which a float32 mean would be off: 3 experts at 2**25 + 1, and one of them one more."""
    even = torch.full((3,), 2**25 + 1)
    assert (bias_update(even, 1.0) == 0).all()
    above = even + torch.tensor([0, 0, 1])
    assert bias_update(above, 1.0).tolist() == [1, 1, -1]
    torch.testing.assert_close(bias_update(above, 0.3, center=True).sum(), torch.tensor(0.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"rate": 0.0}, "rate must be a finite number > 0; got 0.0"),
        ({"rate": float("inf")}, "rate must be"),
        ({"freeze_step": -1}, "freeze_step must be at least 0, or null for never; got -1"),
    ],
)
def test_bad_options(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        UpdateRouterBias(**arguments)
