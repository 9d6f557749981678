"""The private names of torch and Lightning that several devices need: an upgrade that takes one away fails here."""

from __future__ import annotations

import ast
import pkgutil
from pathlib import Path

import lightning
import pytest
import torch
from shapes import PACKAGE

FILES = [*sorted((PACKAGE / "parallel").glob("*.py")), *sorted((PACKAGE / "checkpoints").glob("*.py")),
         PACKAGE / "strategies.py", PACKAGE / "start.py"]  # fmt: skip
USED = {
    "torch.distributed.checkpoint.filesystem:_StorageInfo": "parallel/shards.py: where a tensor lies, for DCP's reader",
    "torch:_foreach_norm": "parallel/norm.py: the norms of all gradients in one launch",
    "torch:_foreach_mul_": "parallel/norm.py: clips all gradients in one launch",
    "lightning.pytorch.strategies:ModelParallelStrategy._setup_distributed": "strategies.py: joins the processes",
    "lightning.pytorch.strategies.launchers:_SubprocessScriptLauncher": "strategies.py: starts the processes",
    "lightning.pytorch.strategies.launchers.launcher:_Launcher": "strategies.py: the kind of a strategy's launcher",
}
"""Each with who uses it, and what for."""
ATTRIBUTES = {
    "_exit": "parallel/failure.py: os._exit, which is documented",
    "_get_default_store": "parallel/failure.py: torch.distributed.distributed_c10d's, for the last words of a process",
    "_set_pg_timeout": "strategies.py: torch.distributed.distributed_c10d's, the timeout of each group",
    "_signal_connector": "parallel/failure.py: the Trainer's, whose SIGTERM handler would wait for ever",
    "_sigterm_notifier_fn": "parallel/failure.py: that handler",
    "_parameters": "parallel/experts.py: a twin of the experts with plain tensors; torch.nn.Module's own dictionary",
}


@pytest.mark.parametrize("name", USED)
def test_each_is_there(name: str) -> None:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        pytest.fail(f"torch {torch.__version__}, lightning {lightning.__version__}: no {name} any more. {USED[name]}")


def test_what_they_mean() -> None:
    """A tensor's entry has these three fields in this order, and a module keeps its parameters, null ones too."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    place = _StorageInfo("file", 3, 5)
    assert (place.relative_path, place.offset, place.length) == ("file", 3, 5)
    linear = torch.nn.Linear(2, 3, bias=False)
    assert list(linear._parameters) == ["weight", "bias"]
    assert linear._parameters["bias"] is None


def private(path: Path) -> set[str]:
    """Names of torch and Lightning with an underscore that a file imports or reaches for."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("torch", "lightning")):
            inner = any(part.startswith("_") for part in (node.module or "").split("."))
            found |= {f"{node.module}:{a.name}" for a in node.names if inner or a.name.startswith("_")}
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            owner = ast.unparse(node.value)
            if owner == "super()":
                found.add(f"lightning.pytorch.strategies:ModelParallelStrategy.{node.attr}")
            elif owner in ("torch", "dist"):
                found.add(f"{owner}:{node.attr}")
            elif owner != "self":
                found.add(node.attr)
    return found


def test_these_are_all() -> None:
    found = set().union(*map(private, FILES))
    assert found == set(USED) | set(ATTRIBUTES)
