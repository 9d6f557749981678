"""Characters to ids and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switchkit.data import CharTokenizer, Tokenizer


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1))
def test_decode_undoes_encode(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert ids.dtype == torch.long
    assert ids.shape == (len(text),)
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text


def test_an_id_is_the_place_in_the_vocabulary() -> None:
    tokenizer = CharTokenizer("ba\n")
    assert tokenizer.vocab_size == 3
    assert tokenizer.encode("ab\n\n").tolist() == [1, 0, 2, 2]
    assert tokenizer.encode("").dtype == torch.long
    assert tokenizer.decode([]) == ""


def test_from_text_sorts() -> None:
    assert CharTokenizer.from_text("hello, you") == CharTokenizer(" ,ehlouy")


def test_an_unknown_character_is_named_with_its_place_and_the_vocabulary() -> None:
    tokenizer = CharTokenizer.from_text("the quick brown fox jumps over a lazy dog\n!")
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\) at position 3 is not in the vocabulary of 29") as caught:
        tokenizer.encode("cafés")
    assert r"'\n' ' ' '!' 'a'-'z'" in str(caught.value)
    assert "tokenizer made from text that has it" in str(caught.value)


def test_the_list_of_a_large_vocabulary_stays_readable() -> None:
    tokenizer = CharTokenizer("".join(chr(code) for code in range(0x100, 0x2000, 2)))
    with pytest.raises(ValueError, match=r"and \d+ more\.") as caught:
        tokenizer.encode("a")
    assert len(str(caught.value)) < 1000
    assert len(repr(tokenizer)) < 300


@pytest.mark.parametrize("ids", [[0, 3], [-1], torch.tensor([1, 2, 3])])
def test_an_id_outside_is_refused(ids: list[int] | torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"ids of this vocabulary are 0 to 2"):
        CharTokenizer("abc").decode(ids)


def test_a_vocabulary_has_each_character_once() -> None:
    with pytest.raises(ValueError, match=r"'b' \(U\+0062\) more than once"):
        CharTokenizer("abcb")
    with pytest.raises(ValueError, match="at least one character"):
        CharTokenizer("")


def test_equal_by_vocabulary_and_shown_by_it() -> None:
    one, same, other = CharTokenizer("ab\n"), CharTokenizer("ab\n"), CharTokenizer("ba\n")
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != "ab\n"
    assert eval(repr(one)) == one
    assert isinstance(one, Tokenizer)
    assert CharTokenizer(one.characters) == one
