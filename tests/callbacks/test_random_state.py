"""Generators come back as they were."""

from __future__ import annotations

import io
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from switchkit.callbacks import RandomState
from switchkit.callbacks.random_state import capture, restore


def draws() -> list[float]:
    return [float(torch.rand(())), float(torch.randn(())), random.gauss(0, 1), float(np.random.standard_normal())]


def test_every_generator_repeats_after_a_round_trip_through_a_file() -> None:
    draws()  # A second Gaussian is cached by Python and by NumPy: it is part of the state.
    file = io.BytesIO()
    torch.save(capture(), file)
    first = draws() + draws()
    file.seek(0)
    restore(torch.load(file, weights_only=True))
    assert draws() + draws() == first
    assert draws() + draws() != first


def begun(rank: int, saved: dict[str, Any] | None = None, runs: int = 1) -> list[float]:
    """What a rank draws of torch when training starts, seeded as all of them."""
    torch.manual_seed(0)
    own = RandomState()
    for _ in range(runs):
        if saved is not None:
            own.load_state_dict(saved)
        own.on_train_start(SimpleNamespace(global_rank=rank), None)
    return torch.rand(3).tolist()


def test_a_state_is_restored_once() -> None:
    """The next run of the same callback begins where the generators are."""
    own = RandomState()
    own.load_state_dict({"ranks": [capture()]})
    drawn = []
    for _ in range(2):
        own.on_train_start(SimpleNamespace(global_rank=0), None)
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] != drawn[1]


def test_ranks_that_were_seeded_alike_draw_apart() -> None:
    first = begun(0)
    torch.manual_seed(0)
    assert first == torch.rand(3).tolist()
    assert len({str(begun(rank)) for rank in range(4)}) == 4
    assert begun(1) == begun(1) != begun(1, runs=2)


def test_ranks_go_on_with_their_own_and_more_of_them_draw_apart() -> None:
    states = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        states.append(capture())
    drawn = [begun(rank, {"ranks": states}) for rank in range(4)]
    torch.manual_seed(6)
    assert drawn[1] == torch.rand(3).tolist()
    assert len({str(row) for row in drawn}) == 4
