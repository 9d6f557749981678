"""SpanData: windows with holes, the same ones after a resume, and all of the held-out text."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from switchkit import spec
from switchkit.data import (
    UL2,
    ByteTokenizer,
    CausalLM,
    CharTokenizer,
    PrefixLM,
    SpanCorruption,
    SpanData,
    generated_play,
)
from switchkit.data.objective_windows import ObjectiveInOrder, ObjectiveWindows
from switchkit.data.spans import reconstruct

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:GPU available")

TEXT = generated_play(0, 3000)  # 2700 bytes to train on: 9 batches of 8 windows of 34, 300 held out
BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "play.txt"
    path.write_text(TEXT)
    return str(path)


def span_data(file: str, **changes: Any) -> SpanData:
    given = {"inputs_length": 32, "batch_size": 8, "validation_prefix": 100, **changes}
    if "objectives" not in given:
        given = {"mean_span_length": 3.0, **given}
    return SpanData(file, **given)


class Reader(L.LightningModule):
    """Learns nothing, writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(384, 1)
        self.seen: list[dict[str, list[Any]]] = []
        self.read: dict[str, list[dict[str, Tensor]]] = {}

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.seen.append({name: part.tolist() for name, part in batch.items()})
        return self.embedding(batch["source"]).sum()

    def _evaluate(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.read.setdefault(self.trainer.state.fn, []).append(batch)
        return self.embedding(batch["source"]).mean()

    validation_step = test_step = predict_step = _evaluate

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveAfter(L.Callback):
    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.left = path, batch

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        **{"max_epochs": 2, "limit_val_batches": 0, "num_sanity_val_steps": 0, **options},
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def original(batch: dict[str, Tensor], row: int) -> str:
    return BYTES.decode(reconstruct(batch["source"][row], batch["targets"][row], BYTES.sentinels, eos_id=1))


def texts(batches: list[dict[str, Tensor]]) -> str:
    return "".join(original(batch, row) for batch in batches for row in range(len(batch["source"])))


# What a batch is.


def test_windows_of_the_training_text_with_holes(file: str) -> None:
    data = span_data(file)
    data.setup("fit")
    assert data.tokenizer == BYTES
    assert (data.raw_length, data.targets_length) == (34, 8)
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 2700 // (34 * 8) == 9
    for batch in batches:
        assert batch["source"].shape == (8, 32)
        assert batch["targets"].shape == (8, 8)
        for row in range(8):
            window = original(batch, row)
            assert len(window) == 34
            assert window in TEXT[:2700]


def test_the_defaults_are_byt5s(file: str) -> None:
    data = SpanData(file, inputs_length=128)
    assert isinstance(data.objective, SpanCorruption)
    assert (data.objective.noise_density, data.objective.mean_span_length, data.objective.roll) == (0.15, 20.0, False)
    assert data.source_info()["characters"] == 3000


def test_objectives_by_weights(file: str) -> None:
    data = span_data(file, objectives=[partial(CausalLM, weight=0.0), partial(PrefixLM, weight=2.0), UL2])
    batch = next(iter(data.train_dataloader()))
    assert batch["source"].shape[1] <= 32
    assert isinstance(span_data(file, objectives=[PrefixLM]).objective, PrefixLM)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_read_what_one_device_would_and_draw_their_own_holes(file: str, world_size: int) -> None:
    alone = span_data(file, batch_size=4 * world_size)
    shares = []
    for rank in range(world_size):
        data = span_data(file, batch_size=4)
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            distributed_sampler_kwargs={"num_replicas": world_size, "rank": rank},
            limit_train_batches=1.0,
            overfit_batches=0,
        )
        shares.append(list(data.train_dataloader()))
    for whole, *parts in zip(alone.train_dataloader(), *shares, strict=True):
        assert texts([whole]) == texts(parts)
    holes = [[row.tolist() for row in (batch["source"] >= 259).nonzero()] for batch in shares[0]]
    assert holes != [[row.tolist() for row in (batch["source"] >= 259).nonzero()] for batch in shares[1]]


def test_holes_differ_from_epoch_to_epoch_unless_one_is_repeated(file: str) -> None:
    loader = span_data(file).train_dataloader()
    assert not torch.equal(next(iter(loader))["source"], next(iter(loader))["source"])
    model = Reader()
    trainer(overfit_batches=2).fit(model, datamodule=span_data(file))
    assert model.seen[:2] == model.seen[2:]
    assert model.seen[0] != model.seen[1]


# Going on where a run stopped.


