"""Streams of texts: packed, shuffled, shared out and resumed; the oracle is the files' text itself."""

from __future__ import annotations

import gzip
import json
import shutil
import socket
import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

pytest.importorskip("datasets")

import datasets

from switchkit import CharTokenizer, Decoder, EncoderDecoder, LanguageModule, checkpoints
from switchkit.data import ByteTokenizer, SpanCorruption, StreamData
from switchkit.data.packing import PackedStream
from switchkit.data.streams import FileStream
from switchkit.distill.shared_text import Opened, check_alike, data_of
from switchkit.models.inputs import check_inputs
from switchkit.spec import build, describe_object

END = ByteTokenizer().eos_id
WRITERS = ["jsonl", "txt", "parquet", "jsonl.gz"]


def texts(file: int, count: int) -> list[str]:
    """Each different, of 1 to 30 characters, and none the beginning of another."""
    return [f"<{file}.{i}{'x' * (i * 7 % 26)}>" for i in range(count)]


def write(folder: Path, kind: str, counts: list[int], name: str = "part") -> list[str]:
    found = []
    for file, count in enumerate(counts):
        path = folder / f"{name}{file}.{kind}"
        rows = texts(file, count)
        if kind.startswith("jsonl"):
            data = "".join(json.dumps({"n": i, "text": row}) + "\n" for i, row in enumerate(rows)).encode()
            path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
        elif kind == "txt":
            path.write_text("".join(f"{row}\n" for row in rows))
        else:
            pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            parquet.write_table(pyarrow.table({"text": rows}), path, row_group_size=7)
        found.append(str(path))
    return found


def ids_of(some: list[str]) -> list[int]:
    return [token for text in some for token in [*ByteTokenizer().encode(text).tolist(), END]]


def packed(files: list[str], **more: Any) -> PackedStream:
    given = {"size": 16, "stride": 16, "column": "text", "buffer": 5, "seed": 3, **more}
    return PackedStream(FileStream.of(files, "data.path"), ByteTokenizer(), **given)


def windows(stream: PackedStream, count: int) -> list[list[int]]:
    return [stream.take(1)[0].tolist() for _ in range(count)]


def split(ids: list[int]) -> Counter[str]:
    """The texts between the ends, but for the first and the last, which may be cut."""
    pieces: list[list[int]] = [[]]
    for token in ids:
        if token == END:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return Counter(ByteTokenizer().decode(piece) for piece in pieces[1:-1])


