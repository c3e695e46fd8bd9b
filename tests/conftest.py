"""What every test shares: seeds, the GPU marker, the built library."""

from __future__ import annotations

import functools

import hypothesis
import pytest
import torch

# Derandomized: a run that fails must fail again, here and elsewhere.
hypothesis.settings.register_profile("mlpdown", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("mlpdown")


@functools.cache
def missing_gpu() -> str | None:
    """Why the tests marked gpu cannot run here; None if they can."""
    if not torch.cuda.is_available():
        return f"no CUDA GPU (torch {torch.__version__})"
    capability = torch.cuda.get_device_capability()
    if capability < (9, 0):
        return f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, 9.0 is needed"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") is not None and missing_gpu() is not None:
            item.add_marker(pytest.mark.skip(reason=str(missing_gpu())))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