@pytest.mark.parametrize("stop", [1, 5, 9, 12])
@pytest.mark.parametrize(
    "options", [{}, {"roll": True}, {"objectives": [UL2, partial(CausalLM, weight=2.0)]}], ids=["", "roll", "mixture"]
)
def test_a_resumed_run_reads_what_was_left_with_the_same_holes(
    file: str, tmp_path: Path, stop: int, options: dict[str, Any]
) -> None:
    whole, rest = Reader(), Reader()
    trainer(SaveAfter(tmp_path / "a.ckpt", stop)).fit(whole, datamodule=span_data(file, **options))
    assert len({str(batch) for batch in whole.seen}) == len(whole.seen) >= 18
    torch.manual_seed(99)
    trainer().fit(rest, datamodule=span_data(file, **options), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert rest.seen == whole.seen[stop:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs_length": 40}, r"tokens of a window \(inputs_length and the objectives decide it\): 34 in the check"),
        ({"mean_span_length": 1.0}, "34 in the checkpoint, 31 now"),
        ({"batch_size": 4}, r"batch_size times devices\): 8 in the checkpoint, 4 now"),
        ({"seed": 1}, "seed: 0 in the checkpoint, 1 now"),
    ],
)
def test_a_position_in_other_data_is_refused(file: str, change: dict[str, Any], words: str) -> None:
    first = span_data(file)
    next(iter(first.train_dataloader()))
    state = first.state_dict()
    assert {type(value) for value in state["train"].values()} == {int}
    other = span_data(file, **change)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=words):
        other.train_dataloader()


# Evaluation.


def test_each_stage_reads_its_part_and_always_the_same(file: str) -> None:
    data, model = span_data(file, eval_batch_size=3), Reader()
    trainer(max_epochs=1, limit_val_batches=1.0).fit(model, datamodule=data)
    assert texts(model.read["fit"]) == TEXT[2700:2800]
    runner = trainer(limit_val_batches=1.0)
    runner.validate(model, datamodule=data, verbose=False)
    runner.test(model, datamodule=data, verbose=False)
    runner.predict(model, datamodule=data, return_predictions=False)
    for stage in ("validate", "test", "predict"):
        assert texts(model.read[stage]) == TEXT[2700:]
        assert all(
            torch.equal(a[name], b[name])
            for a, b in zip(model.read[stage], model.read["validate"], strict=True)
            for name in a
        )
    other = span_data(file, seed=1).val_dataloader()
    assert not torch.equal(next(iter(other))["source"], model.read["validate"][0]["source"])


@pytest.mark.parametrize("total", [2, 3, 20, 21, 40, 41, 59, 81])
@pytest.mark.parametrize("raw", [2, 3, 20])
def test_all_tokens_are_read_once_in_windows_that_the_batch_size_does_not_change(total: int, raw: int) -> None:
    tokens = torch.randint(3, 248, (total,), generator=torch.Generator().manual_seed(0))
    objective = SpanCorruption(BYTES)
    seen = []
    for size in (1, 3, 100):
        loader = ObjectiveInOrder(tokens, objective, raw, size)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(1 <= len(batch["source"]) <= size for batch in batches)
        seen.append([row.tolist() for batch in batches for row in batch["source"]])
        assert sum(int((batch["source_valid"].sum(1) + batch["valid"].sum(1)).sum()) for batch in batches) > total
        back = [
            reconstruct(source, target, BYTES.sentinels, eos_id=1)
            for batch in batches
            for source, target in zip(batch["source"], batch["targets"], strict=True)
        ]
        assert torch.equal(torch.cat(back), tokens)
        assert all(2 <= len(row) <= max(raw, 3) for row in back)
    assert seen[0] == seen[1] == seen[2]


# What cannot be.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inputs_length": 0}, r"data\.inputs_length 0 is not possible"),
        ({"inputs_length": 3}, r"data\.inputs_length 3 leaves no room"),
        ({"batch_size": 0}, r"data\.batch_size 0 is not possible"),
        ({"validation_prefix": 1}, r"data\.validation_prefix 1 is not possible"),
        ({"noise_density": 1.5}, "noise_density is the share"),
        ({"mean_span_length": 0.1}, "mean_span_length must be 1"),
        ({"objectives": []}, r"data\.objectives is empty"),
        ({"objectives": [UL2], "noise_density": 0.3, "roll": True}, r"data\.noise_density, data\.roll with data\.obj"),
    ],
)
def test_values_are_checked_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SpanData(**options)


def test_what_only_the_text_or_the_vocabulary_shows_is_said_at_setup(file: str) -> None:
    with pytest.raises(ValueError, match=r"300 held out, and data.inputs_length 290 needs 321"):
        span_data(file, inputs_length=290).setup("fit")
    with pytest.raises(ValueError, match="have 12 spans, and the vocabulary has 11 sentinels"):
        span_data(file, inputs_length=220, tokenizer=ByteTokenizer(first_sentinel=258)).setup("fit")
    with pytest.raises(ValueError, match=r"SpanCorruption needs a vocabulary with padding"):
        span_data(file, tokenizer=CharTokenizer.from_text(TEXT)).setup("fit")
    with pytest.raises(ValueError, match="a window needs 9 tokens, the text has 5"):
        ObjectiveWindows(torch.arange(5), SpanCorruption(BYTES), 9, 1)


