"""Predictions as JSON lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import data, module, trainer

from switchkit.callbacks import WritePredictions
from switchkit.callbacks.predictions import records
from switchkit.data import ByteTokenizer


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_held_out_token_is_in_one_line(tmp_path: Path) -> None:
    """90 characters held out in windows of 8: 89 targets, the last of 12 lines with a single one."""
    source = data(tmp_path)
    model, writer = module(source), WritePredictions()
    loop = trainer(tmp_path, writer)
    loop.predict(model, source, return_predictions=False)
    assert writer.written == tmp_path / "version_0" / "predictions.jsonl"
    found = lines(writer.written)
    assert [len(line["tokens"]) for line in found] == [8] * 11 + [1]
    assert writer.count == 12
    assert "".join(line["text"] for line in found) == source.source.text[-89:]
    for line in found:
        assert line["loss"] == pytest.approx(sum(line["nats"]) / len(line["nats"]), abs=1e-4)
        assert len(line["best"]) == len(line["tokens"])
    loss = trainer(tmp_path).validate(model, source, verbose=False)[0]["val/loss"]
    assert math.isclose(sum(line["loss"] * len(line["tokens"]) for line in found) / 89, loss, abs_tol=1e-5)
    assert [path.name for path in (tmp_path / "version_0").iterdir() if "predictions" in path.name] == [
        "predictions.jsonl"
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_is_told_of_the_file(tmp_path: Path) -> None:
    source = data(tmp_path)
    target = tmp_path / "out" / "found.jsonl"
    target.parent.mkdir()
    (target.parent / ".found.jsonl.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as found:
        trainer(tmp_path, WritePredictions(str(target))).predict(module(source), source, return_predictions=False)
    assert found.value.filename == str(target)
    assert not list(target.parent.iterdir())


def test_a_run_that_breaks_off_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    source = data(tmp_path)
    model, target = module(source), tmp_path / "new" / "found.jsonl"
    target.parent.mkdir()
    target.write_text("before\n")

    class Broken(WritePredictions):
        def on_predict_batch_end(self, *arguments: Any) -> None:
            super().on_predict_batch_end(*arguments)
            if self.count > 4:
                raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        trainer(tmp_path, Broken(str(target))).predict(model, source, return_predictions=False)
    assert [path.name for path in target.parent.iterdir()] == ["found.jsonl"]
    assert target.read_text() == "before\n"
    trainer(tmp_path, WritePredictions(str(target))).predict(model, source, return_predictions=False)
    assert len(lines(target)) == 12


def test_a_folder_is_refused(tmp_path: Path) -> None:
    source = data(tmp_path)
    with pytest.raises(ValueError, match="which is a folder: give a file in it"):
        trainer(tmp_path, WritePredictions(str(tmp_path))).predict(module(source), source, return_predictions=False)


def test_data_split_over_devices_are_refused(tmp_path: Path) -> None:
    loop: Any = SimpleNamespace(world_size=2, predict_dataloaders=torch.utils.data.DataLoader([1]))
    with pytest.raises(ValueError, match="split over 2 devices.*--trainer.devices 1"):
        WritePredictions().on_predict_start(loop, None)  # type: ignore[arg-type]


def test_a_translation_has_its_source_as_text() -> None:
    words = ByteTokenizer()
    ids = [words.encode(text) for text in ("Hund", "Katze")]
    targets = torch.nn.utils.rnn.pad_sequence(ids, True)
    valid = torch.arange(5) < torch.tensor([[4], [5]])
    outputs = {"nats": valid * 0.5, "best": targets.flip(1), "targets": targets, "valid": valid}
    source = torch.stack([words.encode("a dog"), words.encode("cat  ")])
    batch = {"source": source, "source_valid": torch.arange(5) < torch.tensor([[5], [3]])}
    first, second = records(outputs, batch, words)
    assert (first["source"], first["text"], first["loss"]) == ("a dog", "Hund", 0.5)
    assert (second["source"], second["text"], second["nats"]) == ("cat", "Katze", [0.5] * 5)
    outputs["valid"] = torch.zeros_like(valid)
    assert [line["loss"] for line in records(outputs, batch, None)] == [None, None]
    assert "text" not in next(records(outputs, batch, None))


def test_targets_that_do_not_count_are_left_out() -> None:
    targets = torch.tensor([[3, -100, 4]])
    outputs = {"nats": torch.tensor([[0.5, 0.0, 1.0]]), "best": targets, "targets": targets}
    (line,) = records(outputs, {}, None)
    assert (line["tokens"], line["nats"], line["loss"]) == ([3, 4], [0.5, 1.0], 0.75)


def test_ids_that_only_the_model_has_are_no_text() -> None:
    """Published models have more than their vocabularies."""
    words = ByteTokenizer(300)
    ids = torch.cat([words.encode("a"), torch.tensor([300]), words.encode("b")]).unsqueeze(0)
    outputs = {"nats": torch.zeros(1, 3), "best": ids, "targets": ids}
    (line,) = records(outputs, {"source": ids.flip(1)}, words)
    assert (line["text"], line["source"], line["tokens"]) == ("ab", "ba", ids[0].tolist())


def test_results_of_a_module_of_ones_own() -> None:
    assert list(records({"a": torch.tensor([1, 2]), "b": torch.eye(2)}, None, None)) == [
        {"a": 1, "b": [1, 0]},
        {"a": 2, "b": [0, 1]},
    ]
    for outputs in (
        None,
        {},
        {"a": 3},
        torch.ones(2),
        {"a": torch.ones(2), "b": torch.ones(3)},
        {"a": torch.tensor(1)},
    ):
        with pytest.raises(ValueError, match="have no row for each sequence: return a dict of tensors"):
            list(records(outputs, None, None))
