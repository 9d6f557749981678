"""What every test runs under: checked shapes, fixed seeds, one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import shapes

shapes.install()  # before anything imports the package

import torch  # noqa: E402

from switchkit.testing.cases import seeded  # noqa: E402

# Processes that tests start share what the first of them compiles, which is a second for each.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

if not torch.cuda.is_available():
    # Before anything imports Triton: its interpreter then runs kernels on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        daily = item.get_closest_marker("daily")
        if daily is None:
            continue
        name = item.callspec.id
        stays = name in daily.args if daily.args else name not in daily.kwargs["but"]
        if not stays:
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """One thread for fixtures of every scope: another number adds in another order, and bits differ."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """The same random numbers for a test wherever it stands."""
    torch.set_num_threads(1)
    seeded(0)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device there is."""
    return request.param


@pytest.fixture
def unchecked() -> Iterator[None]:
    """For tests that compile: the package without its shape checks."""
    with shapes.unchecked():
        yield
    torch.compiler.reset()
