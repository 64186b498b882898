"""Shared fixtures: float64 by default, one thread, no plots on a screen."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    # Small problems: a second thread only adds noise and overhead.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out slow tests unless they are asked for by ``-m``, and GPU tests where there is no GPU."""
    asked = config.getoption("-m")
    for item in items:
        if item.get_closest_marker("slow") and "slow" not in (asked or ""):
            item.add_marker(pytest.mark.skip(reason="slow: run with pytest -m slow"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
