"""Token shards read like one tensor, and folders that are not what was written."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from switchkit.data import (
    ByteTokenizer,
    CharTokenizer,
    DataError,
    FileTokenizer,
    InOrder,
    RandomWindows,
    ShardCorpus,
    ShardedTokens,
    SpanData,
    TextData,
)
from switchkit.data.prepare import prepare
from switchkit.data.shard_index import ShardIndex, dtype_for
from switchkit.data.shard_writer import ShardWriter, new_folder
from switchkit.data.text_files import TextFile
from switchkit.data.train_tokenizer import train_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:GPU available", "ignore:You passed in a")

CHARACTERS = CharTokenizer("".join(map(chr, range(1000))))
TOKENS = torch.randint(1000, (1000,), generator=torch.Generator().manual_seed(0))


def write(folder: Path, tokens: Tensor = TOKENS, *, shard_tokens: int = 300, train: int = 900) -> Path:
    with new_folder(folder) as inside:
        writer = ShardWriter(inside, CHARACTERS, shard_tokens=shard_tokens)
        for part in tokens.split(77):
            writer.write(part)
        writer.finish(train, {"files": []})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("shards") / "corpus")


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A folder to damage."""
    return write(tmp_path / "corpus")


# Reading.


def test_what_is_on_disk(folder: Path) -> None:
    """Little-endian numbers one after another, readable without this package."""
    files = sorted(folder.glob("*.bin"))
    assert [file.stat().st_size // 2 for file in files] == [300, 300, 300, 100]
    assert np.concatenate([np.fromfile(file, "<u2") for file in files]).tolist() == TOKENS.tolist()
    told = json.loads((folder / "index.json").read_text())
    assert (told["format_version"], told["dtype"], told["train_tokens"]) == (1, "uint16", 900)
    assert [s["sha256"] for s in told["shards"]] == [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]


@pytest.mark.parametrize("shard_tokens", [1, 7, 300, 500, 5000])
@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 900), (900, None), (299, 302), (50, 50)])
def test_it_reads_like_a_tensor(tmp_path: Path, shard_tokens: int, start: int, stop: int | None) -> None:
    part = TOKENS[:150] if shard_tokens == 1 else TOKENS
    tokens = ShardedTokens(write(tmp_path / "x", part, shard_tokens=shard_tokens, train=100), start, stop)
    expected = part[start:stop]
    assert len(tokens) == len(expected)
    for a, b in [(None, None), (0, 1), (5, 5), (3, 350), (290, 310), (-3, None), (None, 10**9), (7, 2)]:
        assert torch.equal(tokens[a:b], expected[a:b])
        assert tokens[a:b].dtype == torch.long
    if len(expected):
        places = torch.randint(len(expected), (4, 5, 6))
        assert torch.equal(tokens[places], expected[places])
    assert tokens[torch.zeros(0, dtype=torch.long)].shape == (0,)


def test_places_outside_are_refused(folder: Path) -> None:
    """Else a window past the training part would read what is held out."""
    tokens = ShardedTokens(folder, 100, 200)
    for place in (-1, 100):
        with pytest.raises(IndexError, match=f"places of 100 tokens are 0 to 99, got {place}"):
            tokens[torch.tensor([place])]
    with pytest.raises(ValueError, match="step 1, got 2"):
        tokens[::2]


@pytest.mark.parametrize("size", [65536, 65537])
def test_large_vocabularies_take_four_bytes(tmp_path: Path, size: int) -> None:
    with new_folder(tmp_path / "x") as inside:
        writer = ShardWriter(inside, ByteTokenizer(size), shard_tokens=2)
        writer.write(torch.tensor([0, 40000, size - 1]))
        index = writer.finish(2, {})
    assert index.dtype == dtype_for(size) == ("uint16" if size == 65536 else "uint32")
    assert ShardedTokens(tmp_path / "x")[:].tolist() == [0, 40000, size - 1]


