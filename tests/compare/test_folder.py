"""What a comparison's folder says it is of, and what it refuses to go on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from switchkit.cli.errors import UserError
from switchkit.compare.folder import Folder


def begun(path: Path, **changes: Any) -> Folder:
    folder = Folder(path)
    folder.begin({"recipes": {"a": {"trainer": {"max_steps": 9}}}, "steps": {"a": 4}, "seeds": 2})
    file = path / "comparison.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def test_a_folder_is_found_again(tmp_path: Path) -> None:
    assert Folder(tmp_path / "new").found() is None
    folder = begun(tmp_path / "a")
    assert folder.found() == {
        "format": 1,
        "recipes": {"a": {"trainer": {"max_steps": 9}}},
        "steps": {"a": 4},
        "seeds": 2,
    }
    assert "max_steps: 4" in folder.recipe("a").read_text()


@pytest.mark.parametrize("version", [2, None, "1"])
def test_a_folder_of_another_version_is_refused(tmp_path: Path, version: Any) -> None:
    with pytest.raises(UserError, match="not of this version of switchkit"):
        begun(tmp_path, format=version).found()


@pytest.mark.parametrize(
    ("there", "here", "told"),
    [
        ({"seeds": 2}, {"seeds": 3}, "seeds is 2 there and 3 here"),
        ({"steps": {"a": 4}}, {"steps": {"a": 5}}, "steps.a is 4 there and 5 here"),
        ({"steps": {"a": 4, "b": 6}}, {"steps": {"a": 4}}, "steps.b is 6 there and None here"),
        ({}, {"twin": "a"}, "twin is None there and 'a' here"),
    ],
)
def test_another_comparison_is_refused(tmp_path: Path, there: Any, here: Any, told: str) -> None:
    """By the first difference, on either side."""
    Folder(tmp_path).same(there, dict(there))
    with pytest.raises(UserError, match=told):
        Folder(tmp_path).same(there, here)
