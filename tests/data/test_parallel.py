"""Files of one's own, line by line; Multi30k; and the toy languages in its place."""

from __future__ import annotations

import gzip
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from switchkit.data import DataError
from switchkit.data.parallel import MULTI30K, PairFiles, find_parallel, read_parallel
from switchkit.data.toy_languages import toy_languages

SAID = {
    f"{name}.{code}": "".join(f"{name} {code} {number}\n" for number in range(3 + len(name)))
    for name in ("train", "val", "test_2016_flickr")
    for code in ("en", "de", "fr", "cs")
}


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, an empty cache, no folder of data sets."""
    for name in ("SWITCHKIT_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SWITCHKIT_OFFLINE", "1")
    monkeypatch.setenv("SWITCHKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data sets in which Multi30k is really SAID."""
    folder = tmp_path / "sets"
    (folder / "multi30k").mkdir(parents=True)
    for name, text in SAID.items():
        data = gzip.compress(text.encode())
        (folder / MULTI30K[name].file).write_bytes(data)
        known = replace(MULTI30K[name], sha256=hashlib.sha256(data).hexdigest(), size=len(data))
        monkeypatch.setitem(MULTI30K, name, known)
    monkeypatch.setenv("SWITCHKIT_DATA", str(folder))
    return folder


def put(folder: Path, **texts: str | bytes) -> dict[str, str]:
    paths = {}
    for name, text in texts.items():
        path = folder / f"{name}.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        paths[name] = str(path)
    return paths


# Multi30k.


def test_separators_of_unicode_are_text(tmp_path: Path) -> None:
    """Within a line and at its end; a space, a tab and the carriage return are not kept there."""
    lines = ["a\x0bb\x0c", "c\u2028d\x85", "e\u3000"]
    told = put(tmp_path, source="".join(f" {line}\t \r\n" for line in lines), target="x\ny\nz\n")
    found = read_parallel({"train": PairFiles(told["source"], {"de": told["target"]})})
    assert [*found.parts["train"]["source"], *found.parts["val"]["source"]] == lines


def test_the_published_files_are_known_by_size_and_sum() -> None:
    assert set(MULTI30K) == set(SAID)
    for name, file in MULTI30K.items():
        assert file.address == f"https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/{name}.gz"
        assert file.file == f"multi30k/{name}.gz"
        assert len(file.sha256) == 64
    assert len({file.sha256 for file in MULTI30K.values()}) == 12


def test_each_part_has_its_languages(published: Path) -> None:
    found = find_parallel(["fr", "de"])
    assert (found.source, found.languages, found.generated) == ("en", ("fr", "de"), False)
    assert found.parts["train"]["fr"] == [f"train fr {number}" for number in range(8)]
    assert found.parts["test"]["en"][0] == "test_2016_flickr en 0"
    assert {len(lines) for lines in found.parts["val"].values()} == {6}
    assert found.origin == str(published / "multi30k" / "train.en.gz")
    assert find_parallel().languages == ("de", "fr", "cs")


def test_a_language_that_is_not_asked_for_need_not_be_there(published: Path) -> None:
    (published / "multi30k" / "train.cs.gz").unlink()
    assert find_parallel(["de"]).languages == ("de",)
    with pytest.raises(DataError, match=r"Multi30k \(train.cs\) is not at hand: SWITCHKIT_DATA has no file .*cs.gz"):
        find_parallel()


def test_a_file_that_is_wrong_is_an_error_with_a_fallback_too(published: Path) -> None:
    (published / "multi30k" / "val.de.gz").write_bytes(b"other")
    with pytest.raises(DataError, match=r"val.de.gz \(SWITCHKIT_DATA\) is not Multi30k \(val.de\): 5 bytes"):
        find_parallel(fallback=True)


@pytest.mark.parametrize("languages", [[], ["it"], ["en"], ["de", "de"]])
def test_languages_are_of_those_there_are(languages: list[str]) -> None:
    with pytest.raises(DataError, match=r"data.languages .* Multi30k has de, fr, cs, each once"):
        find_parallel(languages)


def test_the_error_names_every_way_out() -> None:
    with pytest.raises(DataError) as caught:
        find_parallel()
    for words in ("SWITCHKIT_OFFLINE", "data.source and data.target", "train.en.gz", "data.fallback", "toy languages"):
        assert words in str(caught.value)


def test_the_fallback_is_the_toy_languages_and_says_so() -> None:
    found = find_parallel(["de"], fallback=True, seed=3)
    said = toy_languages(3, 8000)
    assert (found.source, found.languages, found.generated) == ("en", ("qka", "qlu"), True)
    for code, lines in said.items():
        assert [line for part in ("train", "val", "test") for line in found.parts[part][code]] == lines
    assert not set(found.parts["train"]["en"]) & {*found.parts["val"]["en"], *found.parts["test"]["en"]}
    assert found.description.startswith("toy languages, seed 3, en to qka, qlu, in place of Multi30k (SWITCHKIT_DATA")
    assert found.sha256 != find_parallel(fallback=True, seed=4).sha256


