"""What is installed works away from the checkout: recipes travel in the wheel and are found by name."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_wheel_installed_elsewhere_runs_a_recipe_by_name(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    recipes = {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    assert {path.name for path in (installed / "switchkit" / "recipes").glob("*.yaml")} == recipes
    assert (installed / "switchkit" / "py.typed").exists()
    # -P: the folder of the run is no import path, so that what runs is what the wheel holds.
    code = "import sys, switchkit, switchkit.cli; assert 'site' in switchkit.__file__; sys.exit(switchkit.cli.main())"
    options = ["--config", "tiny_shakespeare", "--trainer.max_steps=2", "--data.batch_size=2", "--data.context=16"]
    run = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            code,
            "fit",
            *options,
            "--data.validation_prefix=64",
            "--trainer.limit_val_batches=1",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed), "SWITCHKIT_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert "Result on the first batch of the held-out text" in run.stdout
    assert len(list((tmp_path / "runs").rglob("last.ckpt"))) == 1
