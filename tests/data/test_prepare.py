"""Texts made into shards: the tokens of the whole text, in little memory, and nothing left where it fails."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from switchkit.data import (
    ByteTokenizer,
    CharTokenizer,
    DataError,
    FileTokenizer,
    ShardCorpus,
    ShardedTokens,
    TextData,
    Tokenizer,
    generated_play,
    text_files,
)
from switchkit.data.prepare import characters_of, prepare
from switchkit.data.text_files import TextFile
from switchkit.data.train_tokenizer import train_tokenizer

PLAY = generated_play(0, 5000) + "   two  spaces \n\n\n\ttabs\r\né漢🎉 </s> end\n"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A text of many pieces."""
    monkeypatch.setattr(text_files, "_PIECE", 50)
    monkeypatch.setattr(text_files, "_READ", 31)
    path = tmp_path / "play.txt"
    path.write_text(PLAY, newline="")
    return str(path)


@pytest.fixture(scope="module")
def subwords(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    path = tmp_path_factory.mktemp("text") / "play.txt"
    path.write_text(PLAY)
    return train_tokenizer([TextFile(str(path))], 400, sentinels=10)


@pytest.mark.parametrize("kind", ["characters", "bytes", "subwords"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_tokens_are_those_of_the_whole_text(
    tmp_path: Path, file: str, subwords: FileTokenizer, kind: str, packed: bool
) -> None:
    if packed:
        Path(f"{file}.gz").write_bytes(gzip.compress(Path(file).read_bytes()))
        file = f"{file}.gz"
    texts = [TextFile(file)]
    known = {"bytes": ByteTokenizer(), "subwords": subwords}
    tokenizer: Tokenizer = known.get(kind) or characters_of(texts)
    told: list[tuple[int, int]] = []
    index = prepare(tmp_path / "out", texts, tokenizer, shard_tokens=333, told=lambda *now: told.append(now))
    expected = tokenizer.encode(PLAY)
    assert torch.equal(ShardedTokens(tmp_path / "out")[:], expected)
    assert index.train_tokens == len(expected) * 9 // 10
    corpus = ShardCorpus(str(tmp_path / "out"))
    corpus.verify()
    assert corpus.tokenizer == tokenizer
    assert sum(count for count, _ in told) == Path(file).stat().st_size
    assert told[-1][1] == len(expected)


def test_a_folder_of_characters_is_what_text_data_makes_of_the_file(tmp_path: Path, file: str) -> None:
    texts = [TextFile(file)]
    prepare(tmp_path / "out", texts, characters_of(texts))
    plain, mapped = TextData(Path(file)), TextData(str(tmp_path / "out"))
    assert mapped.tokenizer == plain.tokenizer
    assert torch.equal(mapped.train_tokens[:], plain.train_tokens[:])
    assert torch.equal(mapped.held_out_tokens[:], plain.held_out_tokens[:])


@pytest.mark.parametrize("held_out", [0.1, 0.3, 0.999, 1e-9])
def test_the_share_held_out(tmp_path: Path, file: str, held_out: float) -> None:
    index = prepare(tmp_path / "out", [TextFile(file)], ByteTokenizer(), held_out=held_out)
    assert 0 <= held_out * index.tokens - (index.tokens - index.train_tokens) + 1 <= 1 + 1e-6


@pytest.mark.parametrize(("held_out", "train"), [(0.9, 1), (0.3, 7), (0.1, 9)])
def test_the_share_is_that_of_the_decimal(tmp_path: Path, held_out: float, train: int) -> None:
    """In floats 10 * (1 - 0.9) is less than 1."""
    (tmp_path / "ten").write_text("abcdefghij")
    index = prepare(tmp_path / "out", [TextFile(str(tmp_path / "ten"))], ByteTokenizer(), held_out=held_out)
    assert index.train_tokens == train


@pytest.mark.parametrize("held_out", [1e-9, 0.9999])
def test_a_text_too_short_for_the_share_is_refused(tmp_path: Path, held_out: float) -> None:
    (tmp_path / "short").write_text("a" if held_out < 0.5 else "abc")
    before = left(tmp_path)
    with pytest.raises(DataError, match=rf"held_out {held_out} of \d tokens leaves 0 to train on"):
        prepare(tmp_path / "out", [TextFile(str(tmp_path / "short"))], ByteTokenizer(), held_out=held_out)
    assert left(tmp_path) == before


def test_between_texts_is_the_end_of_one_where_there_is_one(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name * 2)
    texts = [TextFile(str(tmp_path / name)) for name in "abc"]
    own = ByteTokenizer()
    prepare(tmp_path / "bytes", texts, own)
    a, b, c = (ord(letter) + 3 for letter in "abc")
    assert ShardedTokens(tmp_path / "bytes")[:].tolist() == [a, a, 1, b, b, 1, c, c]
    index = prepare(tmp_path / "characters", texts, CharTokenizer("abc"))
    assert ShardedTokens(tmp_path / "characters")[:].tolist() == [0, 0, 1, 1, 2, 2]
    assert [told["file"] for told in index.source["files"]] == [text.name for text in texts]
    assert [told["characters"] for told in index.source["files"]] == [2, 2, 2]


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    def peak(megabytes: int) -> int:
        path = tmp_path / f"{megabytes}.txt"
        path.write_text(("a line of some length, as they are\n" * 30_000)[: 1 << 20] * megabytes)
        tracemalloc.start()
        prepare(tmp_path / f"out{megabytes}", [TextFile(str(path))], ByteTokenizer())
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(6) < 1.2 * peak(2) < 6 << 20


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_failure_leaves_nothing(tmp_path: Path, file: str) -> None:
    (tmp_path / "bad").write_bytes(b"x" * 500 + b"\xff")
    before = left(tmp_path)
    with pytest.raises(DataError, match="bad is not UTF-8: byte 0xff at offset 500"):
        prepare(tmp_path / "out", [TextFile(file), TextFile(str(tmp_path / "bad"))], ByteTokenizer())
    with pytest.raises(DataError, match=r"bad: the character 'x' .* is not in the vocabulary"):
        prepare(tmp_path / "out", [TextFile(str(tmp_path / "bad"))], CharTokenizer("abc"))
    assert left(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(28, "No space left on device")])
def test_neither_do_ctrl_c_and_a_full_disk(tmp_path: Path, file: str, error: BaseException) -> None:
    before = left(tmp_path)
    calls = iter(range(1000))

    def told(count: int, tokens: int) -> Any:
        if next(calls) == 20:
            raise error

    expected = DataError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        prepare(tmp_path / "out", [TextFile(file)], ByteTokenizer(), shard_tokens=100, told=told)
    assert left(tmp_path) == before


def test_what_is_there_is_not_overwritten(tmp_path: Path, file: str) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="out is there already: name another folder"):
        prepare(tmp_path / "out", [TextFile(file)], ByteTokenizer())
    assert left(tmp_path) == {"out", "play.txt"}


def test_characters_of_what_can_be_read_once() -> None:
    with pytest.raises(DataError, match="the characters of stdin are known only when .* take --tokenizer bytes"):
        characters_of([TextFile("-")])


def spaced(kind: str) -> FileTokenizer:
    """A vocabulary that puts a space before each text, as SentencePiece's do: by its pre-tokenizer, or as Llama's."""
    package = pytest.importorskip("tokenizers")
    own = package.Tokenizer(package.models.BPE(unk_token="<unk>"))
    own.pre_tokenizer = package.pre_tokenizers.Metaspace()
    own.decoder = package.decoders.Metaspace()
    trainer = package.trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False
    )
    own.train_from_iterator([PLAY[:3000]], trainer)
    if kind == "normalizer":
        replaced = package.normalizers.Replace(" ", "▁")
        own.normalizer = package.normalizers.Sequence([package.normalizers.Prepend("▁"), replaced])
        own.pre_tokenizer = None
    return FileTokenizer(content=own.to_str())


