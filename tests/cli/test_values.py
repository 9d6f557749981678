from __future__ import annotations

from typing import Literal

import pytest
from torch import Tensor

from switchkit.cli.errors import UserError
from switchkit.cli.values import convert


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3", int, 3),
        ("3", float, 3.0),
        ("1e-3", float, 1e-3),
        ("1e-3", float | Tensor, 1e-3),
        ("123", str, "123"),
        ("true", str, "true"),
        ("true", bool, True),
        ("null", str | None, None),
        ("3", int | str, 3),
        ("auto", int | str, "auto"),
        ("batch", Literal["sequence", "batch"] | int, "batch"),
        ("7", Literal["sequence", "batch"] | int, 7),
        ("[1, 3]", str | list[int], [1, 3]),
        ("every(2)", str | list[int], "every(2)"),
        ("[a, b", str, "[a, b"),
        ("", str | None, ""),  # null for YAML, and a variable of the shell that was never set would be a default
    ],
)
def test_texts_of_a_command_line_are_read_by_type(text, hint, value):
    found = convert(text, hint, "--x", typed=True)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "hint", "words"),
    [
        ("abc", int, "an integer"),
        ("true", int, "an integer"),
        ("2.5", int | None, "an integer or null"),
        ("1", bool, "true or false"),
        ("batc", Literal["sequence", "batch"], "'sequence' or 'batch', got 'batc'. Did you mean 'batch'?"),
        ("[1, x]", list[int], "a list of"),
        ("true", Literal[-1, 1], "-1 or 1, got 'true'"),  # which Python holds for equal to 1
    ],
)
def test_what_does_not_fit_says_what_would(text, hint, words):
    with pytest.raises(UserError) as caught:
        convert(text, hint, "--x", typed=True)
    assert str(caught.value).startswith(f"--x: expected {words}")


def test_values_of_a_file_have_their_type_already():
    assert convert(3, float, "x", typed=False) == 3.0
    with pytest.raises(UserError, match="expected an integer, got '3'"):
        convert("3", int, "x", typed=False)


def test_other_types_are_left_to_the_parser():
    assert convert("00:01:00", dict[str, int], "x", typed=True) == "00:01:00"
