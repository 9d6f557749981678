"""Generators come back as they were."""

from __future__ import annotations

import io
import random

import numpy as np
import torch

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
