"""What every test runs under: checked shapes, fixed seeds, one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import shapes

shapes.install()  # before anything imports the package

import torch  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """The same random numbers for a test wherever it stands, and no thread beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


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
