"""PairData: what a batch is, which pairs stand together, what each stage reads, and going on where a run stopped."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from switchkit.data import CharTokenizer, DataError, PairData
from switchkit.data.bytes import ByteTokenizer
from switchkit.data.encoded_pairs import EncodedPairs
from switchkit.data.pair_loaders import BucketedPairs
from switchkit.spec import build, describe_object

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:GPU available")

BYTES = ByteTokenizer()
PAD, EOS = 0, 1


def line(number: int) -> str:
    """Lines of very different length, each telling which it is."""
    return f"{number}:" + "x" * (number * 37 % 50)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pairs")
    for name, mark in (("en", ""), ("de", "d"), ("fr", "fé")):
        (folder / name).write_text("".join(f"{mark}{line(number)}\n" for number in range(200)), encoding="utf-8")
    return {name: str(folder / name) for name in ("en", "de", "fr")}


def pair_data(files: dict[str, str], **changes: Any) -> PairData:
    target = {"de": files["de"], "fr": files["fr"]}
    return PairData(files["en"], **{"target": target, "batch_size": 8, "validation_prefix": 10, **changes})


def read(batch: dict[str, Tensor]) -> list[tuple[str, str, int]]:
    """Source, target and language of each pair, read back from the tokens by a plain loop."""
    found = []
    for row in range(len(batch["language"])):
        source = [n for n, real in zip(batch["source"][row].tolist(), batch["source_valid"][row], strict=True) if real]
        target = [n for n, real in zip(batch["targets"][row].tolist(), batch["valid"][row], strict=True) if real]
        assert source[-1] == target[-1] == EOS
        texts = bytes(n - 3 for n in source[1:-1]).decode(), bytes(n - 3 for n in target[:-1]).decode()
        found.append((*texts, int(batch["language"][row])))
        assert source[0] == BYTES.sentinels[-1 - int(batch["language"][row])]
    return found


def expected(numbers: range) -> list[tuple[str, str, int]]:
    return [(line(n), mark + line(n), code) for n in numbers for code, mark in enumerate(("d", "fé"))]


# Batches.


def test_a_batch_is_prefix_source_end_and_the_target_shifted(files: dict[str, str]) -> None:
    batch = next(iter(pair_data(files).val_dataloader()))
    assert {name: (rows.dtype, rows.ndim) for name, rows in batch.items()} == {
        "source": (torch.long, 2),
        "source_valid": (torch.bool, 2),
        "tokens": (torch.long, 2),
        "targets": (torch.long, 2),
        "valid": (torch.bool, 2),
        "language": (torch.long, 1),
        "example": (torch.long, 1),
    }
    assert read(batch) == expected(range(180, 200))[: len(batch["language"])]
    for tokens, targets, valid in zip(batch["tokens"], batch["targets"], batch["valid"], strict=True):
        size = int(valid.sum())
        assert tokens[:size].tolist() == [PAD, *targets[: size - 1].tolist()]
        assert not tokens[size:].any()
        assert not targets[size:].any()
        assert valid[:size].all()
    assert not batch["source"][~batch["source_valid"]].any()
    assert batch["source_valid"].any(0).all()
    assert batch["valid"].any(0).all()


def test_every_pair_is_read_once_an_epoch_but_for_less_than_a_step(files: dict[str, str]) -> None:
    data = pair_data(files)
    loader = data.train_dataloader()
    everything = Counter(expected(range(180)))
    epochs = []
    for _ in range(3):
        batches = [read(batch) for batch in loader]
        assert len(batches) == len(loader) == 360 // 8
        assert {len(batch) for batch in batches} == {8}
        seen = Counter(pair for batch in batches for pair in batch)
        assert seen <= everything
        assert seen.total() == 360
        epochs.append([sorted(batch) for batch in batches])
    assert epochs[0] != epochs[1] != epochs[2]
    # Other pairs meet, not only in another order.
    assert {str(batch) for batch in epochs[0]} != {str(batch) for batch in epochs[1]}


def padding(loader: BucketedPairs) -> float:
    """Share of the places of sources and targets that is filled up."""
    masks = [batch[name].float() for batch in loader for name in ("source_valid", "valid")]
    return 1 - float(sum(mask.sum() for mask in masks)) / sum(mask.numel() for mask in masks)


def test_buckets_save_padding(files: dict[str, str]) -> None:
    one, many = (pair_data(files, buckets=buckets).train_dataloader() for buckets in (1, 16))
    assert padding(many) < 0.15 < 0.3 < padding(one)


def test_a_batch_of_tokens_has_at_most_so_many(files: dict[str, str]) -> None:
    loader = pair_data(files, batch_tokens=200, buckets=8).train_dataloader()
    seen: Counter[tuple[str, str, int]] = Counter()
    sizes = set()
    for batch in loader:
        longest = max(batch["source"].shape[1], batch["targets"].shape[1])
        assert len(batch["language"]) * longest <= 200
        sizes.add(len(batch["language"]))
        seen.update(read(batch))
    assert len(sizes) > 3
    assert seen <= Counter(expected(range(180)))
    assert seen.total() > 360 - 8
    assert len(list(loader)) == len(loader)


def test_one_pair_longer_than_a_batch_of_tokens_is_a_batch(files: dict[str, str]) -> None:
    loader = pair_data(files, batch_tokens=1).train_dataloader()
    assert {len(batch["language"]) for batch in loader} == {1}
    assert len(loader) == 360


@pytest.mark.parametrize("options", [{}, {"batch_tokens": 150}], ids=["pairs", "tokens"])
def test_ranks_share_what_one_device_would_see(files: dict[str, str], options: dict[str, int]) -> None:
    pairs = pair_data(files).pairs("train")
    ranks = [BucketedPairs(pairs, 4, rank=rank, world_size=3, **options) for rank in range(3)]
    assert len({len(rank) for rank in ranks}) == 1
    seen: Counter[tuple[str, str, int]] = Counter()
    for parts in zip(*ranks, strict=True):
        shares = [read(part) for part in parts]
        assert len({len(share) for share in shares}) == 1
        seen.update(pair for share in shares for pair in share)
    assert seen <= Counter(expected(range(180)))


def test_one_device_reads_the_steps_of_three(files: dict[str, str]) -> None:
    pairs = pair_data(files).pairs("train")
    ranks = [BucketedPairs(pairs, 4, rank=rank, world_size=3) for rank in range(3)]
    together = [[pair for part in parts for pair in read(part)] for parts in zip(*ranks, strict=True)]
    assert together == [read(batch) for batch in BucketedPairs(pairs, 12)]


def test_shares_are_filled_up_as_the_whole_step_is(files: dict[str, str]) -> None:
    pairs = pair_data(files).pairs("train")
    ranks = [BucketedPairs(pairs, 4, buckets=1, rank=rank, world_size=3) for rank in range(3)]
    for parts, whole in zip(zip(*ranks, strict=True), BucketedPairs(pairs, 12, buckets=1), strict=True):
        for name, rows in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), rows), name


# What is too long.


def test_long_pairs_are_left_out_and_counted(files: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    data = pair_data(files, max_source=40, max_target=40)
    with caplog.at_level("INFO", "lightning.pytorch"):
        data.setup("fit")
    kept = [pair for pair in expected(range(180)) if len(pair[0]) + 2 <= 40 and len(pair[1].encode()) + 1 <= 40]
    pairs = data.pairs("train")
    assert len(pairs) == len(kept) < 360
    assert Counter(pair for batch in data.train_dataloader() for pair in read(batch)) <= Counter(kept)
    left = f"{360 - len(kept)} left out (more than 40 source or 40 target tokens)"
    assert data.source_info()["left_out"]["train"] == left
    assert f"train: {len(kept)} pairs, {left}" in caplog.text


def test_long_pairs_can_be_cut(files: dict[str, str]) -> None:
    data = pair_data(files, max_source=30, max_target=20, too_long="cut")
    pairs = data.pairs("val")
    assert len(pairs) == 40
    batch = pairs.batch(torch.arange(40))
    assert batch["source"].shape == (40, 30)
    assert batch["targets"].shape == (40, 20)
    for (source, target, _), (whole, other, _) in zip(read_cut(batch), expected(range(180, 200)), strict=True):
        assert source == whole.encode()[:28]
        assert target == other.encode()[:19]
    long = sum(len(one) + 2 > 30 or len(two.encode()) + 1 > 20 for one, two, _ in expected(range(180, 200)))
    assert data.source_info()["left_out"]["val"] == f"{long} cut"


def read_cut(batch: dict[str, Tensor]) -> list[tuple[bytes, bytes, int]]:
    """As `read`, without decoding: a cut may go through a character."""
    found = []
    for source, source_valid, target, valid in zip(
        batch["source"], batch["source_valid"], batch["targets"], batch["valid"], strict=True
    ):
        rows = source[source_valid].tolist(), target[valid].tolist()
        assert rows[0][-1] == rows[1][-1] == EOS
        found.append((bytes(n - 3 for n in rows[0][1:-1]), bytes(n - 3 for n in rows[1][:-1]), 0))
    return found


def test_empty_sides_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "en").write_text("a\n\nc\nd\ne\n")
    (tmp_path / "de").write_text("A\nB\n \nD\nE\n")
    data = PairData(str(tmp_path / "en"), str(tmp_path / "de"), batch_size=1)
    assert sorted(read(batch)[0] for batch in data.train_dataloader()) == [("a", "A", 0), ("d", "D", 0)]
    assert data.languages == ("target",)
    assert data.source_info()["left_out"]["train"] == "2 left out (a side is empty)"


def test_nothing_left_is_an_error(files: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"none of 360 pairs is left \(more than 3 source .*: 360\); raise data.max_"):
        pair_data(files, max_source=3).setup("fit")


# The language.


def test_a_text_can_name_the_language(files: dict[str, str]) -> None:
    batch = next(iter(pair_data(files, prefix="to {language}: ").val_dataloader()))
    source = bytes(n - 3 for n in batch["source"][1][batch["source_valid"][1]].tolist()[:-1]).decode()
    assert source == f"to fr: {line(180)}"


class Named(ByteTokenizer):
    """Bytes, with a token of its own for a language."""

    def special_id(self, text: str) -> int | None:
        return {"<de>": 300, "<fr>": 301}.get(text)


def test_a_vocabulary_can_have_tokens_for_languages(files: dict[str, str]) -> None:
    batch = next(iter(pair_data(files, tokenizer=Named()).val_dataloader()))
    assert batch["source"][:2, 0].tolist() == [300, 301]


def test_a_vocabulary_without_what_is_needed(files: dict[str, str]) -> None:
    with pytest.raises(DataError, match="CharTokenizer has 0 sentinels and no tokens <de>, <fr>"):
        pair_data(files, tokenizer=CharTokenizer("dfé0123456789:x")).setup("fit")
    with pytest.raises(DataError, match="CharTokenizer has no id that fills up rows"):
        pair_data(files, tokenizer=CharTokenizer("defré0123456789:x "), prefix="{language} ").setup("fit")
    with pytest.raises(DataError, match="data.prefix 'translate: ' does not say the language"):
        pair_data(files, prefix="translate: ").setup("fit")


# Stages.


class Reader(L.LightningModule):
    """Learns nothing, writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(400, 1)
        self.seen: list[tuple[int, int, Any]] = []
        self.read: dict[str, list[Any]] = {}

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.seen.append((self.current_epoch, index, read(batch)))
        return self.embedding(batch["tokens"]).sum()

    def _evaluate(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.read.setdefault(self.trainer.state.fn, []).extend(read(batch))
        return self.embedding(batch["targets"]).mean()

    validation_step = test_step = predict_step = _evaluate

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveAll(L.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches = 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.batches += 1
        trainer.save_checkpoint(self.folder / f"{self.batches}.ckpt")


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        **{"max_epochs": 2, **options},
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_each_stage_reads_its_part(files: dict[str, str], tmp_path: Path) -> None:
    for name in ("en", "de", "fr"):
        (tmp_path / name).write_text("".join(f"test {name} {number}\n" for number in range(7)))
    test_target = {"de": str(tmp_path / "de"), "fr": str(tmp_path / "fr")}
    data = pair_data(files, test_source=str(tmp_path / "en"), test_target=test_target)
    model = Reader()
    trainer(max_epochs=1, num_sanity_val_steps=0, limit_train_batches=1).fit(model, datamodule=data)
    assert model.read["fit"] == expected(range(180, 200))[:10]
    runner = trainer()
    runner.validate(model, datamodule=data, verbose=False)
    assert model.read["validate"] == expected(range(180, 200))
    runner.test(model, datamodule=data, verbose=False)
    assert model.read["test"][:2] == [("test en 0", "test de 0", 0), ("test en 0", "test fr 0", 1)]
    assert len(model.read["test"]) == 14
    plain = pair_data(files)
    runner.test(model, datamodule=plain, verbose=False)
    assert model.read["test"][14:] == expected(range(180, 200))


@pytest.mark.parametrize("options", [{}, {"batch_tokens": 400}], ids=["pairs", "tokens"])
def test_a_resumed_run_reads_what_was_left(files: dict[str, str], tmp_path: Path, options: dict[str, int]) -> None:
    whole = Reader()
    trainer(SaveAll(tmp_path)).fit(whole, datamodule=pair_data(files, batch_size=40, **options))
    length = len(whole.seen) // 2
    for stop in (1, length - 1, length, length + 2):
        rest = Reader()
        again = pair_data(files, batch_size=40, **options)
        trainer().fit(rest, datamodule=again, ckpt_path=str(tmp_path / f"{stop}.ckpt"), weights_only=True)
        assert rest.seen == whole.seen[stop:]


def test_resuming_with_other_data_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    loader = pair_data(files).train_dataloader()
    list(islice(loader, 2))
    for change, words in (
        ({"seed": 1}, "seed: 0 in"),
        ({"batch_size": 9}, "batch_size or"),
        ({"max_source": 40}, "of a"),
    ):
        with pytest.raises(ValueError, match=f"cannot be restored.*{words}"):
            pair_data(files, **change).train_dataloader().load_state_dict(loader.state_dict())


def test_each_device_takes_its_share(files: dict[str, str]) -> None:
    data = pair_data(files)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        distributed_sampler_kwargs={"num_replicas": 3, "rank": 2}, limit_train_batches=1.0, overfit_batches=0
    )
    loader = data.train_dataloader()
    assert (loader.rank, loader.world_size) == (2, 3)


def test_the_toy_languages_take_the_place_of_multi30k(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SWITCHKIT_OFFLINE", "1")
    monkeypatch.setenv("SWITCHKIT_CACHE", str(tmp_path))
    monkeypatch.delenv("SWITCHKIT_DATA", raising=False)
    data = PairData(fallback=True)
    assert data.languages == ("qka", "qlu")
    assert len(data.pairs("val")) == 1000
    info = data.source_info()
    assert info["generated"]
    assert info["pairs"] == {"val": 1000}
    with pytest.raises(DataError, match="Multi30k"):
        PairData().prepare_data()


def test_a_description_of_the_toy_languages_builds_them_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SWITCHKIT_OFFLINE", "1")
    monkeypatch.setenv("SWITCHKIT_CACHE", str(tmp_path))
    monkeypatch.delenv("SWITCHKIT_DATA", raising=False)
    data = PairData(fallback=True, seed=3)
    found = build(describe_object(data)).keywords
    again = PairData(**{**found, "tokenizer": None})
    assert again.languages == ("qka", "qlu")
    assert again.source_info()["sha256"] == data.source_info()["sha256"]


@pytest.mark.parametrize("languages", [["de", "fr", "cs"], ["qka", "qlu"]], ids=["Multi30k", "toy"])
def test_own_files_take_the_place_of_what_a_checkpoint_read(files: dict[str, str], languages: list[str]) -> None:
    """It names all languages that there were, which nobody chose."""
    given = pair_data(files)
    again = pair_data(files, languages=languages)
    assert again.languages == given.languages


# What cannot be.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_source": 0}, "data.max_source 0 is not possible"),
        ({"batch_tokens": 0}, "data.batch_tokens 0 is not possible"),
        ({"buckets": 0}, "data.buckets 0 is not possible"),
        ({"validation_prefix": -1}, "data.validation_prefix -1 is not possible"),
        ({"too_long": "drop"}, "data.too_long 'drop' is not possible; it must be skip or cut"),
        ({"source": "a"}, "data.source and data.target belong together"),
        ({"source": "a", "target": {}}, "data.source and data.target belong together"),
        ({"val_source": "a", "val_target": "b"}, "go with data.source and data.target"),
        ({"source": "a", "target": "b", "languages": ["de"]}, "data.languages chooses from Multi30k"),
    ],
)
def test_values_are_checked_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PairData(**options)