# From a recipe, and into a checkpoint.


def test_built_from_a_configuration(file: str) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    objectives = [
        {"class_path": "switchkit.data.SpanCorruption", "init_args": {"mean_span_length": 8, "weight": 2}},
        {"class_path": "switchkit.data.UL2"},
    ]
    given = {"path": file, "inputs_length": 64, "objectives": objectives}
    parsed = parser.parse_object({"data": {"class_path": "switchkit.data.SpanData", "init_args": given}})
    data = parser.instantiate(parsed).data
    assert isinstance(data, SpanData)
    assert [type(member) for member in data.objective.members] == [SpanCorruption, UL2]
    assert data.objective.members[0].mean_span_length == 8
    assert data.objective.members[0].weight == 2


def test_a_checkpoint_can_describe_it(file: str) -> None:
    data = span_data(file, objectives=[partial(SpanCorruption, mean_span_length=8.0, weight=2.0), UL2], roll=False)
    written = spec.describe_object(data)
    assert written["init_args"]["objectives"] == [
        {
            "class_path": "switchkit.data.span_corruption.SpanCorruption",
            "init_args": {"mean_span_length": 8.0, "weight": 2.0},
        },
        {"class_path": "switchkit.data.mixture.UL2", "init_args": {}},
    ]
    assert written["init_args"]["inputs_length"] == 32


# -- holes that are known beforehand -----------------------------------------------------------------------------------


def numbered(file: str, **changes: Any) -> SpanData:
    source = span_data(file, **{"stride": 30, "draws": 3, **changes})
    source.setup("fit")
    return source


def test_a_pass_has_each_window_once_in_one_of_its_ways(file):
    """Whole windows come back from what is read and written; way d of a window is the same in every epoch and batch."""
    source = numbered(file)
    examples, loader = source.examples(), source.train_loader(rank=0, world_size=1)
    raw, tokens = source.raw_length, source.train_tokens
    assert examples.windows == (len(tokens) - raw) // 30 + 1
    assert len(examples) == 3 * examples.windows
    steps = examples.windows // 8
    assert len(loader) == 3 * steps
    first, second = list(loader), list(loader)
    for way in range(3):
        numbers = torch.cat([batch["example"] for batch in first[way * steps : (way + 1) * steps]])
        assert ((numbers >= way * examples.windows) & (numbers < (way + 1) * examples.windows)).all()
        assert len(set(numbers.tolist())) == 8 * steps
    assert not torch.equal(first[0]["example"], second[0]["example"])
    known: dict[int, list[Any]] = {}
    for batch in [*first, *second]:
        rows = zip(*(batch[name].tolist() for name in ("example", "source", "targets")), strict=True)
        for number, read, wrote in rows:
            assert known.setdefault(number, [read, wrote]) == [read, wrote]
    for number, (read, wrote) in known.items():
        begin = number % examples.windows * 30
        found = reconstruct(torch.tensor(read), torch.tensor(wrote), source.objective.sentinels, eos_id=BYTES.eos_id)
        assert torch.equal(found, tokens[begin : begin + raw])
    ways = [known[n] for n in known if n % examples.windows == 5]
    assert len(ways) == 3
    assert ways[0] != ways[1] != ways[2]


def test_numbered_windows_are_shared_out_and_resumed(file):
    source = numbered(file)
    whole = list(source.train_loader(rank=0, world_size=1))
    halves = [list(numbered(file, batch_size=4).train_loader(rank=rank, world_size=2)) for rank in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        for name, value in batch.items():
            assert torch.equal(value, torch.cat([part[name] for part in parts]))
    loader = source.train_loader(rank=0, world_size=1)
    read = iter(loader)
    _ = [next(read) for _ in range(5)]
    again = numbered(file).train_loader(rank=0, world_size=1)
    again.load_state_dict(loader.state_dict())
    for batch, expected in zip(again, whole[5:], strict=True):
        assert torch.equal(batch["source"], expected["source"])
    with pytest.raises(ValueError, match=r"ways of each window \(draws\): 3 in the checkpoint, 2 now"):
        numbered(file, draws=2).train_loader(rank=0, world_size=1).load_state_dict(loader.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": None}, "data.draws 3 without data.stride"),
        ({"stride": 0}, "data.stride 0 is not possible"),
        ({"draws": 0}, "data.draws 0 is not possible"),
        ({"batch_size": 500}, "fewer than the 500 of a step; lower batch_size or stride"),
    ],
)
def test_numbered_windows_that_cannot_be(file, changes, message):
    with pytest.raises(ValueError, match=message):
        numbered(file, **changes).train_loader(rank=0, world_size=1)
