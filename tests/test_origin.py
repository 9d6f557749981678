"""What an imported model's files said, kept by a module for as long as it is true of its vocabulary."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest

from switchkit import CharTokenizer, Decoder, LanguageModule, TextData
from switchkit.data import ByteTokenizer
from switchkit.origin import carried, end_ids, tell_of_another_text
from switchkit.spec import describe_object, described_data

CONFIG = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.5}
LETTERS = CharTokenizer("abcdef")
NET = partial(Decoder, d_model=8, num_layers=1, num_heads=2, d_ff=8, num_experts=2, context=8, sparse=[0])


def settings(tokenizer: Any, **origin: Any) -> dict[str, Any]:
    known = None if tokenizer is None else describe_object(tokenizer)
    entry = {"config": CONFIG, "generation": {"eos_token_id": [2, 4]}} | origin
    return {"hugging_face": entry, "model": {"init_args": {"tokenizer": known}}}


@pytest.mark.parametrize(
    ("theirs", "ours", "kept"),
    [
        (LETTERS, CharTokenizer("abcdef"), True),
        (LETTERS, CharTokenizer("abcdefg"), False),
        (ByteTokenizer(), ByteTokenizer(first_sentinel=383), True),  # the same, said otherwise
        (LETTERS, None, True),
        (None, None, True),
        (None, LETTERS, False),
        (None, ByteTokenizer(), False),
    ],
)
def test_ids_go_with_their_vocabulary_and_the_rest_always(theirs, ours, kept: bool) -> None:
    found = carried(settings(theirs), ours)
    if kept:
        assert found == {"config": CONFIG, "generation": {"eos_token_id": [2, 4]}}
    else:
        assert found == {"config": {"model_type": "llama", "initializer_range": 0.5}, "generation": {}}


@pytest.mark.parametrize("described", [True, False])
def test_a_text_in_the_place_of_another_is_told(monkeypatch: pytest.MonkeyPatch, described: bool) -> None:
    """Found elsewhere, as where a generated one was taken then: by the data's own settings, if they are the same."""
    data, other = (TextData(name, tokenizer=LETTERS) for name in ("my.txt", "other.txt"))
    then = {"sha256": "a" * 64, "origin": "here", "description": "first"}
    monkeypatch.setattr(TextData, "source_info", lambda self: {**then, "sha256": "b" * 64, "origin": "there"})
    entry = {"source": then, "data": described_data(data if described else other)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tell_of_another_text(entry, data)
    assert [("sha256 bbbbbbbb" in str(one.message)) for one in caught] == [True] * described


def test_a_vocabulary_that_ends_a_text_with_the_same_id_is_taken_for_the_models() -> None:
    same = settings(None, config={"eos_token_id": 1}, generation={})
    assert carried(same, ByteTokenizer()) == same["hugging_face"]


@pytest.mark.parametrize(
    ("origin", "ids"),
    [
        ({"config": {"eos_token_id": 2}}, (2,)),
        ({"config": {"eos_token_id": [2, 5]}}, (2, 5)),
        ({"config": {"eos_token_id": 2}, "generation": {"eos_token_id": [3, 2]}}, (3, 2)),
        ({"config": {"eos_token_id": 2}, "generation": {"eos_token_id": None}}, (2,)),
        ({"config": {"eos_token_id": [2, 6, -1, True, "a", None, [1]]}}, (2,)),
        ({"config": {"eos_token_id": {"a": 1}}}, ()),
        ({}, ()),
    ],
)
def test_the_ends_of_a_text(origin: dict[str, Any], ids: tuple[int, ...]) -> None:
    assert end_ids(origin, 6) == ids


@pytest.mark.parametrize("entry", [None, 3, [], {"config": None}, {"config": [1]}])
def test_an_entry_of_another_kind_is_none(entry: Any) -> None:
    assert carried({"hugging_face": entry}, LETTERS) == {}


def test_a_module_ends_a_text_as_its_tokenizer_says_or_else_its_files() -> None:
    module = LanguageModule(NET, tokenizer=LETTERS)
    assert module.end_ids == ()
    module.hugging_face = {"config": {"eos_token_id": 2}}
    assert module.end_ids == (2,)
    other = LanguageModule(NET, tokenizer=ByteTokenizer())
    other.hugging_face = {"config": {"eos_token_id": 2}}
    assert other.end_ids == (ByteTokenizer().eos_id,)
    bare = LanguageModule(NET, vocab_size=3)
    bare.hugging_face = {"config": {"eos_token_id": [2, 3]}}
    assert bare.end_ids == (2,)
