"""The folder of a comparison: what it is of, and the results that are there already."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from switchkit.cli.errors import UserError, short
from switchkit.cli.recipes import dump_yaml
from switchkit.files import write_text

__all__ = ["Folder", "Result"]

_FORMAT = 1
_BEGUN = {".lock", "recipes"}
"""What may be there of a comparison that was ended before its first run."""


@dataclass(frozen=True)
class Result:
    """One run of one seed that came to its end, or failed."""

    run: str
    seed: int
    status: str
    """"finished" or "failed"."""
    reason: str = ""
    """Of a failure, in one line."""
    steps: int = 0
    tokens: int = 0
    """Targets trained on."""
    seconds: float = 0.0
    """Of training, without evaluation and checkpoints."""
    held_out_loss: float | None = None
    """Nats per token over the whole held-out text, with the last weights."""
    accuracy: float | None = None
    dropped: float | None = None
    """Share of the assignments of all training steps; None: no sparse layer."""
    imbalance: float | None = None
    """Largest over mean load of the worst layer, over the whole held-out text."""
    dead_experts: float | None = None
    parameters: int = 0
    active_parameters: int = 0
    flops_per_token: int = 0
    """Forward, in closed form (`switchkit.report.count`)."""
    train_flops: float = 0.0
    """Forward and backward over all tokens."""
    data: str = ""
    device: str = ""
    points: list[dict[str, float]] = field(default_factory=list)
    """The curve: step, tokens, seconds, train_loss (mean over the targets since the last point), held_out_loss."""

    @property
    def finished(self) -> bool:
        return self.status == "finished"


class Folder:
    """Reads and writes ``comparison.json``, ``recipes/`` and the results below ``runs/``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def found(self) -> dict[str, Any] | None:
        """What the folder says it is of; None: there is no such folder yet.

        Raises:
            UserError: it holds something else.
        """
        file = self.path / "comparison.json"
        if not file.is_file():
            if self.path.exists() and (not self.path.is_dir() or {p.name for p in self.path.iterdir()} - _BEGUN):
                raise UserError(f"--out {self.path}: this is there already and is no comparison's folder; name another")
            return None
        try:
            content = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{file}: cannot be read ({error}); delete {self.path} or name another --out") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise UserError(f"{file}: not of this version of switchkit; name another --out")
        return content

    def begin(self, content: Mapping[str, Any]) -> None:
        """Write what the comparison is, its recipes first, each with its steps under the budget."""
        (self.path / "recipes").mkdir(parents=True, exist_ok=True)
        for name, tree in content["recipes"].items():
            trainer = {**tree["trainer"], "max_steps": content["steps"][name]}
            write_text(self.recipe(name), dump_yaml({**tree, "trainer": trainer}))
        write_text(self.path / "comparison.json", json.dumps({"format": _FORMAT, **content}, indent=1))

    def same(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """Refuse to go on with another comparison.

        Raises:
            UserError: names the first difference.
        """
        # As JSON reads it: there are no tuples.
        different = next(_different(found, json.loads(json.dumps(dict(wanted)))), None)
        if different is not None:
            key, there, here = different
            raise UserError(
                f"--out {self.path} belongs to another comparison: {key} is {short(there)} there and {short(here)} "
                "here. Name another --out, or delete the folder"
            )

    def recipe(self, name: str) -> Path:
        return self.path / "recipes" / f"{name}.yaml"

    def run(self, name: str, seed: int) -> Path:
        return self.path / "runs" / name / f"seed{seed}"

    def result(self, name: str, seed: int) -> Result | None:
        """Of a run that ended; None: it did not yet."""
        file = self.run(name, seed) / "result.json"
        if not file.is_file():
            return None
        known = {one.name for one in fields(Result)}
        return Result(**{key: value for key, value in json.loads(file.read_text("utf-8")).items() if key in known})

    def keep(self, result: Result) -> None:
        folder = self.run(result.run, result.seed)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "result.json", json.dumps(asdict(result), indent=1))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time.

        Raises:
            UserError: another one is at it.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"--out {self.path}: another process is training this comparison now") from None
            yield


def _different(there: Any, here: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(there, dict) and isinstance(here, dict):
        for name in [*here, *(name for name in there if name not in here)]:
            yield from _different(there.get(name), here.get(name), f"{key}.{name}" if key else str(name))
    elif there != here:
        yield key, there, here
