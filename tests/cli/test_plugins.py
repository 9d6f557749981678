from __future__ import annotations

import importlib.metadata

import pytest

from switchkit import registry
from switchkit.cli.errors import UserError
from switchkit.cli.plugins import load_entry_points, split_plugins


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


def test_entry_points_are_loaded(monkeypatch, run):
    point = importlib.metadata.EntryPoint("mine", "mine", "switchkit.plugins")
    monkeypatch.setattr("switchkit.cli.plugins.entry_points", lambda group: [point])
    monkeypatch.syspath_prepend(".")
    load_entry_points()
    assert "mine_top_k" in registry._table


def test_a_broken_entry_point_names_its_package(monkeypatch):
    point = importlib.metadata.EntryPoint("bad", "no_such_package", "switchkit.plugins")
    monkeypatch.setattr("switchkit.cli.plugins.entry_points", lambda group: [point])
    with pytest.raises(UserError, match=r"'bad' .*no_such_package.*cannot be imported"):
        load_entry_points()
