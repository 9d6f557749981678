"""Tokenizer files: the package's own ids, what the file may not do, and the content that stands for the file."""

from __future__ import annotations

import copy
import json
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from switchkit.data import DataError, FileTokenizer, Tokenizer
from switchkit.spec import build, describe

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps\n" * 5


def trained() -> tokenizers.Tokenizer:
    """Byte-level, with T5's special tokens; none of it is our code."""
    own = tokenizers.Tokenizer(tokenizers.models.BPE())
    bytewise = tokenizers.pre_tokenizers.ByteLevel
    own.pre_tokenizer = bytewise(add_prefix_space=False)
    own.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=297,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(bytewise.alphabet()),
        show_progress=False,
    )
    own.train_from_iterator([TEXT], trainer=trainer)
    own.add_special_tokens([f"<extra_id_{i}>" for i in (2, 1, 0)])
    return own


OWN = trained()
JSON = OWN.to_str()


@pytest.fixture(scope="module")
def tokenizer() -> FileTokenizer:
    return FileTokenizer(content=JSON)


def changed(**changes: Any) -> str:
    return json.dumps({**json.loads(JSON), **changes})


def test_ids_are_the_packages(tokenizer: FileTokenizer) -> None:
    for text in ("the quick", "", "Zoë 漢字 \x00 🎉\r\n\n x"):
        assert tokenizer.encode(text).tolist() == OWN.encode(text).ids
        assert [ids.tolist() for ids in tokenizer.encode_batch([text, "fox"])] == [
            OWN.encode(text).ids,
            OWN.encode("fox").ids,
        ]


def test_special_ids(tokenizer: FileTokenizer) -> None:
    assert (tokenizer.vocab_size, OWN.get_vocab_size()) == (300, 300)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.start_id) == (0, 1, 0)
    assert list(tokenizer.sentinels) == [299, 298, 297]
    assert tokenizer.sentinel(1) == 298
    with pytest.raises(ValueError, match="sentinel 3 is not in the vocabulary of FileTokenizer, which has 3"):
        tokenizer.sentinel(3)
    assert tokenizer.special_id("<extra_id_0>") == 299
    assert tokenizer.special_id("the") is None


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["</s>", "<extra_id_1>", "<pad>", "the ", "\n", "é", "漢"]) | st.text(max_size=5)))
def test_decode_undoes_encode_and_no_text_gives_a_special_id(parts: list[str]) -> None:
    tokenizer, text = FileTokenizer(content=JSON), "".join(parts)
    ids = tokenizer.encode(text)
    assert not {0, 1, 2, 297, 298, 299} & set(ids.tolist())
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text


@pytest.mark.parametrize("letters", ["acdefiprstx<>/_01", "acdefpst"], ids=["every letter", "unknown ones"])
def test_a_special_token_that_is_a_piece_is_spelled_out(letters: str) -> None:
    """As in T5's file, where these are the likeliest pieces, and the letters may be missing."""
    special = ["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_1>"]
    pieces = [(piece, 0.0) for piece in special] + [("\u2581", -2.0)] + [(letter, -3.0) for letter in letters]
    own = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    own.decoder = tokenizers.decoders.Metaspace()
    own.add_special_tokens(special)
    tokenizer = FileTokenizer(content=own.to_str())
    assert tokenizer.encode("fast cat").tolist() == own.encode("fast cat").ids
    for text in ("a <s>fat</s> cat", "a<pad>", "<<pad>>", "</s></s>", "see <extra_id_0> x<extra_id_1>"):
        ids = tokenizer.encode(text)
        assert not {0, 1, 3, 4} & set(ids.tolist())
        if "<" in letters:
            assert tokenizer.decode(ids) == text


def test_decoding_leaves_out_the_ends_and_writes_sentinels(tokenizer: FileTokenizer) -> None:
    ids = [0, *tokenizer.encode("the"), 299, *tokenizer.encode(" fox"), 1, 0]
    assert tokenizer.decode(ids) == "the<extra_id_0> fox"
    for wrong in ([300], [0, -1]):
        with pytest.raises(ValueError, match=rf"the id {wrong[-1]} at position .* ids are 0 to 299"):
            tokenizer.decode(wrong)


def test_the_file_cuts_off_fills_up_adds_and_draws_nothing(tokenizer: FileTokenizer) -> None:
    """All of these are in published files, and each would change a corpus silently."""
    own = tokenizers.Tokenizer.from_str(JSON)
    own.enable_truncation(3)
    own.enable_padding(length=50)
    own.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    own.model.dropout = 0.9
    assert len(own.encode(TEXT).ids) == 50
    assert FileTokenizer(content=own.to_str()).encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