def test_nothing_is_copied_and_no_file_stays_open(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", TOKENS[:200], shard_tokens=2, train=100)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    tokens = ShardedTokens(folder)
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 1
        assert sum("tokens-" in line for line in Path("/proc/self/maps").read_text().splitlines()) >= 100
    assert torch.equal(tokens[:], TOKENS[:200])


def test_a_read_only_folder_will_do(own: Path) -> None:
    for file in own.iterdir():
        file.chmod(0o444)
    own.chmod(0o555)
    assert torch.equal(ShardedTokens(own)[:], TOKENS)
    own.chmod(0o755)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_maps_the_files_again(folder: Path, copied: Callable[[Any], Any]) -> None:
    tokens = ShardedTokens(folder, 10, 900)
    assert len(pickle.dumps(tokens)) < 1000
    other = copied(tokens)
    assert torch.equal(other[:], tokens[:])


def test_loaders_see_what_they_see_in_a_tensor(folder: Path) -> None:
    mapped = ShardedTokens(folder, 0, 900)
    for rank in range(2):
        pairs = [RandomWindows(t, 50, 3, seed=5, rank=rank, world_size=2) for t in (mapped, TOKENS[:900])]
        for a, b in zip(*pairs, strict=True):
            assert torch.equal(a["tokens"], b["tokens"])
            assert torch.equal(a["targets"], b["targets"])
    for a, b in zip(InOrder(mapped, 70, 3), InOrder(TOKENS[:900], 70, 3), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


# In a data module.


class Reader(L.LightningModule):
    """Writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.seen.append(batch["tokens"].flatten().tolist())
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(
        default_root_dir=folder, **{**quiet, "limit_val_batches": 0, "enable_checkpointing": False, **options}
    )


def test_text_data_reads_it_and_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    def data() -> TextData:
        return TextData(str(folder), context=16, batch_size=4)

    one = data()
    one.setup()
    assert one.tokenizer == CHARACTERS
    assert (len(one.train_tokens), len(one.held_out_tokens)) == (900, 100)
    targets = torch.cat([batch["targets"][batch["valid"]] for batch in one.val_dataloader()])
    assert torch.equal(targets, TOKENS[901:])
    whole, first, second = Reader(), Reader(), Reader()
    trainer(tmp_path, max_steps=20).fit(whole, data())
    run = trainer(tmp_path, max_steps=7)
    run.fit(first, data())
    run.save_checkpoint(tmp_path / "run.ckpt")
    trainer(tmp_path, max_steps=20).fit(second, data(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert first.seen + second.seen == whole.seen
    assert len(whole.seen) == 20


def test_span_data_reads_it(tmp_path: Path) -> None:
    text = "to be or not to be, that is the question. " * 50
    with new_folder(tmp_path / "x") as inside:
        writer = ShardWriter(inside, ByteTokenizer(), shard_tokens=500)
        writer.write(ByteTokenizer().encode(text))
        writer.finish(len(text) * 9 // 10, {})
    (tmp_path / "x.txt").write_text(text)
    options: dict[str, Any] = {"inputs_length": 64, "batch_size": 2, "eval_batch_size": 2}
    mapped, plain = SpanData(str(tmp_path / "x"), **options), SpanData(str(tmp_path / "x.txt"), **options)
    for data in (mapped, plain):
        data.setup("fit")
    for loader in ("train_dataloader", "val_dataloader"):
        for a, b in zip(getattr(mapped, loader)(), getattr(plain, loader)(), strict=True):
            assert all(torch.equal(a[name], b[name]) for name in b)


def test_info_is_plain_and_names_the_content(folder: Path) -> None:
    info = json.loads(json.dumps(TextData(str(folder)).source_info()))
    assert info["description"] == "corpus, 1,000 tokens in 4 shards"
    assert (info["origin"], info["tokens"]) == (str(folder), 1000)
    assert info["sha256"] == hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()


def test_another_vocabulary_is_refused(folder: Path) -> None:
    same = TextData(str(folder), tokenizer=CharTokenizer(CHARACTERS.characters))
    assert same.tokenizer == CHARACTERS
    with pytest.raises(DataError, match="tokens of CharTokenizer with 1000 ids, and data.tokenizer is ByteTokenizer"):
        _ = TextData(str(folder), tokenizer=ByteTokenizer()).tokenizer


def test_other_sentinels_and_sizes_make_the_same_tokens(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 20)
    texts = [TextFile(str(text))]
    own = train_tokenizer(texts, 270, sentinels=2)
    byt5, padded = ByteTokenizer(first_sentinel=258), FileTokenizer(content=own.content, vocab_size=300)
    for tokenizer, given in ((ByteTokenizer(), byt5), (own, padded)):
        out = tmp_path / type(tokenizer).__name__
        prepare(out, texts, tokenizer)
        assert TextData(str(out), tokenizer=given).tokenizer is given
    with pytest.raises(DataError, match="and data.tokenizer is FileTokenizer"):
        _ = TextData(str(out), tokenizer=FileTokenizer(content=own.content, eos="<pad>")).tokenizer


# What cannot be.


def test_a_folder_that_came_meanwhile_stays(tmp_path: Path) -> None:
    """An empty one too, whose place a rename would take."""
    with pytest.raises(DataError, match="out is there already"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder without index.json; name one text file, or a folder that"):
        TextData(str(tmp_path)).setup()


def test_missing_and_short_files(own: Path) -> None:
    (own / "tokens-00003.bin").unlink()
    with pytest.raises(DataError, match=r"corpus lacks the shard tokens-00003\.bin that index\.json names"):
        ShardedTokens(own)
    (own / "tokens-00003.bin").write_bytes(bytes(199))
    with pytest.raises(DataError, match=r"tokens-00003\.bin has 199 bytes, and .* 100 tokens of uint16, which are 200"):
        ShardedTokens(own)


def test_changed_bytes_are_found_when_asked_for(own: Path) -> None:
    ShardCorpus(str(own)).verify()
    data = bytearray((own / "tokens-00001.bin").read_bytes())
    data[6:8] = b"\xff\xff"
    (own / "tokens-00001.bin").write_bytes(data)
    with pytest.raises(DataError, match=r"tokens-00001\.bin is not what was written: its sha256"):
        ShardCorpus(str(own)).verify()
    tokens = ShardedTokens(own)
    for places in (slice(0, 400), torch.tensor([0, 303])):
        with pytest.raises(DataError, match=r"tokens-00001\.bin holds the id 65535, and the vocabulary has 1000"):
            tokens[places]
    assert torch.equal(tokens[304:], TOKENS[304:])


HOSTILE: dict[str, tuple[str, Any, str]] = {
    "up": ("shards.0.file", "../secret.bin", "the plain name of a file in the same folder"),
    "absolute": ("shards.0.file", "/etc/passwd", "plain name"),
    "backslash": ("shards.0.file", "..\\secret.bin", "plain name"),
    "drive": ("shards.0.file", "C:secret.bin", "plain name"),
    "hidden": ("shards.0.file", ".secret", "plain name"),
    "itself": ("shards.0.file", "index.json", "plain name"),
    "nul": ("shards.0.file", "a\0b", "plain name"),
    "twice in other letters": ("shards.1.file", "TOKENS-00000.bin", "files that are each named once"),
    "twice": ("shards.1.file", "tokens-00000.bin", "files that are each named once"),
    "no text": ("shards.0.file", 7, "a text"),
    "negative": ("shards.0.tokens", -1, "an integer from 1"),
    "true": ("shards.0.tokens", True, "an integer from 1"),
    "fraction": ("shards.0.tokens", 1.5, "an integer from 1"),
    "huge": ("shards.0.tokens", 10**30, "an integer from 1"),
    "digest": ("shards.0.sha256", "00", "64 hexadecimal digits"),
    "none": ("shards", [], "a list of one shard or more"),
    "mapping": ("shards", {}, "a list of one shard or more"),
    "dtype": ("dtype", "float32", "one of uint16, uint32"),
    "vocabulary": ("vocab_size", 70000, "an integer from 1 to 65536"),
    "train": ("train_tokens", 1001, "an integer from 0 to 1000"),
    "source": ("source", "x", "a mapping"),
    "later": ("format_version", 2, "this switchkit reads up to 1: upgrade switchkit"),
    "version": ("format_version", "1", "an integer from 1"),
    "path": ("tokenizer.init_args.path", "/etc/passwd", "the content of the tokenizer, not a path"),
    "nested": ("tokenizer.init_args.characters", {"class_path": "os.system"}, "a number or a text"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_index_is_one_clear_error(own: Path, case: str) -> None:
    key, value, words = HOSTILE[case]
    told = json.loads((own / "index.json").read_text())
    *parents, last = key.split(".")
    place = told
    for parent in parents:
        place = place[int(parent) if isinstance(place, list) else parent]
    place[last] = value
    (own / "index.json").write_text(json.dumps(told))
    (own.parent / "secret.bin").write_bytes(bytes(600))
    with pytest.raises(DataError, match=words) as caught:
        ShardedTokens(own)
    assert "index.json" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("subprocess.Popen", {"args": "ls"}, "may not name it"),
        ("nowhere.at_all.Tokenizer", {}, "is not imported"),
        ("switchkit.routing.token_choice.TopK", {}, "is no tokenizer"),
        ("switchkit.data.tokenizers.CharTokenizer", {"letters": "ab"}, "unexpected keyword argument"),
        ("switchkit.data.tokenizers.CharTokenizer", {"characters": 7}, "not iterable"),
        ("switchkit.data.tokenizers.CharTokenizer", {"characters": "ab"}, "it has 2 ids, .* written for 1000"),
        ("switchkit.data.subwords.FileTokenizer", {"content": "{}"}, "is no tokenizer file"),
    ],
)
def test_a_hostile_tokenizer_is_one_clear_error(own: Path, name: str, arguments: dict[str, Any], words: str) -> None:
    told = json.loads((own / "index.json").read_text())
    told["tokenizer"] = {"class_path": name, "init_args": arguments}
    (own / "index.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match=rf"index\.json: its tokenizer cannot be rebuilt: .*{words}"):
        _ = ShardCorpus(str(own)).tokenizer


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"[]", b"null"]
)
def test_what_is_no_index_is_one_clear_error(own: Path, data: bytes) -> None:
    (own / "index.json").write_bytes(data)
    with pytest.raises(DataError, match=r"index\.json"):
        ShardIndex.read(own)


def test_a_damaged_index_never_ends_otherwise(own: Path) -> None:
    file, draw = own / "index.json", random.Random(0)
    text, refused = file.read_text(), 0
    begin = text.index('"shards"')
    for _ in range(150):
        start = draw.randrange(begin + 900)
        end = start + draw.choice([0, 1, 3, 10, 100])
        file.write_text(text[:start] + draw.choice(["", "[", "{}", "null", "-1", "1e999", '"a"']) + text[end:])
        try:
            ShardCorpus(str(own)).prepare()
            ShardedTokens(own)
        except DataError:
            refused += 1
    assert refused > 75
