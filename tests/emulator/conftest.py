"""The option for more schedules, and the kernels as they stand."""

from __future__ import annotations

import pytest

from mlpdown.plan import ROWS_IN_REGISTERS, instantiations

from .launch import Kernel

NUM_SCHEDULES = 1000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulator-schedules",
        type=int,
        default=NUM_SCHEDULES,
        help=f"schedules for the emulated kernel, over all cases (default: {NUM_SCHEDULES})",
    )


@pytest.fixture(scope="session")
def num_schedules(request: pytest.FixtureRequest) -> int:
    # pytest knows this folder's options only if the folder is named on the command line.
    return request.config.getoption("emulator_schedules", default=NUM_SCHEDULES)


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    return Kernel(instantiations(), ROWS_IN_REGISTERS)