@pytest.mark.parametrize("kind", WRITERS)
def test_without_a_shuffle_windows_are_the_texts_one_after_another(tmp_path: Path, kind: str) -> None:
    files = write(tmp_path, kind, [40])
    stream = packed(files, buffer=1)
    want = ids_of(texts(0, 40))
    got = [token for row in windows(stream, 2 * len(want) // 16 + 1) for token in row]
    assert got == (want * 3)[: len(got)], "a pass begins where the last one ended, in the middle of a window"


def test_windows_that_overlap_by_one_have_every_token_as_a_target_once(tmp_path: Path) -> None:
    stream = packed(write(tmp_path, "jsonl", [30]), buffer=1, size=9, stride=8)
    rows = windows(stream, 20)
    assert all(row[-1] == following[0] for row, following in pairwise(rows))
    assert rows[0][:-1] + rows[1][:-1] == windows(packed([str(tmp_path / "part0.jsonl")], buffer=1), 1)[0]


def test_each_pass_has_every_text_once_in_another_order(tmp_path: Path) -> None:
    """Windows of a token: with no window to cut a text at, a pass is its texts."""
    files = write(tmp_path, "jsonl", [20, 13, 1])
    all_texts = Counter(text for file, count in enumerate([20, 13, 1]) for text in texts(file, count))
    length = sum(len(text) + 1 for text in all_texts)
    stream = packed(files, size=1, stride=1, buffer=1)
    passes = [[row[0] for row in windows(stream, length)] for _ in range(3)]
    for tokens in passes:
        assert split([END, *tokens]) == all_texts
    assert len({tuple(tokens) for tokens in passes}) > 1, "the order of the files changes"
    for buffer in (5, 100):
        mixed = packed(files, buffer=buffer, size=length, stride=length).take(1)[0].tolist()
        assert split([END, *mixed]) == all_texts
        assert mixed not in passes


@pytest.mark.parametrize("counts", [[9, 12], [9, 12, 3]], ids=["a_file_each", "every_other_example"])
def test_ranks_share_the_texts(tmp_path: Path, counts: list[int]) -> None:
    files = write(tmp_path, "jsonl", counts)
    found = Counter()
    for rank in range(2):
        stream = packed(files, rank=rank, world_size=2, size=1, stride=1)
        while stream.state_dict()["pass"] == 0:
            found[stream.take(1)[0, 0].item()] += 1
    # The first token of the next pass was taken to see that this one is over.
    want = Counter(ids_of([text for file, count in enumerate(counts) for text in texts(file, count)]))
    assert sum(found.values()) - sum(want.values()) == 2
    assert not want - found


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_position_is_the_very_place(tmp_path: Path, kind: str, world_size: int) -> None:
    """At every window of two passes and more, through plain data."""
    files = write(tmp_path, kind, [17, 8, 1])
    given = {"world_size": world_size, "rank": world_size - 1}
    whole = windows(packed(files, **given), 70)
    first = packed(files, **given)
    for taken in range(60):
        state = json.loads(json.dumps(first.state_dict()))
        second = packed(files, **given)
        second.load_state_dict(state)
        assert windows(second, 10) == whole[taken : taken + 10]
        assert first.take(1)[0].tolist() == whole[taken]
    assert state["pass"] >= 1


def data(folder: Path, **more: Any) -> StreamData:
    files = sorted(str(path) for path in folder.glob("part*.jsonl"))
    held_out = shutil.copy(files[0], folder / "held.jsonl")
    given = {"validation_path": str(held_out), "context": 8, "batch_size": 3, "buffer": 4, "epoch_batches": 7}
    return StreamData(files, **{**given, "eval_batch_size": 4, "validation_prefix": 64, **more})


def test_batches_of_a_decoder_and_their_resumption(tmp_path: Path) -> None:
    write(tmp_path, "jsonl", [25, 25])
    loader = data(tmp_path).train_loader(rank=0, world_size=1)
    batches = [batch for _ in range(3) for batch in loader]
    assert len(batches) == 21
    for batch in batches:
        assert batch["tokens"].shape == batch["targets"].shape == (3, 8)
        assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    for stop in (3, 7, 12):
        first, second = (data(tmp_path).train_loader(rank=0, world_size=1) for _ in range(2))
        seen = 0
        while seen < stop:
            seen += sum(1 for _ in islice(first, stop - seen))
        second.load_state_dict(first.state_dict())
        rest = [batch for _ in range(3) for batch in second][: 21 - stop]
        assert all(torch.equal(a["targets"], b["targets"]) for a, b in zip(rest, batches[stop:], strict=True))
    third = data(tmp_path, buffer=5).train_loader(rank=0, world_size=1)
    with pytest.raises(ValueError, match="texts that are shuffled together \\(buffer\\): 4 in the checkpoint, 5 now"):
        third.load_state_dict(first.state_dict())
    loader.repeat = True
    once, again = ([batch["targets"] for batch in loader] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    first, second = (data(tmp_path).train_loader(rank=0, world_size=1) for _ in range(2))
    first.repeat = second.repeat = True
    list(islice(first, 3))
    second.load_state_dict(first.state_dict())
    rest = [batch["targets"] for _ in range(2) for batch in second]
    assert all(torch.equal(a, b) for a, b in zip(rest, [*once[3:], *once], strict=True))


@pytest.mark.parametrize("objectives", [None, [SpanCorruption]], ids=["decoder", "encoder-decoder"])
def test_models_that_cannot_read_it_are_told(tmp_path: Path, objectives: Any) -> None:
    write(tmp_path, "jsonl", [3])
    source = data(tmp_path, context=8, objectives=objectives)
    sizes = {"d_model": 8, "num_heads": 2, "d_ff": 8, "sparse": []}
    short, reader = Decoder(384, num_layers=1, context=4, **sizes), EncoderDecoder(384, **sizes)
    with pytest.raises(ValueError, match="data.context 8 is longer" if objectives is None else "have a source"):
        check_inputs(short, source)
    with pytest.raises(ValueError, match="have no source") if objectives is None else nullcontext():
        check_inputs(reader, source)


class Stop(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyError("killed")


def test_a_killed_run_resumes_bit_identical(tmp_path: Path) -> None:
    import small

    write(tmp_path, "jsonl", [25, 25])

    def fit(folder: Path, *callbacks: L.Callback, resume: bool = False) -> torch.Tensor:
        source = data(tmp_path)
        torch.manual_seed(0)
        module = LanguageModule(small.NET, moe=small.MOE, tokenizer=source.tokenizer, warmup_steps=3)
        torch.manual_seed(9 if resume else 1)
        path = checkpoints.last(folder) if resume else None
        small.trainer(folder, *callbacks, steps=20).fit(module, source, ckpt_path=path, weights_only=True)
        return small.weights(module)

    whole = fit(tmp_path / "a")
    with pytest.raises(KeyError):
        fit(tmp_path / "b", Stop(12))
    assert torch.equal(fit(tmp_path / "b", resume=True), whole)


def test_span_corruption_of_a_stream(tmp_path: Path) -> None:
    write(tmp_path, "jsonl", [25, 25])
    source = data(tmp_path, context=24, objectives=[partial(SpanCorruption, noise_density=0.3, mean_span_length=3)])
    source.setup("fit")
    batch = next(iter(source.train_loader(rank=0, world_size=1)))
    assert batch["source"].shape[1] <= 24
    held = next(iter(source.evaluation_loader(64)))
    assert held.keys() == batch.keys()
    # What was taken out and what was left are the window.
    tokens = ByteTokenizer()
    windows = source.train_loader(rank=0, world_size=1).packed.take(3)
    for row in range(3):
        read = batch["source"][row][batch["source_valid"][row]].tolist()
        written = batch["targets"][row][batch["valid"][row]].tolist()
        holes: dict[int, list[int]] = {}
        for token in written[:-1]:
            if token in tokens.sentinels:
                last = holes[token] = []
            else:
                last.append(token)
        assert len(holes) > 1
        assert [t for token in read[:-1] for t in holes.get(token, [token])] == windows[row].tolist()
    net = partial(EncoderDecoder, d_model=8, encoder_layers=2, num_heads=2, d_ff=8, num_experts=2)
    loss = LanguageModule(net, tokenizer=tokens).training_step(batch, 0)["loss"]
    assert loss.isfinite()


def test_held_out_texts_are_read_in_order(tmp_path: Path) -> None:
    write(tmp_path, "jsonl", [25, 25])
    want = ids_of(texts(0, 25))
    source = data(tmp_path)
    for prefix, count in ((None, len(want)), (0, len(want)), (20, 20)):
        batches = list(source.evaluation_loader(prefix))
        targets = torch.cat([batch["targets"][batch["valid"]] for batch in batches])
        assert targets.tolist() == want[1:count]


def test_a_dataset_laid_out_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of it is opened by the same call, without a network."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", "jsonl", [9], "train-")
    write(tmp_path / "set", "jsonl", [4], "validation-")
    source = StreamData(hub=str(tmp_path / "set"), context=8, buffer=1, batch_size=1)
    source.setup("fit")
    got = next(iter(source.train_loader(rank=0, world_size=1)))
    assert got["tokens"][0].tolist() == ids_of(texts(0, 9))[:8]
    held = torch.cat([b["targets"][b["valid"]] for b in source.evaluation_loader(None)])
    assert len(held) == sum(len(text) + 1 for text in texts(0, 4)) - 1
    with pytest.raises(ValueError, match="data.hub '.*', split 'tset', cannot be opened: .*tset"):
        StreamData(hub=str(tmp_path / "set"), split="tset").train_loader(rank=0, world_size=1).packed.take(1)


def test_files_of_this_machine_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(tmp_path, "jsonl", [9])

    def refuse(*rest: Any, **more: Any) -> Any:
        raise AssertionError("a network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    packed(files).take(1)


def test_without_the_package_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(tmp_path, "jsonl", [3])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match="StreamData needs the package datasets: pip install 'switchkit\\[datasets\\]'"
    ):
        StreamData(files, validation_path=files)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"path": None}, "data.path and data.hub are both missing"),
        ({"path": "a.txt", "hub": "b"}, "data.path and data.hub contradict each other"),
        ({"validation_path": None}, "data.validation_path is missing: name files to hold out"),
        ({"path": None, "hub": "a"}, "with data.hub give data.validation_split"),
        ({"hub_config": "en"}, "data.hub_config 'en' goes with data.hub: leave it out \\(null\\) beside data.path"),
        ({"split": "test"}, "data.split 'test' goes with data.hub: leave it out \\('train'\\) beside data.path"),
        ({"validation_split": "test"}, "data.validation_split 'test' goes with data.hub: leave it out"),
        ({"path": "gone.jsonl"}, "data.path gone.jsonl: there is no such file"),
        ({"path": "*.nothing"}, "data.path \\*.nothing: there is no such file"),
        ({"path": "."}, "data.path . is a folder; name its files by a pattern"),
        ({"path": "http://a/b.jsonl"}, "only files of this machine are read"),
        ({"path": "good.bin"}, "the format is told by the ending"),
        ({"path": ["good.jsonl", "good.txt"]}, "several formats \\(json, text\\)"),
        ({"path": []}, "data.path is empty"),
        ({"validation_path": "x.jsonl"}, "data.validation_path x.jsonl: there is no such file"),
        ({"path": "*d.jsonl"}, "data.path names held.jsonl, which data.validation_path holds out: name other files"),
        ({"buffer": 0}, "data.buffer 0 is not possible"),
        ({"objectives": []}, "data.objectives is empty"),
        ({"column": "t"}, "no column 't'; data.column is one of 'n', 'text'"),
        ({"column": "n"}, "example 1: the column 'n' holds 0, not text"),
        ({"path": "broken.jsonl"}, "broken.jsonl: the example after number 0 cannot be read"),
        ({"path": "empty.txt"}, "empty.txt has no text: name files with text in 'text'"),
        ({"validation_path": "empty.txt"}, "empty.txt: the held-out texts have 0 tokens"),
        ({"tokenizer": CharTokenizer("ab")}, "good.jsonl: the character '<'"),
    ],
)  # fmt: skip
def test_mistakes_are_told(tmp_path, monkeypatch, options: dict[str, Any], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "jsonl", [3])
    Path("part0.jsonl").rename("good.jsonl")
    shutil.copy("good.jsonl", "held.jsonl")
    Path("good.txt").write_text("a\n")
    Path("good.bin").write_text("a\n")
    Path("empty.txt").write_text("")
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=said):
        source = StreamData(**{"path": "good.jsonl", "validation_path": "held.jsonl", **options})
        source.setup("fit")
        source.train_loader(rank=0, world_size=1).packed.take(1)
        source.evaluation_loader(None)


