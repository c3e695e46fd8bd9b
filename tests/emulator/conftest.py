"""The option for more schedules, and the kernels as they stand."""

from __future__ import annotations

import re

import pytest

from mlpdown.plan import REGISTERS_KERNELS, instantiations

from .launch import Kernel

NUM_SCHEDULES = 1000
_KERNEL = pytest.StashKey[Kernel]()


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
def kernel(request: pytest.FixtureRequest) -> Kernel:
    request.config.stash[_KERNEL] = Kernel(instantiations(), REGISTERS_KERNELS)
    return request.config.stash[_KERNEL]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reports = [report for report in terminalreporter.getreports("failed") if isinstance(report, pytest.TestReport)]
    violations = (
        found[1] for report in reports if (found := re.search(r"ProtocolViolation: (.*)", report.longreprtext))
    )
    if violation := next(violations, None):
        terminalreporter.write_line(f"emulator: the first violation of {len(reports)} failures: {violation}", red=True)
    if _KERNEL in config.stash and config.stash[_KERNEL].launched:
        launched = config.stash[_KERNEL].launched
        num_shapes, num_plans = (len(set(column)) for column in zip(*launched, strict=True))
        line = f"emulator: {len(launched)} schedules without a violation, {num_shapes} shapes, {num_plans} plans"
        terminalreporter.write_line(line)
