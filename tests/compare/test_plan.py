"""What a step of a run is taken to cost, before it trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from switchkit.compare.budget import Budget, Cost
from switchkit.compare.command import _notes
from switchkit.compare.definition import Entry
from switchkit.compare.folder import Folder
from switchkit.compare.plan import Model, _evaluated, composed, model_of, steps_of
from switchkit.data import CharTokenizer, PairData

SMALL = [("d_model", "16"), ("encoder_layers", "2"), ("decoder_layers", "2"), ("num_heads", "2"), ("d_ff", "16")]


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sentences of very different length, most of them short."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines").write_text("".join("x" * (n * n * n // 64000 + 1) + "\n" for n in range(200)))
    return "lines"


@pytest.mark.slow
def test_a_step_on_pairs_costs_the_mean_of_an_epoch_whatever_the_seed(lines: str) -> None:
    given = [("data.source", lines), ("data.target", lines), ("trainer.callbacks", "[]")]
    given += [(f"model.net.{name}", value) for name, value in SMALL]
    given += [("data.batch_size", "4"), ("data.max_source", "200"), ("data.max_target", "200")]
    found = []
    for seed in ("0", "1", "2"):
        tree = composed(Entry("a", ("t5_translate",)), [*given, ("data.seed", seed)], [])
        model = model_of("a", tree)
        found.append((model.cost, steps_of(Budget("flops", 1e12), {"a": tree}, {"a": model}, {}, {})))
    assert found[0] == found[1] == found[2]
    data = PairData(lines, target=lines, batch_size=4, max_source=200, max_target=200)
    data.setup("fit")
    batches = list(data.train_loader(rank=0, world_size=1))
    tokens, source = (fmean(batch[name].numel() for batch in batches) for name in ("tokens", "source"))
    assert model.cost.tokens == pytest.approx(tokens, rel=0.05)
    assert model.cost.flops == pytest.approx(3 * model.counts.flops * (source + tokens) / 2, rel=0.05)


def test_a_step_costs_three_times_its_forward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all micro-batches: 2 of 3 windows with 8 tokens each."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("abcdefgh" * 40)
    given = {"model": "LanguageModule", "model.net": "Decoder", "data": "TextData", "data.path": "text"}
    given |= {"data.context": "8", "data.batch_size": "3", "trainer.accumulate_grad_batches": "2"}
    sizes = {"d_model": 8, "num_layers": 1, "num_heads": 2, "d_ff": 8, "num_experts": 2, "context": 8, "sparse": "[0]"}
    edits = [*given.items(), *((f"model.net.{name}", str(value)) for name, value in sizes.items())]
    model = model_of("a", composed(Entry("a", ()), edits, []))
    assert model.cost == Cost(tokens=2 * 3 * 8, flops=3 * model.counts.flops * 2 * 3 * 8)


@pytest.mark.parametrize(("limit", "count"), [(1.0, None), (3, 3)])
def test_held_out_data_may_have_no_length(limit: float, count: int | None) -> None:
    endless = SimpleNamespace(val_dataloader=lambda: iter([]))
    assert _evaluated(endless, limit) == count
    with pytest.raises(ValueError, match="limit_val_batches 0.5: the held-out data has no length"):
        _evaluated(endless, 0.5)


def test_a_recipe_is_written_with_the_steps_of_its_run(tmp_path: Path) -> None:
    tree = {"trainer": {"max_steps": 2000, "devices": 1}}
    folder = Folder(tmp_path / "out")
    folder.begin({"recipes": {"a": tree, "b": tree}, "steps": {"a": 3, "b": 7}})
    written = {name: yaml.safe_load(folder.recipe(name).read_text("utf-8")) for name in "ab"}
    assert written == {n: {"trainer": {"max_steps": steps, "devices": 1}} for n, steps in (("a", 3), ("b", 7))}
    found = folder.found()
    assert found is not None
    assert found["recipes"]["a"] == tree


def test_what_does_not_compare_is_noted() -> None:
    one = Model(
        None, Cost(8, 8), True, "a text", False, sha256="0", vocabulary=CharTokenizer("ab"), held_out=(None, 64)
    )  # type: ignore[arg-type]

    def noted(**changes: Any) -> str:
        models = {"a": one, "b": replace(one, **changes)}
        return "\n".join(_notes(Budget("steps", 1), 1, {"a": 1, "b": 1}, "a", models, {}))

    assert "the same data in the same order" in noted()
    assert "compare" not in noted().replace("compared", "")
    assert "the runs have different vocabularies" in noted(vocabulary=CharTokenizer("abc"))
    assert "what was faster does not compare: the curves" in noted(held_out=(None, 32))
    assert "the losses, and what was faster, do not compare" in noted(held_out=(5, 64), evaluated=5)
    assert "the runs read different data" in noted(sha256="1")
    for change in ({"cost": Cost(4, 8)}, {"ordered": False}, {"sha256": "1"}):
        assert "the same order" not in noted(**change)


@pytest.mark.daily("5-the whole held-out text")
@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("1.0", "the whole held-out text"),
        ("3", "the first 3 batches of the held-out text"),
        ("0.5", "the first 2 batches of the held-out text"),
        ("5", "the whole held-out text"),
    ],
)
def test_the_held_out_loss_is_told_by_what_it_is_of(lines: str, limit: str, said: str) -> None:
    # 20 lines are held out: 5 batches of 4.
    given = [("data.source", lines), ("data.target", lines), ("trainer.callbacks", "[]"), ("data.eval_batch_size", "4")]
    given += [("data.max_source", "200"), ("data.max_target", "200"), ("trainer.limit_val_batches", limit)]
    given += [(f"model.net.{name}", value) for name, value in SMALL]
    model = model_of("a", composed(Entry("a", ("t5_translate",)), given, []))
    notes = _notes(Budget("steps", 1), 1, {"a": 1}, "a", {"a": model}, {})
    assert f"held-out loss: nats per token over {said}, last weights" in "\n".join(notes)
    one = replace(model, evaluated=1)
    assert "over the first batch of the held-out text" in "\n".join(
        _notes(Budget("steps", 1), 1, {"a": 1}, "a", {"a": one}, {})
    )
