"""Where the text comes from, with a server on this machine in place of the net."""

from __future__ import annotations

import hashlib
import http.client
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from switchkit.data import DataError, find_text, generated_play, published, sources

TEXT = generated_play(5, 200_000)
DATA = TEXT.encode()
FILE = sources.CORPORA["tinyshakespeare"].file

Serve = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, an empty cache, and a published text that is really TEXT."""
    for name in ("SWITCHKIT_DATA", "SWITCHKIT_OFFLINE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SWITCHKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    publish(monkeypatch, "http://127.0.0.1:9/refused")
    return tmp_path / "cache"


def publish(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    known = replace(
        sources.CORPORA["tinyshakespeare"], address=address, sha256=hashlib.sha256(DATA).hexdigest(), size=len(DATA)
    )
    monkeypatch.setitem(sources.CORPORA, "tinyshakespeare", known)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts a server that sends the given bytes; returns the list of paths asked for."""
    servers = []

    def start(body: bytes = DATA, status: int = 200, promised: int | None = None) -> list[str]:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(promised or len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        publish(monkeypatch, f"http://127.0.0.1:{server.server_port}/input.txt")
        return asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def put(folder: Path, data: bytes) -> Path:
    file = folder / FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(data)
    return file


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# The published text itself, as it stands in the table.


def test_the_published_text_is_known_by_size_and_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    corpus = sources.CORPORA["tinyshakespeare"]
    assert corpus.size == 1_115_394
    assert corpus.sha256.startswith("86c4e6aa")
    assert corpus.address.startswith("https://")


# A file of one's own.


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes("naïve\r\ntext".encode())
    source = find_text("tinyshakespeare", path=str(file))
    assert source.text == "naïve\r\ntext"
    assert source.origin == str(file)
    assert source.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert not source.generated


def test_a_byte_order_mark_is_no_character(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("text", encoding="utf-8-sig")
    assert find_text("tinyshakespeare", path=str(file)).text == "text"


@pytest.mark.parametrize("fallback", [False, True])
def test_a_path_that_is_wrong_is_an_error_whatever_else_there_is(tmp_path: Path, fallback: bool) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    for name, words in {
        "none.txt": r"none\.txt' does not exist .*; name an existing",
        "": r"is a folder; name one text file",
        "empty.txt": r"empty\.txt' is empty; name",
        "latin.txt": r"latin\.txt' is not UTF-8: byte 0xe9 at offset 3 .*; save the file as UTF-8",
    }.items():
        with pytest.raises(DataError, match=words):
            find_text("tinyshakespeare", path=str(tmp_path / name), fallback=fallback)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match="'tinymilton'; known: tinyshakespeare"):
        find_text("tinymilton")


# The folder of data sets.


def test_the_folder_of_data_sets_comes_first(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    asked = serve()
    file = put(tmp_path / "sets", DATA)
    put(cache, b"rubbish")
    monkeypatch.setenv("SWITCHKIT_DATA", str(tmp_path / "sets"))
    source = find_text("tinyshakespeare")
    assert source.text == TEXT
    assert source.origin == str(file)
    assert not asked


def test_another_text_in_the_folder_is_an_error_with_both_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "sets", b"To be")
    monkeypatch.setenv("SWITCHKIT_DATA", str(tmp_path / "sets"))
    with pytest.raises(DataError) as caught:
        find_text("tinyshakespeare", fallback=True)
    assert hashlib.sha256(b"To be").hexdigest() in str(caught.value)
    assert hashlib.sha256(DATA).hexdigest() in str(caught.value)


def test_a_folder_without_the_text_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    monkeypatch.setenv("SWITCHKIT_DATA", str(tmp_path))
    serve()
    assert find_text("tinyshakespeare").text == TEXT


# Download and cache.


def test_downloaded_once_then_from_the_cache(
    cache: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = serve()
    first = find_text("tinyshakespeare")
    assert first.text == TEXT
    assert first.origin == str(cache / FILE)
    assert (cache / FILE).read_bytes() == DATA
    written = capsys.readouterr()
    assert "Tiny Shakespeare" in written.err
    assert written.out == ""
    monkeypatch.setenv("SWITCHKIT_OFFLINE", "1")
    assert find_text("tinyshakespeare") == first
    assert asked == ["/input.txt"]
    assert files(cache) == [cache / FILE]


def test_the_cache_is_where_the_environment_says(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    serve()
    monkeypatch.delenv("SWITCHKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert find_text("tinyshakespeare").origin == str(tmp_path / "shared" / "switchkit" / FILE)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert find_text("tinyshakespeare").origin == str(tmp_path / "home" / ".cache" / "switchkit" / FILE)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"body": DATA[:-1] + b"?"}, "200000 bytes with sha256"),
        ({"body": DATA[:1000], "promised": len(DATA)}, "1000 bytes with sha256|download failed"),
        ({"body": DATA + b"more"}, "more than 200000 bytes"),
        ({"body": b"gone", "status": 404}, "download failed .*404"),
    ],
    ids=["another text", "cut short", "too long", "not found"],
)
def test_a_bad_download_leaves_nothing_behind(cache: Path, serve: Serve, reply: dict[str, int], words: str) -> None:
    serve(**reply)
    with pytest.raises(DataError, match=words):
        find_text("tinyshakespeare")
    assert files(cache) == []
    assert find_text("tinyshakespeare", fallback=True).generated


@pytest.mark.parametrize("error", [http.client.IncompleteRead(b""), http.client.BadStatusLine("?")])
def test_a_server_that_speaks_no_http_is_a_failed_download(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*given: Any, **more: Any) -> Any:
        raise error

    monkeypatch.setattr("urllib.request.urlopen", fails)
    with pytest.raises(DataError, match="the download failed"):
        find_text("tinyshakespeare")


def test_a_file_appears_in_the_cache_whole_or_not_at_all(
    cache: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(handle: int) -> None:
        raise KeyboardInterrupt

    serve()
    monkeypatch.setattr(published.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        find_text("tinyshakespeare")
    assert files(cache) == []


def test_who_shares_a_cache_may_read_what_is_in_it(cache: Path, serve: Serve) -> None:
    """As any file that a process writes: by its umask."""
    serve()
    before = os.umask(0o027)
    try:
        find_text("tinyshakespeare")
    finally:
        os.umask(before)
    assert oct((cache / FILE).stat().st_mode & 0o777) == oct(0o640)


def test_a_cache_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path, cache: Path, serve: Serve) -> None:
    serve()
    cache.write_text("a file where the folder should be")
    source = find_text("tinyshakespeare")
    assert source.text == TEXT
    assert "not kept" in source.description
    assert source.origin.startswith("http://127.0.0.1")


def test_a_damaged_cache_is_downloaded_again(cache: Path, serve: Serve) -> None:
    put(cache, DATA[:500])
    serve()
    assert find_text("tinyshakespeare").text == TEXT
    assert (cache / FILE).read_bytes() == DATA


def test_a_damaged_cache_is_reported_where_there_is_no_net(cache: Path) -> None:
    file = put(cache, DATA[:500])
    with pytest.raises(DataError, match=r"in the cache is not used: 500 bytes with sha256"):
        find_text("tinyshakespeare")
    assert file.exists()


# Nothing anywhere.


def test_the_error_names_every_way_out(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHKIT_DATA", str(tmp_path / "sets"))
    with pytest.raises(DataError) as caught:
        find_text("tinyshakespeare")
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    for words in (
        f"SWITCHKIT_DATA has no file {tmp_path / 'sets' / FILE}",
        "the download failed",
        "refused",
        "data.path",
        "http://127.0.0.1:9/refused",
        str(cache / FILE),
        "data.fallback",
    ):
        assert words in message


def test_offline_asks_nobody(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve()
    monkeypatch.setenv("SWITCHKIT_OFFLINE", "1")
    with pytest.raises(DataError, match="SWITCHKIT_OFFLINE is set"):
        find_text("tinyshakespeare")
    assert not asked
    monkeypatch.setenv("SWITCHKIT_OFFLINE", "0")
    assert find_text("tinyshakespeare").text == TEXT


def test_the_fallback_is_the_generated_play_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(sources, "rank_zero_info", said.append)
    source = find_text("tinyshakespeare", fallback=True, seed=3)
    assert said == [f"Generated text: {source.description}"]
    assert source.text == generated_play(3)
    assert source.generated
    assert source.description.startswith("generated play, seed 3, in place of Tiny Shakespeare")
    assert source.origin == "generated_play(seed=3)"
    assert source.sha256 == hashlib.sha256(source.text.encode()).hexdigest()
