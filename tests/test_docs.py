"""The pages made from docstrings are those in the repository, and every part says what a page needs."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from shapes import PACKAGE, unchecked

from switchkit import LanguageModule, MoELayer, checkpoints, registry
from switchkit.registry import all_parts
from switchkit.testing import Broken, check_capacity, check_dispatcher, check_experts, check_loss, check_router

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


@pytest.mark.parametrize("cls", [c for c in all_parts().values() if c.__module__.startswith("switchkit.")])
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


@pytest.mark.slow
def test_the_router_of_the_tutorial_passes_its_own_checks(folder: Path) -> None:
    """The first two blocks of Python in the tutorial, as files: the router, in 30 lines, and its test."""
    router, test, *_ = blocks(DOCS / "your_own_router.md")
    assert router.count("\n") <= 30
    for name, text in (("my_top_p", router), ("tutorial_test", test)):
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    with unchecked():
        importlib.import_module("tutorial_test").test_top_p()


@pytest.mark.slow
def test_the_tutorials_experts_that_choose_pass_the_checks(folder: Path) -> None:
    (folder / "my_expert_share.py").write_text(blocks(DOCS / "your_own_router.md")[2], encoding="utf-8")
    with unchecked():
        check_router(importlib.import_module("my_expert_share").ExpertShare)


@pytest.mark.slow
def test_the_tutorials_capacity_policy_passes_the_checks(folder: Path) -> None:
    """All but that nothing is dropped without need, which is what it is for."""
    (folder / "my_worthwhile.py").write_text(blocks(DOCS / "your_own_router.md")[3], encoding="utf-8")
    with unchecked():
        policy = importlib.import_module("my_worthwhile").Worthwhile
        needless = ("capacity_is_filled", "first_come_first_served", "equals_the_paper")
        check_capacity(policy, skip=needless, least=0.3)
        with pytest.raises(Broken, match="assignments that came, . expected: tokens are dropped without need"):
            check_capacity(policy, least=0.3)


PARTS = ["my_low_rank", "my_even_load", "my_gather", "my_run"]
"""The files of the page on parts of one's own."""


@pytest.fixture
def parts(folder: Path) -> None:
    for name, text in zip(PARTS, blocks(DOCS / "your_own_parts.md"), strict=True):
        assert text.startswith(f"# {name}.py")
        (folder / f"{name}.py").write_text(text, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    ("file", "name", "check"),
    list(zip(PARTS, ("LowRank", "EvenLoad", "Gather"), (check_experts, check_loss, check_dispatcher), strict=False)),
)
def test_parts_of_ones_own_pass_the_checks(file: str, name: str, check: Any) -> None:
    with unchecked():
        check(getattr(importlib.import_module(file), name))


# Lightning's advice on runs of a few steps.
@pytest.mark.usefixtures("parts")
@pytest.mark.filterwarnings("ignore:.*(does not have many workers|the number of training batches)")
def test_a_model_data_and_a_callback_of_ones_own(folder: Path) -> None:
    """They train with the page's parts, the checkpoint has the data, and the model writes."""
    experts, loss, dispatcher, made = map(importlib.import_module, PARTS)
    moe = partial(MoELayer, experts=experts.LowRank, dispatcher=dispatcher.Gather)
    data, seen = made.Steps(step=3), made.Loads()
    model = LanguageModule(partial(made.Net, num_experts=3), moe=moe, losses=[loss.EvenLoad], tokenizer=data.tokenizer)
    quiet: dict[str, Any] = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    given = {"callbacks": [seen], "accumulate_grad_batches": 2, "accelerator": "cpu", "default_root_dir": folder}
    trainer = L.Trainer(max_steps=3, **quiet, **given)
    trainer.fit(model, data)
    assert [set(largest) for largest in seen.largest] == [{"late", "early"}] * 3
    # An epoch is three batches: steps are of two, of one (of 2 sequences), and of two.
    assert all(64 / 3 <= most <= 256 for largest in seen.largest for most in largest.values())
    path = folder / "own.ckpt"
    trainer.save_checkpoint(path)
    ours = checkpoints.read(path)["switchkit"]
    assert ours["data"]["init_args"] == {"step": 3, "batch_size": 4, "context": 32}
    assert ours["source"] == {"description": "letters in steps of 3"}
    again = LanguageModule.load_from_checkpoint(path)
    assert len(list(again.generate(data.tokenizer.encode("abc"), 40))) == 40


# Lightning's advice on runs of a few steps.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(does not have many workers|was configured so|the number of training batches)")
def test_the_run_in_python_trains_and_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metric, run, more = blocks(DOCS / "training.md")
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
    names["batch"] = next(iter(names["data"].train_dataloader()))
    exec(metric, names)
    assert names["late"].compute().shape == (len(names["module"].sparse_layers), 64)


def test_a_layer_of_ours_in_a_model_that_is_not() -> None:
    pytest.importorskip("transformers")
    names: dict[str, Any] = {}
    exec(blocks(DOCS / "bring_your_own_checkpoint.md")[1], names)
    (routing,) = names["routings"]
    assert routing.load.sum() == 2 * 2 * 16
    assert names["layer"].router.weight.grad.norm() > 0


@pytest.mark.slow
def test_the_router_of_the_readme_passes_the_checks(folder: Path) -> None:
    (router,) = [block for block in blocks(PACKAGE.parent / "README.md") if "@register" in block]
    (folder / "readme_router.py").write_text(router, encoding="utf-8")
    with unchecked():
        check_router(importlib.import_module("readme_router").Threshold)
