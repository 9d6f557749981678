"""``switchkit tokenizer train``: a vocabulary of the user's own text."""

from __future__ import annotations

import pytest

from switchkit.data import FileTokenizer


def test_it_writes_a_file_that_other_programs_read(run, folder):
    from tokenizers import Tokenizer

    code, out, err = run("tokenizer", "train", "--vocab_size", "290", "--sentinels", "20", "text.txt")
    assert (code, out) == (0, "")
    assert "switchkit: tokenizer.json: 290 ids; use it with switchkit prepare --tokenizer tokenizer.json" in err
    found = FileTokenizer("tokenizer.json")
    assert (found.vocab_size, found.pad_id, found.eos_id, found.sentinel(0), found.sentinel(19)) == (
        290,
        0,
        1,
        289,
        270,
    )
    text = (folder / "text.txt").read_text()
    assert Tokenizer.from_file("tokenizer.json").encode(text).ids == found.encode(text).tolist()


def test_kind_out_and_a_text_that_gives_fewer(run):
    command = ("tokenizer", "train", "--vocab_size", "5000", "--kind", "unigram", "--out", "new/mine.json", "text.txt")
    code, _, err = run(*command)
    assert code == 0
    assert "(the text gives no more than that of 5,000)" in err
    assert "Unigram" in repr(FileTokenizer("new/mine.json"))


def test_help(run):
    for argv in (["tokenizer"], ["tokenizer", "--help"]):
        code, out, _ = run(*argv)
        assert (code, "switchkit tokenizer train --vocab_size N" in out) == (0, True)
    code, out, _ = run("tokenizer", "train", "--help")
    assert code == 0
    assert "--sentinels" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "unknown action 'trian'. Did you mean 'train'?"),
        (["train", "text.txt"], "the following arguments are required: --vocab_size"),
        (["train", "--vocab_size", "300", "text.txt"], "--vocab_size 300 is too small"),
        (["train", "--vocab_size", "many", "text.txt"], "expected an integer from 1 to 16777216, got 'many'"),
        (["train", "--vocab_size", "500", "--kind", "words", "text.txt"], "--kind: invalid choice: 'words'"),
        (["train", "--vocab_size", "500", "gone.txt"], "there is no file gone.txt"),
        (["train", "--vocab_size", "500", "latin.txt"], "latin.txt is not UTF-8: byte 0xe9 at offset 3"),
        (["train", "--vocab_size", "500", "--out", "text.txt/x", "text.txt"], "text.txt' is a file, and no folder"),
        (["train", "--vocab_size", "500", "--out", ".", "text.txt"], "--out . is a folder: name a file in it"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(run, folder, argv, words):
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    before = sorted(folder.iterdir())
    code, out, err = run("tokenizer", *argv)
    assert (code, out) == (2, "")
    assert words in err
    assert sorted(folder.iterdir()) == before


def test_without_the_package_the_command_is_told(run, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    code, _, err = run("tokenizer", "train", "--vocab_size", "500", "text.txt")
    assert code == 2
    assert "pip install 'switchkit[hf]'" in err
