"""Evaluation on the whole held-out text, and the rows made of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pupils import pairs, t5_teacher, teacher
from small import data, module, trainer

from switchkit import MoELayer
from switchkit.distill.evaluation import Evaluated, evaluate
from switchkit.distill.table import table_rows


def test_evaluation_is_that_of_validate(tmp_path: Path) -> None:
    source = data(tmp_path)
    model = module(source)
    wanted = trainer(tmp_path).validate(model, source, verbose=False)[0]["val/loss"]
    found = evaluate(model.train().net, source.evaluation_loader(None))
    assert found.loss == pytest.approx(wanted, rel=1e-6)
    assert found.tokens == len(source.held_out_tokens) - 1
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.weights == 4 * found.parameters
    assert found.tokens_per_second > 0
    assert found.peak is None  # on a CPU
    assert model.net.training


def test_evaluation_of_an_encoder_decoder(tmp_path: Path) -> None:
    """Pair by pair, without padding: the mean over all their tokens."""
    net = t5_teacher(tmp_path).eval().net
    for part in net.modules():
        if isinstance(part, MoELayer):
            # A capacity that binds counts the padded length of a batch.
            part.capacity.eval = None
    source = pairs(tmp_path)
    source.setup("validate")
    total = tokens = 0.0
    for number in range(len(source.pairs("val"))):
        one = source.pairs("val").batch(torch.tensor([number]))
        with torch.no_grad():
            logs = net(one["tokens"], source=one["source"]).logits.log_softmax(-1)
        total -= sum(logs[0, place, target].item() for place, target in enumerate(one["targets"][0].tolist()))
        tokens += one["targets"].shape[1]
    found = evaluate(net, source.evaluation_loader(None))
    assert found.loss == pytest.approx(total / tokens, rel=1e-5)
    assert found.tokens == tokens


def test_every_part_stays_in_its_mode(tmp_path: Path) -> None:
    source = data(tmp_path)
    net = module(source).net.train()
    net.blocks[0].eval()
    modes = [part.training for part in net.modules()]
    batches = list(source.evaluation_loader(None))
    evaluate(net, batches)
    assert [part.training for part in net.modules()] == modes
    with pytest.raises(KeyError, match="targets"):
        evaluate(net, [{"tokens": batches[0]["tokens"]}])
    assert [part.training for part in net.modules()] == modes


def test_nothing_to_evaluate_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no held-out token"):
        evaluate(teacher(tmp_path).net, [])


def figures(*losses: float, parameters: int = 100) -> list[Evaluated]:
    return [Evaluated(loss, 10, 5.0 + loss, parameters, 4 * parameters, None) for loss in losses]


def test_rows() -> None:
    """Table 6 of the paper, with a teacher of ten times the size."""
    students = {"distilled only": figures(1.631), "+ mix": figures(1.578, 1.582)}
    rows = table_rows(figures(1.636, 1.636), figures(1.444, 1.444, parameters=1000), students)
    assert [row.name for row in rows] == ["dense", "teacher", "distilled only", "+ mix"]
    assert [round(row.compression, 3) for row in rows] == [0.9, 0, 0.9, 0.9]
    assert [row.preserved and round(row.preserved.percent) for row in rows] == [None, None, 3, 29]
    assert rows[3].spread == pytest.approx(0.002 * math.sqrt(2))
    assert rows[2].spread is None
    assert rows[3].to_dict()["preserved_percent"] == pytest.approx(29.17, abs=0.01)
    assert rows[3].tokens_per_second == pytest.approx(6.582)
    assert "one seed of student" in rows[2].to_dict()["note"]


def test_the_peak_of_a_row_is_that_of_its_worst_seed() -> None:
    first, second = figures(1.5, 1.6)
    seeds = [replace(first, peak=3), replace(second, peak=7), first]
    rows = table_rows([first], seeds, {"x": [first, second]})
    assert [row.peak for row in rows] == [None, 7, None]
    assert rows[1].to_dict()["peak_bytes"] == 7


def test_rows_of_several_sizes_are_refused() -> None:
    mixed = [*figures(1.5), *figures(1.5, parameters=7)]
    with pytest.raises(ValueError, match="x: the seeds of one row are models of one size, and these have 7 and 100"):
        table_rows(figures(1.6), figures(1.4), {"x": mixed})
    with pytest.raises(ValueError, match="dense: there is no checkpoint"):
        table_rows([], figures(1.4), {})
