"""TextData: parts of the text, what each stage reads, and training that goes on where it stopped."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from switchkit.data import CharTokenizer, DataError, RandomWindows, TextData, generated_play, sources

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:GPU available")

TEXT = generated_play(0, 3000)  # 2700 tokens to train on: 10 batches of 8 windows of 32, 300 held out


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "play.txt"
    path.write_text(TEXT)
    return str(path)


def text_data(file: str, **changes: Any) -> TextData:
    return TextData(file, **{"context": 32, "batch_size": 8, "validation_prefix": 100, **changes})


class Reader(L.LightningModule):
    """Learns nothing, writes down what it is given."""

    def __init__(self, *, estimate: bool = False) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(128, 1)
        self.estimate = estimate
        self.seen: list[tuple[int, int, list[int]]] = []
        self.read: dict[str, list[Tensor]] = {}

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.seen.append((self.current_epoch, index, batch["tokens"].flatten().tolist()))
        return self.embedding(batch["tokens"]).sum()

    def _evaluate(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.read.setdefault(self.trainer.state.fn, []).append(batch["targets"][batch["valid"]])
        return self.embedding(batch["targets"]).mean()

    validation_step = test_step = predict_step = _evaluate

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.estimate:  # makes Lightning ask for the training loader before it restores anything
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), 0.1)


def batches(seen: list[tuple[int, int, list[int]]]) -> list[list[int]]:
    return [batch for _, _, batch in seen]


class SaveAll(L.Callback):
    """A checkpoint after every batch, every validation and every epoch, as runs may be stopped anywhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches = 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.batches += 1
        self._save(trainer, "batch")

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._save(trainer, "epoch")

    def _save(self, trainer: L.Trainer, where: str) -> None:
        trainer.save_checkpoint(self.folder / f"{self.batches}-{where}.ckpt")


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        **{"max_epochs": 3, **options},
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


# Constructor and source.


@pytest.mark.parametrize(
    ("name", "value"),
    [("context", 0), ("batch_size", -1), ("eval_batch_size", 0), ("validation_prefix", 1), ("validation_prefix", -5)],
)
def test_values_are_checked_at_once(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"data\.{name} {value} is not possible"):
        TextData(**{name: value})


def test_constructing_looks_for_nothing_and_the_text_is_looked_for_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SWITCHKIT_OFFLINE", "1")
    monkeypatch.setenv("SWITCHKIT_CACHE", str(tmp_path))
    monkeypatch.delenv("SWITCHKIT_DATA", raising=False)
    data = TextData()
    with pytest.raises(DataError, match="SWITCHKIT_OFFLINE"):
        _ = data.tokenizer
    data = TextData(fallback=True, seed=4)
    assert data.source is data.source
    assert data.source.text == generated_play(4)


def test_source_info_is_plain_data(file: str) -> None:
    data = text_data(file)
    info = data.source_info()
    assert info["characters"] == 3000
    assert info["origin"] == file
    assert info["generated"] is False
    assert info["sha256"] == data.source.sha256
    assert {type(value) for value in info.values()} <= {str, int, bool}


@pytest.mark.skipif("SWITCHKIT_DATA" not in os.environ, reason="needs the folder of data sets, SWITCHKIT_DATA")
def test_tiny_shakespeare_itself() -> None:
    data = TextData()
    assert data.source.sha256 == sources.CORPORA["tinyshakespeare"].sha256
    assert data.tokenizer.vocab_size == 65
    assert len(data.train_tokens) + len(data.held_out_tokens) == 1_115_394


# Tokens.


def test_nine_tenths_train_and_the_vocabulary_is_the_whole_texts(file: str) -> None:
    data = text_data(file)
    assert data.tokenizer == CharTokenizer.from_text(TEXT)
    assert data.tokenizer.decode(data.train_tokens) == TEXT[:2700]
    assert data.tokenizer.decode(data.held_out_tokens) == TEXT[2700:]


def test_a_given_tokenizer_encodes(file: str) -> None:
    mine = CharTokenizer("".join(map(chr, range(127, 9, -1))))
    data = text_data(file, tokenizer=mine)
    assert data.tokenizer is mine
    assert torch.equal(data.train_tokens, mine.encode(TEXT[:2700]))
    with pytest.raises(ValueError, match="is not in the vocabulary of 3"):
        _ = text_data(file, tokenizer=CharTokenizer("THE")).train_tokens


def test_a_text_too_short_names_what_it_has_and_what_it_needs(file: str) -> None:
    with pytest.raises(ValueError, match=r"2700 tokens to train on and 300 held out, and data.context 300 needs 301"):
        text_data(file, context=300).setup("fit")
    text_data(file, context=299).setup("fit")


# Stages.


def test_each_stage_reads_its_part(file: str) -> None:
    data, model = text_data(file), Reader()
    held_out = data.held_out_tokens[1:]
    trainer(max_epochs=1, num_sanity_val_steps=0).fit(model, datamodule=data)
    assert torch.equal(torch.cat(model.read["fit"]), held_out[:99])
    assert len(model.seen) == 10
    runner = trainer()
    runner.validate(model, datamodule=data, verbose=False)
    runner.test(model, datamodule=data, verbose=False)
    runner.predict(model, datamodule=data, return_predictions=False)
    for stage in ("validate", "test", "predict"):
        assert torch.equal(torch.cat(model.read[stage]), held_out)


@pytest.mark.parametrize("prefix", [0, None, 10**6])
def test_validation_reads_all_where_no_prefix_is_set(file: str, prefix: int | None) -> None:
    model = Reader()
    trainer(max_epochs=1, num_sanity_val_steps=0).fit(model, datamodule=text_data(file, validation_prefix=prefix))
    assert len(torch.cat(model.read["fit"])) == 299


