"""Which checkpoints have losses that compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from switchkit import ByteTokenizer, CharTokenizer, SpanData
from switchkit.distill.shared_text import Opened, check_alike, data_of
from switchkit.spec import describe_object

TEXT = {"class_path": "switchkit.data.text.TextData", "init_args": {}}
STREAM = {"class_path": "switchkit.data.stream_data.StreamData", "init_args": {}}
LETTERS = CharTokenizer("ab")


def opened(name: str, source: Any, data: Any = TEXT, tokenizer: Any = LETTERS) -> Opened:
    return Opened(Path(name), tokenizer, data, source, {})


@pytest.mark.parametrize(
    ("first", "other", "told"),
    [
        ({"sha256": "a"}, {"sha256": "a", "origin": "elsewhere"}, None),
        ({"sha256": "a"}, {"sha256": "b"}, "trained on another text"),
        # Streams have no sum: they are what they are called, and where they come from.
        ({"description": "x", "origin": "here"}, {"description": "x", "origin": "here"}, None),
        ({"description": "x", "origin": "here"}, {"description": "x", "origin": "there"}, "trained on another text"),
        ({"sha256": "a"}, None, "does not say what it was trained on: name the text by --text"),
    ],
)
def test_models_of_one_text_compare(first: Any, other: Any, told: str | None) -> None:
    both = [opened("first.ckpt", first), opened("other.ckpt", other)]
    check_alike(both, same_text=False)
    if told is None:
        check_alike(both, same_text=True)
        return
    with pytest.raises(ValueError, match=told):
        check_alike(both, same_text=True)


def test_models_of_one_vocabulary_and_task_compare() -> None:
    same = {"sha256": "a"}
    with pytest.raises(ValueError, match="CharTokenizer of 3 symbols and .* losses per token compare within one"):
        check_alike([opened("a", same), opened("b", same, tokenizer=CharTokenizer("abc"))], same_text=False)
    with pytest.raises(ValueError, match="trained on .*StreamData and a on .*TextData: their tasks differ"):
        check_alike([opened("a", same), opened("b", same, data=STREAM)], same_text=True)


@pytest.mark.parametrize(
    ("own", "asked", "found"),
    [
        ({}, {}, 8),
        ({"stride": 20, "draws": 3}, {}, 3),
        ({"stride": 20, "draws": 3}, {"draws": 5}, 5),
        ({}, {"draws": 2}, 2),
    ],
)
def test_windows_with_holes_are_written_down_in_several_ways(tmp_path: Path, own: Any, asked: Any, found: int) -> None:
    """Eight, where training would draw the holes anew in each epoch; none of it is for an evaluation."""
    (tmp_path / "text").write_text("abcdefgh" * 99)
    data = SpanData(str(tmp_path / "text"), inputs_length=24, tokenizer=ByteTokenizer(), **own)
    known = opened("a.ckpt", {}, describe_object(data), ByteTokenizer())
    fitted = data_of(known, stage="fit", **asked)
    assert isinstance(fitted, SpanData)
    assert (fitted.draws, fitted.stride) == (found, own.get("stride", fitted.raw_length))
    evaluated = data_of(known)
    assert isinstance(evaluated, SpanData)
    assert (evaluated.draws, evaluated.stride) == (data.draws, data.stride)
