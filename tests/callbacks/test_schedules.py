"""Capacity and jitter that change during training, by the step alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from small import MOE, data, module, trainer, weights

from switchkit import Decoder, EncoderDecoder, Factor, LanguageModule, MoELayer, RoundRobin, Switch, checkpoints
from switchkit.callbacks import CapacitySchedule, JitterSchedule
from switchkit.callbacks.schedules import linear


class Read(L.Callback):
    """What a layer holds during each optimizer step, and in validation."""

    def __init__(self, value: Callable[[MoELayer], Any]) -> None:
        self.value = value
        self.steps: dict[int, set[Any]] = {}
        self.validation: set[Any] = set()

    def on_before_zero_grad(self, trainer: L.Trainer, model: Any, *rest: Any) -> None:
        found = self.steps.setdefault(trainer.global_step, set())
        found |= {self.value(block.mlp) for block in model.net.blocks}

    def on_validation_batch_start(self, trainer: L.Trainer, model: Any, *rest: Any) -> None:
        self.validation |= {self.value(block.mlp) for block in model.net.blocks}


def capacity(layer: MoELayer) -> int | None:
    """Of a group of 300 tokens, one choice each, over 3 experts: 100 times the factor."""
    return layer.capacity.limit(300, 3, 1, training=layer.training)


def test_linear_by_hand() -> None:
    assert [linear(step, 2.0, 1.0, 4, begin=2) for step in range(8)] == [2, 2, 2, 1.75, 1.5, 1.25, 1, 1]
    assert [linear(step, 0.0, 0.5, 1) for step in range(3)] == [0, 0.5, 0.5]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_capacity_at_each_step(tmp_path: Path, accumulate: int) -> None:
    source, read = data(tmp_path), Read(capacity)
    model = module(source)
    schedule = CapacitySchedule(2.0, 1.0, steps=4, begin=2)
    trainer(tmp_path, schedule, read, steps=8, accumulate_grad_batches=accumulate, val_check_interval=2).fit(
        model, source
    )
    assert [read.steps[step] for step in range(8)] == [{200}, {200}, {200}, {175}, {150}, {125}, {100}, {100}]
    assert read.validation == {None}


def test_dropless_in_the_end(tmp_path: Path) -> None:
    source, read = data(tmp_path), Read(capacity)
    trainer(tmp_path, CapacitySchedule(1.5, None, steps=3, begin=1), read, steps=6).fit(module(source), source)
    assert [read.steps[step] for step in range(6)] == [{150}] * 4 + [{None}] * 2


def test_jitter_at_each_step(tmp_path: Path) -> None:
    source, read = data(tmp_path), Read(lambda layer: layer.router.jitter)
    trainer(tmp_path, JitterSchedule(0.5, 0.0, steps=4), read, steps=6).fit(module(source), source)
    assert [read.steps[step] for step in range(6)] == [{0.5}, {0.375}, {0.25}, {0.125}, {0.0}, {0.0}]


def test_killed_run_resumes_bit_identical(tmp_path: Path) -> None:
    finals = []
    for name, kills in (("one", []), ("two", [7])):
        folder = tmp_path / name
        folder.mkdir()
        source = data(folder)
        for steps in (*kills, 12):
            # The checkpoint of the killed run is that of step 5, whatever the schedules did after it.
            model = module(source, schedule="constant")
            torch.manual_seed(1 if steps == (kills or [12])[0] else 99)
            path = checkpoints.last(folder) if kills and steps == 12 else None
            callbacks = [CapacitySchedule(0.5, 1.5, steps=9, begin=1), JitterSchedule(0.4, 0.0, steps=9)]
            trainer(folder, *callbacks, steps=steps).fit(model, source, ckpt_path=path)
        finals.append(weights(model))
    assert torch.equal(*finals)


def test_models_without_the_part_are_refused(tmp_path: Path) -> None:
    source = data(tmp_path)
    plain = partial(MoELayer, router=RoundRobin)
    with pytest.raises(ValueError, match="found no `factor` policy, only Dropless: use `capacity: factor`"):
        trainer(tmp_path, CapacitySchedule(2.0, 1.0, 4)).fit(module(source, moe=plain), source)
    with pytest.raises(ValueError, match="no router with a jitter: use one that has it, such as `switch`"):
        trainer(tmp_path, JitterSchedule(0.1, 0.0, 4)).fit(module(source, moe=plain), source)


def test_a_schedule_makes_no_causal_model_leak(tmp_path: Path) -> None:
    """Dropless in both modes the order does not matter, and the model is built; with a factor it would."""
    source = data(tmp_path)
    unfair = partial(MOE, router=Switch, capacity=partial(Factor, train=None, order="probability"))
    with pytest.raises(ValueError, match="would make a dropless layer leak"):
        trainer(tmp_path, CapacitySchedule(2.0, 1.0, 4)).fit(module(source, moe=unfair), source)


def test_a_schedule_takes_what_a_model_may_be_built_with() -> None:
    """An encoder sees its whole source, and `allow_leak` is the user's word."""
    sizes = {"d_model": 8, "num_heads": 2, "d_ff": 8, "num_experts": 4}
    unfair = partial(MoELayer, capacity=partial(Factor, train=None, order="probability"))
    translator = partial(EncoderDecoder, encoder_layers=2, **sizes)

    def start(net: Callable[..., Any]) -> list[float | None]:
        model = LanguageModule(net, vocab_size=11, moe=unfair, losses=[])
        CapacitySchedule(2.0, 1.0, 10).setup(None, model, "fit")  # type: ignore[arg-type]
        return [part.capacity.train for part in model.modules() if isinstance(part, MoELayer)]

    assert start(partial(translator, decoder_sparse=[])) == [2.0]
    assert start(partial(Decoder, num_layers=2, allow_leak=True, **sizes)) == [2.0]
    with pytest.raises(ValueError, match="would make a dropless layer leak"):
        start(translator)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: CapacitySchedule(0.0, 1.0, 3), "start must be a finite number > 0; got 0.0"),
        (lambda: CapacitySchedule(1.0, float("inf"), 3), "end must be a finite number > 0; got inf"),
        (lambda: CapacitySchedule(1.0, None, 0), "steps must be at least 1; got 0"),
        (lambda: JitterSchedule(0.1, 1.0, 3), r"end must be in \[0, 1\); got 1.0"),
        (lambda: JitterSchedule(0.1, 0.0, 3, begin=-1), "begin must be at least 0; got -1"),
    ],
)
def test_bad_options(build: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build()
