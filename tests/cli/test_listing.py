from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from switchkit.cli.listing import imported, written
from switchkit.registry import KINDS, all_parts

ROOT = Path(__file__).resolve().parents[2]


def test_every_part_with_its_paper(run):
    code, out, err = run("list")
    assert (code, err) == (0, "")
    assert [title for title in [*KINDS, "recipes"] if title not in out] == []
    assert [name for name in all_parts() if name not in out] == []
    assert "arXiv 2101.03961" in out


def test_one_kind(run):
    out = run("list", "losses")[1]
    assert "balance" in out
    assert "gated_mlp" not in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["ruters"], "unknown kind 'ruters'. Did you mean 'routers'? Kinds: routers, capacity"),
        (["--plugin", "x"], "unknown option '--plugin'. Did you mean '--plugins'?"),
    ],
)
def test_mistakes(run, argv, said):
    code, _, err = run("list", *argv)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_in_the_source_is_what_is_registered(kind):
    ours = [part for part in imported(kind) if "." not in part[1]]
    assert [(*part[:2], inspect.cleandoc(part[2])) for part in ours] == sorted(written(kind))


def test_neither_torch_nor_lightning_is_imported():
    program = (
        "import sys; from switchkit.cli import main; main(['list']); "
        "sys.exit(bool({'torch', 'lightning'} & {*sys.modules}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