def test_a_share_without_a_text_is_told(tmp_path: Path) -> None:
    files = write(tmp_path, "jsonl", [1])
    assert packed(files, rank=0, world_size=2).take(1).shape == (1, 16)
    with pytest.raises(ValueError, match="has no text for rank 1 of 2"):
        packed(files, rank=1, world_size=2).take(1)


def test_a_checkpoint_describes_it(tmp_path: Path) -> None:
    write(tmp_path, "jsonl", [3, 3])
    source = data(tmp_path, objectives=[SpanCorruption])
    again = build(describe_object(source))
    assert describe_object(again()) == describe_object(source)


def test_a_comparison_on_another_text_reads_that_text(tmp_path: Path) -> None:
    write(tmp_path, "jsonl", [3, 3])
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "another"}) + "\n")
    source = data(tmp_path)
    opened = Opened(tmp_path / "a.ckpt", source.tokenizer, describe_object(source), source.source_info(), {})
    evaluated = data_of(opened, str(other))
    assert evaluated.source_info()["description"] == "other.jsonl"
    batch = next(iter(evaluated.evaluation_loader(None)))
    assert batch["targets"][batch["valid"]].tolist() == ids_of(["another"])[1:]


def test_files_take_the_place_of_a_dataset_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "another"}) + "\n")
    source = StreamData(hub="a/b", hub_config="en", split="some", validation_split="more", context=8)
    opened = Opened(tmp_path / "a.ckpt", source.tokenizer, describe_object(source), None, {})
    evaluated = data_of(opened, str(tmp_path / "other.jsonl"))
    assert evaluated.path == evaluated.validation_path == str(tmp_path / "other.jsonl")
    assert (evaluated.hub, evaluated.hub_config) == (None, None)


def test_checkpoints_of_other_streams_are_not_compared(tmp_path: Path) -> None:
    files = write(tmp_path, "jsonl", [3, 3])
    whole, part = data(tmp_path), StreamData(files[:1], validation_path=files[1])
    opened = [
        Opened(Path("a.ckpt"), one.tokenizer, describe_object(one), one.source_info(), {}) for one in (whole, part)
    ]
    check_alike([opened[0], opened[0]], same_text=True)
    with pytest.raises(ValueError, match=r"another text \(part0.jsonl\) than .*part0.jsonl and 1 more"):
        check_alike(opened, same_text=True)
