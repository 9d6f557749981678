"""The pages made from docstrings are those in the repository, and every part says what a page needs."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shapes import PACKAGE, unchecked

from switchkit import registry
from switchkit.registry import _all
from switchkit.testing import Broken, check_capacity, check_router

DOCS = PACKAGE.parent / "docs"


def blocks(page: Path) -> list[str]:
    """The Python in a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def test_generated_pages_are_current() -> None:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    old = [name for name, text in generate.pages() if (DOCS / name).read_text("utf-8") != text]
    assert not old, f"run `python docs/generate.py`: {old} differ from the docstrings"


@pytest.mark.parametrize("cls", [c for c in _all().values() if c.__module__.startswith("switchkit.")])
def test_every_part_says_what_it_does_and_where_it_comes_from(cls: type) -> None:
    text = inspect.cleandoc(cls.__doc__)
    assert text.partition("\n\n")[0].endswith((".", ".``")), "a first sentence"
    assert "\nSource: " in text


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Modules in it can be imported; what they register, and they, are forgotten after."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_table", dict(registry._table))
    yield tmp_path
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == tmp_path:
            del sys.modules[name]


def test_the_router_of_the_tutorial_passes_its_own_checks(folder: Path) -> None:
    """The first two blocks of Python in the tutorial, as files: the router, in 30 lines, and its test."""
    router, test, *_ = blocks(DOCS / "your_own_router.md")
    assert router.count("\n") <= 30
    for name, text in (("my_top_p", router), ("tutorial_test", test)):
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    with unchecked():
        importlib.import_module("tutorial_test").test_top_p()


def test_the_tutorials_experts_that_choose_pass_the_checks(folder: Path) -> None:
    (folder / "my_expert_share.py").write_text(blocks(DOCS / "your_own_router.md")[2], encoding="utf-8")
    with unchecked():
        check_router(importlib.import_module("my_expert_share").ExpertShare)


def test_the_tutorials_capacity_policy_passes_the_checks(folder: Path) -> None:
    """All but that nothing is dropped without need, which is what it is for."""
    (folder / "my_worthwhile.py").write_text(blocks(DOCS / "your_own_router.md")[3], encoding="utf-8")
    with unchecked():
        policy = importlib.import_module("my_worthwhile").Worthwhile
        needless = ("capacity_is_filled", "first_come_first_served", "equals_the_paper")
        check_capacity(policy, skip=needless, least=0.3)
        with pytest.raises(Broken, match="assignments that came, . expected: tokens are dropped without need"):
            check_capacity(policy, least=0.3)


# Lightning's advice on runs of a few steps.
@pytest.mark.filterwarnings("ignore:.*(does not have many workers|was configured so|the number of training batches)")
def test_the_run_in_python_trains_and_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, more = blocks(DOCS / "training.md")
    for told, short in (("max_steps=300", "max_steps=4"), ("val_check_interval=150", "val_check_interval=2")):
        assert told in run
        run = run.replace(told, short)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda: str(folder))
    names: dict[str, Any] = {}
    exec(run, names)
    assert "nats per token; the fullest expert has" in capsys.readouterr().out
    assert names["trainer"].global_step == 4
    parts = {"callbacks": names["defaults"](), "plugins": [names["AtomicCheckpointIO"]()], "logger": False}
    names["trainer"] = names["L"].Trainer(max_steps=6, default_root_dir=folder, **parts)
    exec(more, names)
    assert names["trainer"].global_step == 6


def test_a_layer_of_ours_in_a_model_that_is_not() -> None:
    pytest.importorskip("transformers")
    names: dict[str, Any] = {}
    exec(blocks(DOCS / "bring_your_own_checkpoint.md")[1], names)
    (routing,) = names["routings"]
    assert routing.load.sum() == 2 * 2 * 16
    assert names["layer"].router.weight.grad.norm() > 0


def test_the_router_of_the_readme_passes_the_checks(folder: Path) -> None:
    (router,) = [block for block in blocks(PACKAGE.parent / "README.md") if "@register" in block]
    (folder / "readme_router.py").write_text(router, encoding="utf-8")
    with unchecked():
        check_router(importlib.import_module("readme_router").Threshold)
