"""Students in two processes do what one does on both their batches, and the teacher is whole and left alone in each."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from distributed import Ranks, run
from equal import MOE, SGD, Case, Loader, Observed, alone, as_rank, whole, worst

from switchkit import Balance, Decoder, DistillModule, Factor, LanguageModule, checkpoints
from switchkit.distill.teacher import Teacher, fingerprint
from switchkit.parallel import ExpertParallelStrategy

NARROW = partial(Decoder, d_model=8, num_layers=2, num_heads=2, d_ff=12, context=8, sparse=[])
SMALLER = partial(Decoder, d_model=16, num_layers=2, num_heads=2, d_ff=24, num_experts=2, context=8, sparse="every(1)")
TWO = partial(ExpertParallelStrategy, expert_parallel_size=2)


@dataclass
class Taught(Case):
    """A student of the case's own model, whose capacity would bind if it were not a teacher."""

    more: dict[str, Any] = field(default_factory=dict)
    made: list[DistillModule] = field(default_factory=list)

    def module(self) -> LanguageModule:
        teacher = Case(moe=partial(MOE, capacity=partial(Factor, train=0.5, eval=0.5))).module()
        torch.manual_seed(1)
        options = {"optimizer": SGD, "warmup_steps": 0, "schedule": "constant", "alpha": 0.6, "temperature": 1.5}
        pupil = DistillModule(teacher=teacher, **{**options, **self.more})
        draw = torch.Generator().manual_seed(5)
        for parameter in pupil.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
        self.made.append(pupil)
        return pupil


CASES = {
    "twin": Taught(micro=2),
    "matching": Taught(more={"net": NARROW, "hidden_weight": 0.7, "attention_weight": 0.4, "losses": []}),
    "mixture": Taught(more={"net": SMALLER, "moe": MOE, "losses": [partial(Balance, weight=0.5, scope="global")]}),
}


def as_students(rank: int, world: int, strategies: dict[str, Any]) -> dict[str, tuple[Observed, dict[str, Any]]]:
    found = {}
    for name, strategy in strategies.items():
        case = CASES[name.split(" ")[0]]
        observed = as_rank(rank, world, case, strategy)
        asked = case.made[-1].teacher.module
        found[name] = (
            observed,
            {
                "sha": fingerprint(asked),
                "kinds": {type(p.data).__name__ for p in asked.parameters()},
                "learns": any(p.requires_grad or p.grad is not None for p in asked.parameters()),
                "trains": any(part.training for part in asked.modules()),
            },
        )
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, tuple[Observed, dict[str, Any]]]]:
    """All cases under both strategies, in two processes."""
    return run(
        2, as_students, {f"{name} {how}": by for name in CASES for how, by in (("ddp", "ddp"), ("experts", TWO))}
    )


@pytest.mark.parametrize("how", ["ddp", "experts"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_two_ranks_equal_one_process_on_both_batches(ranks: Any, name: str, how: str) -> None:
    expected = alone(CASES[name])
    sha = fingerprint(CASES[name].made[-1].teacher.module)
    for found, asked in (rank[f"{name} {how}"] for rank in ranks):
        where, gap = worst(found, expected)
        assert gap < 2e-6, f"{where}: {gap:.1e}"
        assert "train/divergence" in found.losses[0]
        assert asked == {"sha": sha, "kinds": {"Tensor"}, "learns": False, "trains": False}


def asked_of_one(rank: int, world: int, name: str) -> Observed:
    """A teacher that each rank asks about the batch of the first."""
    ask = Teacher.__call__
    first = [shares[0] for shares in CASES[name].batches()]
    count = iter(range(100))
    Teacher.__call__ = lambda self, batch: ask(self, first[next(count)])  # type: ignore[method-assign]
    return as_rank(rank, world, CASES[name], "ddp")


@pytest.mark.slow
def test_a_planted_fault_is_seen() -> None:
    found = run(2, asked_of_one, "mixture")[0]
    assert worst(found, alone(CASES["mixture"]))[1] > 1e-2


def saved(rank: int, world: int, folder: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two steps of a student with learned projections, its checkpoint, and what another one makes of that."""
    case, path, found = CASES["matching"], Path(folder) / "student.ckpt", []
    for begin in (None, path):
        own = L.Trainer(
            accelerator="cpu", strategy=TWO(), devices=world, plugins=[Ranks(rank, world)], max_steps=2, logger=False,
            limit_val_batches=0, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        )  # fmt: skip
        pupil = case.module()
        own.fit(pupil, Loader([shares[rank] for shares in case.batches()]), Loader([]), ckpt_path=begin)
        found.append({name: whole(value) for name, value in pupil.named_parameters()})
        if begin is None:
            own.save_checkpoint(path)
    return found[0], found[1]


@pytest.mark.slow
def test_a_checkpoint_of_two_is_that_of_one(tmp_path: Path) -> None:
    """The student's weights and what was learned beside it, whole, and taken apart again."""
    for before, after in run(2, saved, str(tmp_path)):
        assert all(torch.equal(before[name], value) for name, value in after.items())
    expected = alone(CASES["matching"])
    content = checkpoints.read(tmp_path / "student.ckpt")
    learned = content["switchkit"]["projections"]
    assert len(learned) == 2
    for name, value in expected.parameters.items():
        theirs = (
            learned[name.removeprefix("matching.")] if name.startswith("matching.") else content["state_dict"][name]
        )
        assert torch.allclose(theirs, value, atol=1e-5), name
    pupil = CASES["matching"].module()
    pupil.on_load_checkpoint(content)
    assert torch.equal(next(pupil.matching.parameters()), next(iter(learned.values())))