@pytest.mark.parametrize("kind", ["pre-tokenizer", "normalizer"])
def test_a_space_that_a_vocabulary_puts_before_a_text_stands_there_once(tmp_path: Path, file: str, kind: str) -> None:
    tokenizer = spaced(kind)
    index = prepare(tmp_path / "out", [TextFile(file)], tokenizer)
    assert index.tokens > 1000
    assert torch.equal(ShardedTokens(tmp_path / "out")[:], tokenizer.encode(PLAY))


def test_a_text_that_such_a_vocabulary_encodes_as_a_whole_only_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_PIECE", 50)
    monkeypatch.setattr("switchkit.data.prepare._HELD", 200)
    (tmp_path / "solid").write_text("nospaces\n" * 100)
    before = left(tmp_path)
    with pytest.raises(DataError, match=r"solid: this vocabulary encodes \d+ characters as a whole only"):
        prepare(tmp_path / "out", [TextFile(str(tmp_path / "solid"))], spaced("normalizer"))
    assert left(tmp_path) == before


def test_a_text_without_spaces_is_cut_between_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subwords: FileTokenizer
) -> None:
    monkeypatch.setattr(text_files, "_PIECE", 50)
    monkeypatch.setattr(text_files, "_READ", 31)
    text = "".join(PLAY.split())
    (tmp_path / "solid").write_text(text)
    prepare(tmp_path / "out", [TextFile(str(tmp_path / "solid"))], subwords)
    assert torch.equal(ShardedTokens(tmp_path / "out")[:], subwords.encode(text))
