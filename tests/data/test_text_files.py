"""Texts read piece by piece: nothing lost, cut only where a vocabulary cuts, and every bad file named."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switchkit.data import DataError, text_files
from switchkit.data.text_files import TextFile

LETTERS = "ab \n\té漢🎉"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 8 characters, reads of 3 bytes: every character may be torn apart."""
    monkeypatch.setattr(text_files, "_PIECE", 8)
    monkeypatch.setattr(text_files, "_READ", 3)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text") / "text.txt"


def test_several_spaces_are_cut_nowhere(small: None, tmp_path: Path) -> None:
    """They are often one token, or one with what follows: the only place is before the space that stands alone."""
    (tmp_path / "a").write_text("aaaaaaaaa b  c  d")
    assert [*TextFile(str(tmp_path / "a")).pieces()] == ["aaaaaaaaa", " b  c  d"]


@pytest.mark.parametrize("packed", [False, True])
def test_pieces_are_the_text_and_short(small: None, file: Path, packed: bool) -> None:
    path = file.with_suffix(".txt.gz") if packed else file

    @settings(max_examples=60, deadline=None)
    @given(st.text(LETTERS, min_size=1, max_size=100))
    def check(text: str) -> None:
        data = text.encode()
        path.write_bytes(gzip.compress(data) if packed else data)
        reader, counts = TextFile(str(path)), []
        pieces = list(reader.pieces(counts.append))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 2 * 8 + 3
        assert (reader.characters, reader.sha256) == (len(text), hashlib.sha256(data).hexdigest())
        assert sum(counts) == reader.size == path.stat().st_size
        assert min(counts) > 0

    check()


def test_a_cut_is_after_a_line_else_before_a_word_and_never_beside_more_space(small: None, file: Path) -> None:
    """Sub-word vocabularies often join several spaces: " \\n" and "\\n\\n" must stay whole."""
    cuts = {
        "one two\nthree four": ["one two\n", "three four"],
        "aaa\n\nbb \nccccc\nddd": ["aaa\n\nbb \nccccc\n", "ddd"],
        "aaaa bbbb cccc dddd eeee": ["aaaa bbbb cccc", " dddd eeee"],
        "x" * 40: ["x" * 18, "x" * 18, "x" * 4],
    }
    for text, pieces in cuts.items():
        file.write_text(text)
        assert list(TextFile(str(file)).pieces()) == pieces


def test_a_byte_order_mark_is_no_text_but_elsewhere_it_is(small: None, file: Path) -> None:
    file.write_bytes(codecs.BOM_UTF8 + "a\ufeffb".encode())
    assert "".join(TextFile(str(file)).pieces()) == "a\ufeffb"


@pytest.mark.parametrize(
    ("data", "place"),
    [(b"ab\xff", "0xff at offset 2"), (b"a" * 50 + b"\xe6\xbc" + b"a", "0xe6 at offset 50"), (b"abc\xc3", "0xc3 at")],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_byte_that_is_no_utf8_is_named_with_its_place(
    small: None, file: Path, data: bytes, place: str, packed: bool
) -> None:
    path = file.with_suffix(".txt.gz") if packed else file
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(DataError, match=rf"{path.name} is not UTF-8: byte {place}") as caught:
        list(TextFile(str(path)).pieces())
    assert ("of the unpacked text" in str(caught.value)) == packed


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*gone\.txt \(from "):
        TextFile(str(tmp_path / "gone.txt"))
    with pytest.raises(DataError, match=r"is a folder; name the text files in it, such as .*/\*\.txt"):
        TextFile(str(tmp_path))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty\.txt is empty; leave it out"):
        TextFile(str(tmp_path / "empty.txt"))
    (tmp_path / "empty.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match=r"empty\.gz is empty; leave it out"):
        list(TextFile(str(tmp_path / "empty.gz")).pieces())
    with pytest.raises(DataError, match="no text is given"):
        text_files.text_files([])
    with pytest.raises(DataError, match=r"stdin \(-\) is given more than once"):
        text_files.text_files(["-", "-"])


def test_a_damaged_gz_is_named(tmp_path: Path) -> None:
    data = gzip.compress(os.urandom(1000).hex().encode())
    for name, bad in {
        "cut": data[:-20],
        "flipped": data[:200] + bytes([data[200] ^ 255]) + data[201:],
        "no": b"text",
    }.items():
        path = tmp_path / f"{name}.gz"
        path.write_bytes(bad)
        with pytest.raises(DataError, match=rf"{name}\.gz is no whole \.gz file"):
            list(TextFile(str(path)).pieces())


def test_stdin_and_pipes_are_read_once_and_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO("héllo".encode())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream))
    reader = TextFile("-")
    assert reader.size is None
    assert "".join(reader.pieces()) == "héllo"
    assert not stream.closed
    with pytest.raises(DataError, match="stdin is empty"):
        list(TextFile("-").pieces())
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("hello",))
    writer.start()
    reader = TextFile(str(pipe))
    assert reader.size is None
    assert list(reader.pieces()) == ["hello"]
    writer.join()
