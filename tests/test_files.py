"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from switchkit.files import put, write_text, writes


def test_a_text_takes_the_place_of_another_in_one_step(tmp_path: Path) -> None:
    """Whoever has opened the one before reads it to its end."""
    path, before = tmp_path / "a.json", tmp_path / "before"
    path.write_text("old")
    os.link(path, before)
    write_text(path, "neu: ü")
    assert path.read_bytes() == "neu: ü".encode()
    assert before.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [path, before]


def test_nothing_is_left_of_a_text_that_cannot_take_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OSError, match="a.json"):
        write_text(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_rename_itself_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    synced: list[tuple[bool, bool]] = []
    new = tmp_path / "new"
    new.mkdir() if kind == "folder" else new.write_text("x")
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append((os.path.samestat(os.fstat(number), tmp_path.stat()), new.exists()))
    )
    put(new, tmp_path / "last.ckpt")
    assert synced == [(True, False)]  # the folder, once what was new has its name


def test_what_keeps_a_file_from_being_written_is_told_of_that_file(tmp_path: Path) -> None:
    """torch.save makes a RuntimeError of a full disk, which is where its context is; any other stays what it is."""

    def saves() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904

    with pytest.raises(OSError, match="No space left on device: .*last.ckpt") as told, writes(tmp_path / "last.ckpt"):
        saves()
    assert told.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="of its own"), writes(tmp_path / "last.ckpt"):
        raise RuntimeError("of its own")


@pytest.mark.parametrize("old", ["file", "folder", None])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_what_is_put_in_place_is_alone_there(tmp_path: Path, old: str | None, new: str) -> None:
    """What was there, and what an earlier move that was killed left aside, is gone."""

    def made(name: str, kind: str) -> Path:
        path = tmp_path / name
        if kind == "folder":
            path.mkdir()
        (path / "x" if kind == "folder" else path).write_text(name)
        return path

    if old is not None:
        made("last.ckpt", old)
    left = [made("last.previous.ckpt", "folder")] if old is not None and "folder" in (old, new) else []
    put(made("new", new), tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"], left
    found = tmp_path / "last.ckpt"
    assert (found / "x" if new == "folder" else found).read_text() == "new"
