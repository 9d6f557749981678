"""A working directory of its own for each test, with a text, a recipe and a router in it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning.pytorch  # noqa: F401
import pytest

from switchkit import registry
from switchkit.cli import main

RECIPE = """\
# A small model of a small text.
seed_everything: 1
model:
  class_path: LanguageModule
  init_args:
    net:
      class_path: Decoder
      init_args: {d_model: 16, num_layers: 2, num_heads: 2, d_ff: 32, num_experts: 4, context: 16}
    moe:
      class_path: MoELayer
      init_args:
        router: {class_path: switch, init_args: {jitter: 0.3}}
        capacity: {class_path: factor, init_args: {train: 1.25}}
    losses: [balance, {class_path: router_z, init_args: {weight: 1e-3}}]
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1e-3}}
data:
  class_path: TextData
  init_args: {path: text.txt, batch_size: 4, context: 16, validation_prefix: 512}
trainer:
  max_steps: 2
  accelerator: cpu
  limit_val_batches: 2
  num_sanity_val_steps: 0
"""

MINE = """\
from switchkit.registry import register
from switchkit.routing.base import Router
from switchkit.routing.token_choice import TopK


@register("mine_top_k")
class MyTopK(TopK):
    '''Two experts, as I like it.'''

    def __init__(self, d_model: int, num_experts: int, *, k: int = 2, service: str = "random") -> None:
        super().__init__(d_model, num_experts, k=k)


class Needy(TopK):
    def __init__(self, d_model: int, num_experts: int, *, temperature: float) -> None:
        super().__init__(d_model, num_experts)


class NotARouter:
    pass


def a_router(*, d_model: int, num_experts: int) -> Router:
    return TopK(d_model, num_experts, k=3)
"""


@pytest.fixture(scope="session")
def written() -> Callable[[Path], Path]:
    """Writes the text, the recipe and the router into a folder."""

    def write(folder: Path) -> Path:
        (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 100)
        (folder / "small.yaml").write_text(RECIPE)
        (folder / "mine.py").write_text(MINE)
        return folder

    return write


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Callable[[Path], Path]) -> Iterator[Path]:
    """The working directory; modules and names that a test brings in are forgotten after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    written(tmp_path)
    table, modules = dict(registry._table), set(sys.modules)
    yield tmp_path
    for name, module in [(name, module) for name, module in sys.modules.items() if name not in modules]:
        file = getattr(module, "__file__", None)
        # One found by a relative entry of the path has a relative file.
        if file is not None and str(Path(file).absolute()).startswith(str(tmp_path)):
            del sys.modules[name]
    # Parts of the package that were first imported by this test stay registered.
    for name, cls in list(registry._table.items()):
        if name not in table and not cls.__module__.startswith("switchkit."):
            del registry._table[name]


class _Stderr:
    """Whatever stderr is when something is written."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process: exit code, stdout, stderr."""

    # Lightning's loggers keep the stderr of the test that imported it.
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler:
                monkeypatch.setattr(handler, "stream", _Stderr())

    def call(*argv: str) -> tuple[int, str, str]:
        code = main(argv)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


MADE: dict[str, bytes] = {}
"""The checkpoints that many tests begin with, trained once in this process."""


@pytest.fixture
def once(folder: Path, run: Callable[..., tuple[int, str, str]]) -> Callable[..., Path]:
    """``once(NAME, ...)``: the last checkpoint of a run of the small recipe, below NAME; options go with the name."""

    def made(name: str, *more: str) -> Path:
        path = folder / name / "version_0" / "checkpoints" / "last.ckpt"
        if name not in MADE:
            code, _, err = run("fit", "-c", "small.yaml", "--trainer.default_root_dir", name, *more)
            assert code == 0, err
            MADE[name] = path.read_bytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(MADE[name])
        return path.relative_to(folder)

    return made


@pytest.fixture
def taught(once: Callable[..., Path]) -> Path:
    """A checkpoint of the small mixture."""
    return once("taught")


@pytest.fixture
def dense(once: Callable[..., Path]) -> Path:
    """A checkpoint of the small recipe without experts."""
    return once("dense", "--model.net.sparse", "[]", "--model.losses", "[]")
