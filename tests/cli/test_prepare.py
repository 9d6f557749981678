"""``switchkit prepare``: from files to a folder that the other commands train on."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from switchkit.data import ByteTokenizer, ShardCorpus


def test_characters_by_default(run, folder):
    code, out, err = run("prepare", "--out", "tokens", "--shard_tokens", "1000", "text.txt")
    assert (code, out) == (0, "")
    assert "tokens: 4,500 tokens of 29 ids (uint16), 4,050 to train on and 450 held out, in 5 files" in err
    text = (folder / "text.txt").read_text()
    corpus = ShardCorpus("tokens")
    assert corpus.tokenizer.decode(corpus.train[:]) + corpus.tokenizer.decode(corpus.held_out[:]) == text


@pytest.mark.slow
def test_a_recipe_trains_on_the_folder(run):
    assert run("prepare", "--out", "tokens", "text.txt")[0] == 0
    code, _, err = run(
        "fit", "--config", "small.yaml", "--data.path", "tokens", "--trainer.enable_progress_bar", "false"
    )
    assert code == 0, err
    assert run("validate", "--ckpt_path", "last", "--trainer.enable_progress_bar", "false")[0] == 0


def test_an_option_between_two_texts(run):
    for name in ("a.txt", "b.txt"):
        Path(name).write_text(name * 50)
    assert run("prepare", "a.txt", "--out", "tokens", "b.txt")[0] == 0
    assert run("prepare", "--out", "same", "a.txt", "b.txt")[0] == 0
    assert ShardCorpus("tokens").train[:].tolist() == ShardCorpus("same").train[:].tolist()


def test_stdin_and_bytes(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"to be")))
    assert run("prepare", "--out", "tokens", "--tokenizer", "bytes", "--held_out", "0.4", "-")[0] == 0
    corpus = ShardCorpus("tokens")
    assert corpus.tokenizer == ByteTokenizer()
    assert (corpus.train[:].tolist(), len(corpus.held_out)) == ([119, 114, 35], 2)


def test_sub_words_of_a_file(run):
    assert run("tokenizer", "train", "--vocab_size", "300", "--sentinels", "5", "text.txt")[0] == 0
    assert run("prepare", "--out", "tokens", "--tokenizer", "tokenizer.json", "text.txt")[0] == 0
    assert len(ShardCorpus("tokens").tokenizer.sentinels) == 5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--out", "x"], "the following arguments are required: FILE"),
        (["text.txt"], "the following arguments are required: --out"),
        (["--out", "x", "gone.txt"], "there is no file gone.txt"),
        (["--out", "mine.py", "text.txt"], "mine.py is there already: name another folder, or remove it first"),
        (["--out", "mine.py/x", "text.txt"], "--out mine.py/x cannot be written"),
        (["--out", "x", "--held_out", "1", "text.txt"], "--held_out: expected a number above 0 and below 1, got '1'"),
        (["--out", "x", "--shard_tokens", "0", "text.txt"], "--shard_tokens: expected an integer of at least 1"),
        (["--out", "x", "--tokenizer", "gone.json", "text.txt"], "there is no tokenizer gone.json"),
        (["--out", "x", "--tokenizer", "text.txt", "text.txt"], "text.txt is no tokenizer file"),
        (["--out", "x", "-"], "the characters of stdin are known only when it has been read"),
        (["--out", "x", "--shards", "1", "text.txt"], "unknown option '--shards'. Did you mean '--shard_tokens'?"),
    ],
)
def test_a_mistake_is_one_line(run, folder, argv, words):
    before = sorted(folder.iterdir())
    code, out, err = run("prepare", *argv)
    assert (code, out) == (2, "")
    assert words in err
    assert err.splitlines()[-1].startswith("switchkit: error: ")
    assert sorted(folder.iterdir()) == before


class Interrupted(io.RawIOBase):
    """A stdin during whose third read a signal comes."""

    def __init__(self, number):
        self.number, self.reads = number, 0

    def read(self, size=-1):
        self.reads += 1
        if self.reads == 3:
            signal.raise_signal(self.number)
        return b"a line\n" * (size // 7) if self.reads < 9 else b""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_leaves_nothing(run, folder, monkeypatch, number, code):
    before, handler = sorted(folder.iterdir()), signal.getsignal(signal.SIGTERM)
    # In the background of a shell Ctrl-C is ignored, and so it would be here.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    stream = Interrupted(number)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream))
    try:
        assert run("prepare", "--out", "tokens", "--tokenizer", "bytes", "-")[0] == code
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert stream.reads == 3
    assert sorted(folder.iterdir()) == before
    assert signal.getsignal(signal.SIGTERM) == handler