@pytest.mark.skipif("SWITCHKIT_DATA" not in os.environ, reason="needs the folder of data sets, SWITCHKIT_DATA")
def test_multi30k_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if not (Path(os.environ["SWITCHKIT_DATA"]) / "multi30k").is_dir():
        pytest.skip("the folder of data sets has no multi30k")
    found = find_parallel()
    counts = {part: {len(lines) for lines in said.values()} for part, said in found.parts.items()}
    assert counts == {"train": {29000}, "val": {1014}, "test": {1000}}
    assert found.parts["test"]["de"][0].startswith("Ein Mann mit einem orangefarbenen Hut")


# Files of one's own.


def test_lines_are_paired_and_the_last_tenth_is_held_out(tmp_path: Path) -> None:
    paths = put(tmp_path, en="".join(f"{n}\n" for n in range(20)), de="\r\n".join(f" zu {n} " for n in range(20)))
    found = read_parallel({"train": PairFiles(paths["en"], {"de": paths["de"]})})
    assert found.parts["train"]["de"] == [f"zu {number}" for number in range(18)]
    assert found.parts["val"] == {"source": ["18", "19"], "de": ["zu 18", "zu 19"]}
    assert "test" not in found.parts
    assert found.origin == paths["en"]


def test_only_line_feeds_end_lines(tmp_path: Path) -> None:
    """U+2028, form feed and the like stand inside sentences of real corpora."""
    paths = put(tmp_path, en="a\u2028b\nc\x0cd\n", de="e\nf")
    found = read_parallel({part: PairFiles(paths["en"], {"de": paths["de"]}) for part in ("train", "val")})
    assert found.parts["train"] == {"source": ["a\u2028b", "c\x0cd"], "de": ["e", "f"]}


def test_gzip_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    paths = put(tmp_path, en=gzip.compress("ä\nb\n".encode()), de="c\nd")
    found = read_parallel({part: PairFiles(paths["en"], {"de": paths["de"]}) for part in ("train", "test", "val")})
    assert found.parts["test"]["source"] == ["ä", "b"]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"en": "a\nb\nc\n", "de": "d\ne\n"}, r"en.txt' has 3 lines and .*de.txt' has 2: line 3 of .*en.txt' has no"),
        ({"en": "a\n", "de": "d\ne\n"}, r"en.txt' has 1 lines and .*de.txt' has 2: line 2 of .*de.txt' has no partner"),
        ({"en": "a\nb\n", "de": ""}, r"data.target .*de.txt' is empty"),
        ({"en": "\n\n", "de": "d\ne\n"}, r"data.source .*en.txt' is empty"),
        (
            {"en": "a\nb\n", "de": b"d\ncaf\xe9\n"},
            r"line 2 of data.target .*de.txt' is not UTF-8: byte 0xe9 at offset 5",
        ),
        ({"en": gzip.compress(b"a\nb\n" * 99)[:-9], "de": "d"}, r"en.txt' is a damaged gzip file"),
        ({"en": "a", "de": "d"}, r"en.txt' has 1 line: give 2 or more"),
    ],
    ids=["source longer", "target longer", "empty", "empty lines", "not UTF-8", "damaged", "one line"],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, texts: dict[str, str | bytes], words: str) -> None:
    paths = put(tmp_path, **texts)
    with pytest.raises(DataError, match=words):
        read_parallel({"train": PairFiles(paths["en"], {"de": paths["de"]})})


def test_a_path_that_is_wrong(tmp_path: Path) -> None:
    paths = put(tmp_path, en="a\nb")
    for target, words in ((str(tmp_path), "is a folder"), (str(tmp_path / "none"), "none' does not exist")):
        with pytest.raises(DataError, match=f"data.test_target .*{words}"):
            read_parallel(
                {"train": PairFiles(paths["en"], {"de": paths["en"]}), "test": PairFiles(paths["en"], {"de": target})}
            )


def test_every_part_has_the_same_languages(tmp_path: Path) -> None:
    path = put(tmp_path, en="a\nb")["en"]
    with pytest.raises(DataError, match=r"data.val_target has the languages de, data.target has de, fr"):
        read_parallel({"train": PairFiles(path, {"de": path, "fr": path}), "val": PairFiles(path, {"de": path})})
    with pytest.raises(DataError, match="none of them named source"):
        read_parallel({"train": PairFiles(path, {"source": path})})
