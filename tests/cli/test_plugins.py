from __future__ import annotations

import importlib.metadata
import shlex
import sys
from pathlib import Path

import pytest

from switchkit import registry
from switchkit.cli.errors import UserError
from switchkit.cli.plugins import distinct, importable, load_entry_points, split_plugins


@pytest.mark.parametrize(
    ("argv", "rest", "names"),
    [
        (["--a", "1"], ["--a", "1"], []),
        (["--plugins", "x", "y", "--a", "1"], ["--a", "1"], ["x", "y"]),
        (["--plugins=x,y", "b"], ["b"], ["x", "y"]),
        (["--a", "1", "--plugins", "x", "--plugins", "y"], ["--a", "1"], ["x", "y"]),
    ],
)
def test_plugins_are_taken_out_of_any_command_line(argv, rest, names):
    assert split_plugins(argv) == (rest, names)


@pytest.mark.parametrize("how", [["--plugins", "mine"], ["--plugins=mine"], ["--plugins", "mine.py"]])
def test_list_shows_a_plugin_s_parts(run, how):
    code, out, _ = run("list", "routers", *how)
    assert code == 0
    assert "mine_top_k" in out
    assert "Two experts, as I like it." in out


def test_a_file_is_imported_and_no_other_module_of_its_name(folder, run):
    Path("tok").mkdir()
    Path("tok/token.py").write_text(Path("mine.py").read_text())
    code, _, error = run("list", "routers", "--plugins", "tok/token.py")
    assert code == 2
    assert "--plugins: 'tok/token.py' would be imported as 'token', which is " in error
    assert "token.py: give your file another name" in error
    code, _, error = run("list", "routers", "--plugins", "tok/tokens.py")
    assert code == 2
    assert "--plugins: 'tok/tokens.py': there is no such file" in error


@pytest.mark.slow
@pytest.mark.parametrize("named", ["theirs", "theirs.py"])
def test_what_lies_beside_a_recipe_is_found_by_what_comes_after(folder, run, named):
    """By the saved settings and the commands that the run ends with."""
    Path("sub").mkdir()
    Path("mine.py").rename("sub/theirs.py")
    router = "model: {init_args: {moe: {init_args: {router: mine_top_k}}}}"
    Path("sub/own.yaml").write_text(f"plugins: [{named}]\n{router}\n")
    code, out, error = run("fit", "-c", "small.yaml", "-c", "sub/own.yaml")
    assert code == 0, error
    lines = [line.strip() for line in out.splitlines()]
    sys.path[:] = [entry for entry in sys.path if not entry.endswith("sub")]
    for name in ("switchkit test ", "switchkit fit "):
        sys.modules.pop("theirs", None)
        (line,) = (line for line in lines if line.startswith(name))
        code, _, error = run(*shlex.split(line)[1:])
        assert code == 0, error


def test_entry_points_are_loaded(monkeypatch, run):
    point = importlib.metadata.EntryPoint("mine", "mine", "switchkit.plugins")
    monkeypatch.setattr("switchkit.cli.plugins.entry_points", lambda group: [point])
    # syspath_prepend would put back a path that has the folder of this test.
    monkeypatch.setattr(sys, "path", [".", *sys.path])
    load_entry_points()
    assert "mine_top_k" in registry._table


def test_a_broken_entry_point_names_its_package(monkeypatch):
    point = importlib.metadata.EntryPoint("bad", "no_such_package", "switchkit.plugins")
    monkeypatch.setattr("switchkit.cli.plugins.entry_points", lambda group: [point])
    with pytest.raises(UserError, match=r"'bad' .*no_such_package.*cannot be imported"):
        load_entry_points()


@pytest.mark.slow
def test_what_fit_says_to_do_next_works_as_it_stands(folder, run):
    """With the user's own part, and on a text without the letters of a play."""
    code, out, error = run("fit", "-c", "small.yaml", "--plugins", "mine", "--model.moe.router", "mine_top_k")
    assert code == 0, error
    lines = [line.strip() for line in out.splitlines()]
    for name in ("switchkit generate ", "switchkit test "):
        (line,) = (line for line in lines if line.startswith(name))
        assert line.endswith(" --plugins mine")
        code, _, error = run(*shlex.split(line)[1:])
        assert code == 0, error


def test_a_folder_hides_nothing_that_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = [*sys.path]
    for _ in range(2):
        importable(tmp_path / "beside")
    assert sys.path == [*before, str(tmp_path / "beside")]


def test_a_file_and_its_module_are_one_plugin():
    assert distinct(["a", "some/b.py", "b", "a.py", "c"]) == ["a", "some/b.py", "c"]
