"""Who may import whom, read from the source: a row imports rows above it only, siblings never import each other."""

from __future__ import annotations

import ast
import builtins
import dis
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import CodeType

import pytest
from shapes import PACKAGE

ROWS = [
    ["records", "registry", "checks", "shown", "kernels"],
    ["routing", "capacity", "experts", "losses", "dispatch", "stats"],
    ["parallel"],
    ["layers", "attention", "blocks"],
    ["models"],
    [
        "module",
        "data",
        "metrics",
        "callbacks",
        "spec",
        "counts",
        "twins",
        "files",
        "checkpoints",
        "optim",
        "sampling",
        "generation",
        "origin",
        "process",
        "plan",
        "step",
        "step_callback",
        "start",
        "sharding",
        "strategies",
        "ddp",
        "convert",
        "distill",
    ],
    ["cli", "interop", "report", "bench", "presets", "audit", "testing", "compare", "__main__"],
]
ROW = {name: row for row, names in enumerate(ROWS) for name in names}
PARTS, LIGHTNING = 1, 5
LAZY = {"parallel": "strategies"}
"""switchkit.parallel.ExpertParallelStrategy is fetched from a later row when asked for."""

FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
THIRD = {
    "lightning": lambda place: ROW[place] >= LIGHTNING,
    "lightning_fabric": lambda place: False,
    "pytorch_lightning": lambda place: False,
    "torchmetrics": lambda place: ROW[place] >= LIGHTNING,
    "jsonargparse": lambda place: ROW[place] > LIGHTNING,
    "transformers": lambda place: place == "interop",
    "safetensors": lambda place: place == "interop",
    "datasets": lambda place: place == "data",
    "matplotlib": lambda place: place == "report",
    "rich": lambda place: ROW[place] >= LIGHTNING,
    "triton": lambda place: place == "kernels",
    "torch": lambda place: place != "registry",
}


def place_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> list[str]:
    """Every module that a file imports, anywhere in it and at any time, with its full name."""
    return imports_of(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE.parent).with_suffix("").parts)


def imports_of(text: str, here: tuple[str, ...]) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # `from switchkit import stats` imports a module, `from switchkit import MoELayer` whatever defines it.
            found += [f"{module}.{alias.name}" for alias in node.names] if module == "switchkit" else [module]
    return found


def wrong(place: str, names: list[str]) -> list[str]:
    """Those of the imports that `place` may not make."""
    bad = []
    for name in names:
        first, _, rest = name.partition(".")
        if first != "switchkit":
            if first in THIRD and not THIRD[first](place):
                bad.append(name)
            continue
        target = rest.partition(".")[0]
        if target in ("", "__version__", place) or LAZY.get(place) == target:
            continue
        if target not in ROW:
            if ROW[place] <= 4:
                bad.append(f"{name} (a public name: import it from its own file)")
        elif ROW[target] > ROW[place] or (ROW[target] == ROW[place] and ROW[place] == PARTS):
            bad.append(name)
    return bad


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_rows_above_only(path: Path) -> None:
    place = place_of(path)
    assert place in ROW, f"{place} is in no row: give it one"
    bad = wrong(place, imports(path))
    assert not bad, f"{path.relative_to(PACKAGE)} (row {ROW[place]}) may not import {', '.join(bad)}"


def unknown(code: CodeType, known: set[str]) -> list[str]:
    """Names that a piece of code and those within it look for in the module, which does not have them."""
    found = [step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"]
    inner = [name for part in code.co_consts if isinstance(part, CodeType) for name in unknown(part, known)]
    return [name for name in found if name not in known] + inner


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_name_is_known(path: Path) -> None:
    """The linters leave this out, as shape strings look like names."""
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    if "triton" in path.read_text(encoding="utf-8") and find_spec("triton") is None:
        pytest.skip("no Triton")
    known = {*vars(import_module(name)), *vars(builtins)}
    assert unknown(compile(path.read_text(encoding="utf-8"), path, "exec"), known) == []


def test_an_unknown_name_is_found() -> None:
    code = compile("def one():\n    return [nothing(x) for x in known]", "here", "exec")
    assert unknown(code, {"known"}) == ["nothing"]


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("routing", "from switchkit.layers import MoELayer"),
        ("losses", "from switchkit.routing.base import Router"),
        ("stats", "import switchkit.losses"),
        ("layers", "import lightning as L"),
        ("models", "def later():\n    from lightning.pytorch import Trainer"),
        ("layers", "from switchkit import LanguageModule"),
        ("callbacks", "from switchkit import report"),
        ("cli", "import transformers"),
        ("layers", "from .module import LanguageModule"),
        ("registry", "import torch"),
    ],
)
def test_a_wrong_import_is_found(place: str, line: str) -> None:
    assert wrong(place, imports_of(line, ("switchkit", place)))


def ring(*more: tuple[str, str]) -> list[str]:
    """Programs, those of the last row, that import one another in a ring; `more`: imports beside those of the files."""
    graph: dict[str, set[str]] = {name: set() for name in ROWS[-1]}
    found = [(place_of(path), name.removeprefix("switchkit.")) for path in FILES for name in imports(path)]
    for place, name in [*found, *more]:
        target = name.partition(".")[0]
        if place in graph and target in graph and target != place:
            graph[place].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_programs_form_no_ring() -> None:
    """They may import one another, one way: who is read first depends on no one who is read later."""
    assert ring() == []


@pytest.mark.parametrize("target", ["compare.command", "bench.options", "presets"])
def test_a_ring_is_found(target: str) -> None:
    """The command line knows by name alone what builds on it."""
    assert set(ring(("cli", target))) == {"cli", target.partition(".")[0]}


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOADED = "import sys; print([name for name in {names} if name in sys.modules])"


def test_layers_work_without_lightning() -> None:
    names = ["lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics", "jsonargparse", "transformers"]
    code = "import torch, switchkit.layers as l; l.MoELayer(8, 2, d_ff=4)(torch.zeros(1, 3, 8))\n"
    code += "from switchkit import TopK, Factor, Sorted, Decoder\n" + LOADED.format(names=names)
    assert python(code) == "[]"


def test_the_package_imports_nothing_heavy() -> None:
    code = "import switchkit, switchkit.registry; switchkit.__version__; dir(switchkit)\n"
    assert python(code + LOADED.format(names=["torch", "numpy", "lightning", "jsonargparse"])) == "[]"


def test_every_public_name_is_where_it_should_be() -> None:
    import switchkit

    for name in switchkit.__all__:
        assert getattr(switchkit, name) is not None
    assert set(switchkit.__all__) <= set(dir(switchkit))
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchPart'"):
        _ = switchkit.NoSuchPart
    with pytest.raises(AttributeError, match="has no attribute 'no_such_thing'"):
        _ = switchkit.no_such_thing


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_others_import_is_declared(path: Path) -> None:
    """Every name that a module takes from another of the package is in that one's ``__all__``."""
    hidden = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("switchkit."):
            home = import_module(str(node.module))
            parts = [name.name for name in node.names if find_spec_of(f"{node.module}.{name.name}") is None]
            hidden += [f"{node.module}.{name}" for name in parts if name not in home.__all__]
    assert hidden == []


def find_spec_of(module: str) -> object:
    """None for what is no module."""
    try:
        return find_spec(module)
    except ModuleNotFoundError:  # its parent is a module and no package
        return None
