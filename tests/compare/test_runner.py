"""How a run of a comparison ends, with a trainer that is told what to find."""

from __future__ import annotations

import errno
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from switchkit.callbacks import Translations
from switchkit.compare import runner
from switchkit.compare.budget import Cost
from switchkit.compare.folder import Folder, Result
from switchkit.counts import Counts


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains a run whose evaluation finds a loss, or raises an error."""

    def end(found: float | Exception) -> Result:
        def validate(*_: Any, **options: Any) -> list[dict[str, float]]:
            assert [type(callback) for callback in cli.trainer.callbacks] == [EMAWeightAveraging]
            if isinstance(found, Exception):
                raise found
            return [{"val/loss": found}]

        callbacks = [Translations(), EMAWeightAveraging()]
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        cli = SimpleNamespace(
            trainer=SimpleNamespace(validate=validate, strategy=strategy, callbacks=callbacks),
            model=None,
            datamodule=None,
        )
        monkeypatch.setattr(runner, "cli_of", lambda *_: cli)
        monkeypatch.setattr(runner, "_fit", lambda *_: None)
        counts = Counts(**dict.fromkeys(Counts.__dataclass_fields__, 1))
        model = SimpleNamespace(counts=counts, cost=Cost(1, 1), sparse=False, data="")
        options = {"steps": 1, "every": 1, "seconds": None, "seeded": False, "show": lambda *_: None}
        return runner.train(Folder(tmp_path), "a", 0, model, **options)  # type: ignore[arg-type]

    return end


def test_a_run_ends_with_what_was_found(trained: Any) -> None:
    result = trained(1.5)
    assert (result.status, result.held_out_loss) == ("finished", 1.5)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_held_out_loss_that_is_no_number_is_a_failure(trained: Any, tmp_path: Path, loss: float) -> None:
    result = trained(loss)
    assert (result.status, result.held_out_loss) == ("failed", None)
    assert result.reason == f"non-finite held-out loss {loss} after the last step. Lower the learning rate"
    assert "NonFiniteError" in (tmp_path / "runs/a/seed0/error.txt").read_text()


def test_a_file_that_is_missing_is_a_failure_of_its_run(trained: Any) -> None:
    result = trained(FileNotFoundError(errno.ENOENT, "No such file", "shard-7.bin"))
    assert (result.status, result.reason) == ("failed", "FileNotFoundError: [Errno 2] No such file: 'shard-7.bin'")


def test_a_full_disk_is_none(trained: Any) -> None:
    with pytest.raises(OSError, match="No space left"):
        trained(OSError(errno.ENOSPC, "No space left on device"))
