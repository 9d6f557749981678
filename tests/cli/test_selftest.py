"""`switchkit selftest`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from switchkit import registry
from switchkit.cli import main

BAD = """
import torch
from switchkit import Loss, register

@register("bad_{name}")
class Bad(Loss):
    def __init__(self):
        super().__init__(1.0)

    def __call__(self, routings):
        return torch.stack([r.probs.square().mean() for r in routings]).sum() if routings else torch.zeros(())
"""


@pytest.mark.slow
def test_names_kinds_and_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    assert main(["selftest", "losses/router_z", "balance", "--json", str(out)]) == 0
    told = capsys.readouterr().out
    assert "losses/router_z" in told
    assert "2 parts" in told
    assert "0 failed" in told
    found = json.loads(out.read_text("utf-8"))
    assert set(found["parts"]) == {"losses/balance", "losses/router_z"}
    assert set(found["versions"]) == {"switchkit", "torch", "python"}
    for result in found["parts"]["losses/balance"]:
        assert result["status"] == "held"
        assert result["seconds"] > 0
    assert main(["selftest", "capacity/dropless", "--skip", "compiles", "equals_the_loop"]) == 0


def test_json_to_the_output_stands_there_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "losses/balance", "--json", "-"]) == 0
    told = capsys.readouterr()
    assert set(json.loads(told.out)["parts"]) == {"losses/balance"}
    assert "0 failed" in told.err
    assert not Path("-").exists()


def test_a_plugin_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad_selftest_plugin.py").write_text(BAD.format(name="selftest"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_table", dict(registry._table))
    assert main(["selftest", "losses/bad_selftest", "--plugins", "bad_selftest_plugin"]) == 1
    told = capsys.readouterr().out
    assert "losses/bad_selftest" in told
    assert "loss_of_nothing_is_zero: Bad: with no real token it is 0.0" in told
    assert "0 expected: a batch of padding, or a model without sparse layers, makes the whole loss NaN" in told


def test_an_unknown_part_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "swich"]) == 2
    assert "unknown part 'swich'. Did you mean 'switch'?" in capsys.readouterr().err
    assert main(["selftest", "switch", "--skip", "nothing"]) == 2
    assert "skip names no property: nothing" in capsys.readouterr().err


def test_help_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--help"]) == 0
    assert "KIND/NAME" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_is_told_before_the_tests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights.ckpt").touch()
    for name, said in (("", "is a folder"), ("weights.ckpt", "is no .json file"), ("no/a.json", "there is no folder")):
        assert main(["selftest", "factor", "--json", str(tmp_path / name)]) == 2
        out, told = capsys.readouterr()
        assert out == ""
        assert said in told