def test_a_description_of_own_files_builds_them_again(files: dict[str, str]) -> None:
    """It names the languages that there were, which the constructor otherwise chooses from Multi30k by."""
    found = build(describe_object(pair_data(files))).keywords
    again = PairData(**{**found, "tokenizer": None})
    assert again.languages == pair_data(files).languages


def test_fewer_pairs_than_a_step(files: dict[str, str]) -> None:
    with pytest.raises(DataError, match="there are 360 pairs to train on, fewer than the 400 of a step"):
        pair_data(files, batch_size=400).train_dataloader()
    with pytest.raises(DataError, match="no room for a sentence; they must be at least 3 and 2"):
        pair_data(files, max_source=2).setup("fit")


def test_built_from_a_configuration(files: dict[str, str]) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    written = [f"--data.source={files['en']}", f"--data.target={{de: {files['de']}, fr: {files['fr']}}}"]
    data = parser.instantiate(parser.parse_args(["--data=switchkit.data.PairData", *written])).data
    assert isinstance(data, PairData)
    assert data.languages == ("de", "fr")
    assert isinstance(data.pairs("val"), EncodedPairs)


@pytest.mark.parametrize("sizes", [{"batch_size": 8}, {"batch_tokens": 300, "too_long": "cut", "max_target": 20}])
def test_the_mean_sizes_are_those_of_an_epoch_whatever_the_seed(files: dict[str, str], sizes: dict[str, Any]) -> None:
    data = pair_data(files, **sizes)
    data.setup("fit")
    told = data.train_loader(rank=0, world_size=1).mean_sizes()
    for seed in (0, 1, 2):
        data.seed = seed
        loader = data.train_loader(rank=0, world_size=1)
        batches = list(loader)
        assert loader.mean_sizes() == told
        for name, mean in zip(("source", "tokens"), told, strict=True):
            # Which pairs of a bucket stand together, and are filled up to one length, is drawn.
            assert mean == pytest.approx(sum(batch[name].numel() for batch in batches) / len(batches), rel=0.05)
