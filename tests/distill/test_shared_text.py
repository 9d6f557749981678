"""Which checkpoints have losses that compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from switchkit import CharTokenizer
from switchkit.distill.shared_text import Opened, check_alike

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