def test_roles_and_the_models_size() -> None:
    own = FileTokenizer(content=JSON, pad="</s>", eos="<unk>", vocab_size=384)
    assert (own.pad_id, own.eos_id, own.vocab_size) == (1, 2, 384)
    assert own.decode([383]) == ""
    bare = FileTokenizer(content=tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 7}, "a")).to_str())
    assert (bare.pad_id, bare.eos_id, list(bare.sentinels)) == (None, None, [])
    assert bare.vocab_size == 8  # ids need not be without gaps
    with pytest.raises(DataError, match="eos '<end>' is not a token of"):
        FileTokenizer(content=JSON, eos="<end>")
    with pytest.raises(DataError, match="vocab_size 299 is not possible for .*, which has 300 ids"):
        FileTokenizer(content=JSON, vocab_size=299)


def test_a_checkpoint_needs_no_file(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(JSON)
    first = FileTokenizer(str(file), pad="</s>", vocab_size=400)
    file.unlink()
    spec = json.loads(json.dumps(describe(first)))
    assert set(spec["init_args"]) == {"content", "pad", "eos", "vocab_size"}
    again: Tokenizer = build(spec)()
    assert again == first
    assert (again.pad_id, again.vocab_size) == (1, 400)
    assert again.encode(TEXT).tolist() == OWN.encode(TEXT).ids
    assert describe(again) == spec
    assert again == FileTokenizer(content=JSON, pad="</s>", vocab_size=400)
    assert again != FileTokenizer(content=JSON)
    assert hash(again) == hash(first)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_keep_everything(tokenizer: FileTokenizer, copied: Any) -> None:
    other = copied(FileTokenizer(content=JSON, eos="<unk>"))
    assert other.eos_id == 2
    assert other.encode("</s>").tolist() == tokenizer.encode("</s>").tolist() != [1]


def test_the_command_line_builds_it(tmp_path: Path, tokenizer: FileTokenizer) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(JSON)
    parser = ArgumentParser()
    parser.add_argument("--tokenizer", type=Tokenizer)
    for option in (f"path={file}", f"content={tokenizer.content}"):
        parsed = parser.parse_args(["--tokenizer=FileTokenizer", f"--tokenizer.{option}"])
        assert parser.instantiate(parsed).tokenizer == tokenizer


# What cannot be.


def test_a_missing_package_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'switchkit\[hf\]'"):
        FileTokenizer(content=JSON)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no tokenizer .*gone\.json \(from .*switchkit tokenizer train"):
        FileTokenizer(str(tmp_path / "gone.json"))
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"is a folder; name .*tokenizer\.json"):
        FileTokenizer(str(tmp_path))
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read: it is not UTF-8"):
        FileTokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("arguments", [{}, {"path": "a", "content": "b"}])
def test_one_of_path_and_content(arguments: dict[str, str]) -> None:
    with pytest.raises(DataError, match="a path or a content, one of them"):
        FileTokenizer(**arguments)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "null", "[" * 100_000, '{"model": ' * 5000, "zlib:", "zlib:!", "zlib:AAAA"]
)
def test_hostile_content_is_one_error(content: str) -> None:
    with pytest.raises(DataError, match="the tokenizer's content"):
        FileTokenizer(content=content)


def test_a_packed_content_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch, tokenizer: FileTokenizer) -> None:
    monkeypatch.setattr("switchkit.data.subwords._LARGEST", 1000)
    with pytest.raises(DataError, match="more than 1000 bytes"):
        FileTokenizer(content=tokenizer.content)
    monkeypatch.undo()
    with pytest.raises(DataError, match="cut short"):
        FileTokenizer(content=tokenizer.content[:405])


def test_damaged_content_is_an_error_or_a_vocabulary() -> None:
    draw = random.Random(0)
    refused = 0
    for _ in range(60):
        start = draw.randrange(len(JSON))
        end = start + draw.choice([0, 1, 5, 100, 2000])
        content = JSON[:start] + draw.choice(["", "[", "{}", "null", "-1", "1e400", '"a"']) + JSON[end:]
        try:
            found = FileTokenizer(content=content)
        except DataError:
            refused += 1
        else:
            assert isinstance(found.sentinels, tuple)
    assert refused > 30
