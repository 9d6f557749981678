"""What every training loader inherits: an epoch after another, draws of each batch, and a position in them."""

from __future__ import annotations

from itertools import islice
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from switchkit.data import TrainingLoader
from switchkit.data.resumable import generator_of


class Draws(TrainingLoader[float]):
    """Five batches of an epoch, each one number of the epoch's and one of its own."""

    words: ClassVar[dict[str, str]] = {"name": "name of the data", "seed": "seed"}
    name = "numbers"

    def __len__(self) -> int:
        return 5

    def settings(self) -> dict[str, int | str]:
        return {"name": self.name, "seed": self.seed}

    def plan(self, generator: torch.Generator) -> float:
        return float(torch.rand((), generator=generator))

    def batch(self, plan: float, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"plan": torch.tensor(plan), "own": torch.rand((), generator=generator)}


def drawn(loader: Draws, epochs: int = 1) -> list[tuple[float, float]]:
    return [(float(batch["plan"]), float(batch["own"])) for _ in range(epochs) for batch in loader]


def test_an_epochs_draws_are_all_ranks_and_a_batchs_draws_its_own() -> None:
    ranks = [drawn(Draws(seed=3, rank=rank, world_size=2), epochs=3) for rank in range(2)]
    assert [plan for plan, _ in ranks[0]] == [plan for plan, _ in ranks[1]]
    assert len({plan for plan, _ in ranks[0]}) == 3
    assert len({own for rank in ranks for _, own in rank}) == 30
    assert drawn(Draws(seed=4), 3) != ranks[0] == drawn(Draws(seed=3), 3)


@pytest.mark.parametrize("stop", [1, 4, 5, 7])
def test_draws_go_on_after_a_position_is_loaded(stop: int) -> None:
    """What was drawn before the stop is not drawn again to get there: a batch needs its own generator only."""
    first, second = Draws(), Draws()
    seen = []
    while len(seen) < stop:
        seen += [float(batch["own"]) for batch in islice(first, stop - len(seen))]
    second.load_state_dict(first.state_dict())
    rest = [own for _, own in drawn(second, 2)]
    assert (seen + rest)[:10] == [own for _, own in drawn(Draws(), 2)]


def test_a_repeated_epoch_repeats_its_draws() -> None:
    loader = Draws()
    loader.repeat = True
    assert drawn(loader) == drawn(loader) == drawn(Draws())


def test_settings_of_text_are_compared_and_named() -> None:
    other = Draws()
    other.name = "letters"
    with pytest.raises(ValueError, match="name of the data: numbers in the checkpoint, letters now"):
        other.load_state_dict(Draws().state_dict())


def test_generators_of_different_parts_differ_and_none_reads_the_global_state() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    parts = [(1, 2), (12,), (2, 1), (1, 2, 0), (-(2**80),), (1, "a")]
    assert len({generator_of(*part).initial_seed() for part in parts}) == len(parts)
    assert generator_of(1, 2).initial_seed() == generator_of(1, 2).initial_seed()
    assert torch.equal(torch.get_rng_state(), before)