def test_each_device_takes_its_share(file: str) -> None:
    data = text_data(file)
    alone = list(RandomWindows(data.train_tokens, 32, 24))
    for rank in range(3):
        data = text_data(file)
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            distributed_sampler_kwargs={"num_replicas": 3, "rank": rank}, limit_train_batches=1.0, overfit_batches=0
        )
        for share, whole in zip(data.train_dataloader(), alone, strict=True):
            assert torch.equal(share["tokens"], whole["tokens"][8 * rank : 8 * rank + 8])


def test_overfitting_repeats_the_same_batches(file: str) -> None:
    model = Reader()
    trainer(overfit_batches=2, limit_val_batches=0).fit(model, datamodule=text_data(file))
    seen = batches(model.seen)
    assert len(seen) == 6
    assert seen[:2] == seen[2:4] == seen[4:]
    assert seen[0] != seen[1]


# Going on where a run stopped.


@pytest.mark.daily(
    "--",
    "val_check_interval-check_val_every_n_epoch--estimated_stepping_batches",
    "accumulate_grad_batches--",
    "reload_dataloaders_every_n_epochs--",
)
@pytest.mark.parametrize("estimate", [False, True], ids=["", "estimated_stepping_batches"])
@pytest.mark.parametrize(
    ("options", "stops"),
    [
        ({}, (1, 9, 10, 20)),
        ({"val_check_interval": 4}, (4, 8, 10)),
        ({"val_check_interval": 5, "check_val_every_n_epoch": None}, (5, 10, 13)),
        ({"limit_train_batches": 7}, (3, 7, 14)),
        ({"limit_train_batches": 0.5, "limit_val_batches": 0}, (5, 8)),
        ({"accumulate_grad_batches": 3}, (3, 10)),
        ({"reload_dataloaders_every_n_epochs": 1}, (4, 10)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_resumed_run_reads_what_was_left(
    file: str, tmp_path: Path, estimate: bool, options: dict[str, Any], stops: tuple[int, ...]
) -> None:
    """Whatever the checkpoint was taken after, the rest is the rest: same batches, same indices, same epochs."""
    whole = Reader(estimate=estimate)
    trainer(SaveAll(tmp_path), **options).fit(whole, datamodule=text_data(file))
    expected = whole.seen
    assert len({str(batch) for _, _, batch in expected}) == len(expected)
    for stop in stops:
        for checkpoint in sorted(tmp_path.glob(f"{stop}-*.ckpt")):
            rest = Reader(estimate=estimate)
            trainer(**options).fit(rest, datamodule=text_data(file), ckpt_path=str(checkpoint), weights_only=True)
            assert rest.seen == expected[stop:], checkpoint.name


def test_a_run_prolonged_again_and_again_reads_on(file: str, tmp_path: Path) -> None:
    """The batches follow one another; Lightning counts the epoch that max_steps cuts short as one more."""
    whole = Reader()
    trainer(max_epochs=5).fit(whole, datamodule=text_data(file))
    seen, last = [], None
    for step in (3, 4, 10, 18, 20, 20, 31, 50):
        part, runner = Reader(), trainer(max_epochs=-1, max_steps=step)
        runner.fit(part, datamodule=text_data(file), ckpt_path=last, weights_only=True if last else None)
        last = tmp_path / "last.ckpt"
        runner.save_checkpoint(last)
        seen += part.seen
    assert batches(seen) == batches(whole.seen)


def test_a_new_fit_begins_anew(file: str, tmp_path: Path) -> None:
    """One TextData, three runs: the second from the start, the third from the first's end."""
    data, whole = text_data(file), Reader()
    trainer(max_epochs=2).fit(whole, datamodule=text_data(file))
    first, second, third = Reader(), Reader(), Reader()
    runner = trainer(max_epochs=-1, max_steps=13)
    runner.fit(first, datamodule=data)
    runner.save_checkpoint(tmp_path / "13.ckpt")
    trainer(max_epochs=1).fit(second, datamodule=data)
    runner = trainer(max_epochs=-1, max_steps=20)
    runner.fit(third, datamodule=data, ckpt_path=tmp_path / "13.ckpt", weights_only=True)
    assert second.seen == whole.seen[:10]
    assert batches(first.seen + third.seen) == batches(whole.seen)


def test_resuming_with_other_data_is_refused(file: str, tmp_path: Path) -> None:
    runner = trainer(max_epochs=-1, max_steps=3)
    runner.fit(Reader(), datamodule=text_data(file))
    runner.save_checkpoint(tmp_path / "3.ckpt")
    with pytest.raises(ValueError, match=r"batch_size times devices\): 8 in the checkpoint, 4 now"):
        trainer().fit(
            Reader(), datamodule=text_data(file, batch_size=4), ckpt_path=tmp_path / "3.ckpt", weights_only=True
        )


# From a recipe.


def test_built_from_a_configuration(file: str) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    options = {"path": file, "context": 16, "validation_prefix": "null", "tokenizer": "switchkit.data.CharTokenizer"}
    written = [f"--data.{name}={value}" for name, value in options.items()]
    vocabulary = "".join(sorted(set(TEXT)))
    parsed = parser.parse_args(
        ["--data=switchkit.data.TextData", *written, f"--data.tokenizer.characters={vocabulary}"]
    )
    data = parser.instantiate(parsed).data
    assert isinstance(data, TextData)
    assert data.context == 16
    assert data.tokenizer == CharTokenizer.from_text(TEXT)
