"""The stages of a receipt. Each runs in a process of its own with a time limit, so that a kernel that hangs costs seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOG_NAME = "log.txt"
JUNIT_NAME = "tests.xml"
LOG_TAIL_CHARACTERS = 2000
INTERRUPT_SECONDS = 5
HAZARD_TESTS = "tests/gpu/test_hazard.py"
SANITIZER_TESTS = "tests/gpu/test_sanitizers.py"
# The specification on the CPU is most of the tests' time.
MAX_TEST_PROCESSES = min(12, os.cpu_count() or 1)

Findings = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command, how long it may take, and what is read from what it leaves."""

    limit_seconds: float
    command: Callable[[Path], list[str]]
    """The stage's own folder -> command line."""
    findings: Callable[[Path], Findings]
    """The same folder -> what goes into the receipt. Raises OSError, ValueError or KeyError if the command left nothing to read."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a stage."""

    verdict: str
    """``passed``, ``failed`` or ``timed out``."""
    seconds: float
    findings: Findings
    log_tail: str
    """The end of the output, unless it passed."""


def run_stage(stage: Stage, folder: Path, repository: Path) -> Outcome:
    """Run a stage in ``folder``, which must not be there yet: what lies in it is this run's, all that it printed in ``log.txt``."""
    folder.mkdir(parents=True)
    log_path = folder / LOG_NAME
    begin = time.monotonic()
    with log_path.open("wb") as log:
        # A session of its own: what it has started ends with it. Before the end it is interrupted, so that it can end what it has put into
        # further sessions.
        process = subprocess.Popen(
            stage.command(folder),
            cwd=repository,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
        try:
            verdict = "passed" if process.wait(stage.limit_seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            verdict = "timed out"
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(INTERRUPT_SECONDS)
            with contextlib.suppress(ProcessLookupError):  # all of it has gone
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = round(time.monotonic() - begin, 1)
    try:
        findings = stage.findings(folder)
    except (OSError, ValueError, KeyError, xml.etree.ElementTree.ParseError) as error:
        findings = {"unreadable": f"{type(error).__name__}: {error}"}
        verdict = "failed" if verdict == "passed" else verdict
    tail = "" if verdict == "passed" else log_path.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:]
    return Outcome(verdict, seconds, findings, tail)


def _heed_interrupts() -> None:
    # A job in a shell's background ignores them, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def read_junit(path: Path) -> Findings:
    """Counts, failures and recorded properties of a pytest run, from its JUnit file.

    Raises:
        OSError, ParseError: it is not there, or not such a file.
    """
    counts: dict[str, dict[str, int]] = {}
    failures: list[str] = []
    skipped: list[str] = []
    properties: dict[str, dict[str, str]] = {}
    for case in xml.etree.ElementTree.parse(path).getroot().iter("testcase"):
        name = case.get("name", "")
        outcome = "passed"
        for element in case:
            if element.tag in ("failure", "error"):
                outcome = "failed"
                failures.append(
                    f"{name}: {(element.get('message') or '').splitlines()[0] if element.get('message') else ''}"[:300]
                )
            elif element.tag == "skipped":
                outcome = "skipped"
                skipped.append(f"{name}: {element.get('message') or ''}"[:300])
            elif element.tag == "properties":
                properties[name] = {item.get("name", ""): item.get("value", "") for item in element}
        file_counts = counts.setdefault(
            case.get("classname", "").split(".Test")[0], {"passed": 0, "failed": 0, "skipped": 0}
        )
        file_counts[outcome] += 1
    totals = {outcome: sum(c[outcome] for c in counts.values()) for outcome in ("passed", "failed", "skipped")}
    if not totals["passed"] and not totals["failed"]:
        raise ValueError(f"not one test ran, {totals['skipped']} were skipped: {skipped[0] if skipped else ''}")
    return {**totals, "files": counts, "failures": failures, "skips": skipped, "properties": properties}


def summarize(name: str, findings: Findings) -> str:
    """What a stage found, in a line."""
    if "unreadable" in findings:
        return findings["unreadable"]
    if name == "build":
        return (
            f"{findings['num_kernels']} kernels, at most {findings['most_registers']} registers, "
            f"{findings['local_memory_bytes']} bytes of local memory, {findings['build_seconds']} s ({findings['origin']})"
        )
    if name == "check":
        results = [result for result in findings["check"]["results"] if result["promises_bits"]]
        return f"{sum(result['wrong_bits'] for result in results)} wrong bits in {len(results)} runs of backends that promise bits"
    if name == "accuracy":
        rows = findings["shapes"]
        wrong = sum(row["wrong_bits"] + row["wrong_bits_rtx_5090_plan"] for row in rows)
        worst = max(row["native_max_ulps"] for row in rows)
        worst_torch = max(row["torch_max_ulps"] for row in rows)
        return (
            f"{wrong} wrong bits at {len(rows)} shapes and dtypes, under the H200's and the RTX 5090's plan; error at most "
            f"{worst:.3f} ULPs, PyTorch {worst_torch:.3f}; no worse than PyTorch at {sum(row['holds'] for row in rows)}"
        )
    if name == "goldens":
        return f"{len(findings['files'])} made"
    counted = f"{findings['passed']} passed, {findings['failed']} failed, {findings['skipped']} skipped"
    details = [
        f"{test}: {', '.join(f'{key} {value}' for key, value in values.items())}"
        for test, values in findings["properties"].items()
    ]
    return "\n".join([counted, *details])


def _python(*words: str) -> list[str]:
    return [sys.executable, *words]


def _pytest_stage(limit_seconds: float, *words: str) -> Stage:
    def command(folder: Path) -> list[str]:
        return _python(
            "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={folder / JUNIT_NAME}", *words
        )

    return Stage(limit_seconds, command, lambda folder: read_junit(folder / JUNIT_NAME))


def _json_stage(limit_seconds: float, file_name: str, *words: str, key: str) -> Stage:
    return Stage(
        limit_seconds,
        lambda folder: _python(*words, "--json", str(folder / file_name)),
        lambda folder: {key: json.loads((folder / file_name).read_text())},
    )


def _build_findings(folder: Path) -> Findings:
    text = (folder / LOG_NAME).read_text()
    built = json.loads(text[text.index("{\n") :])
    manifest = built["manifest"]
    spilled = ("spill_store_bytes", "spill_load_bytes", "stack_bytes", "local_bytes")
    return {
        "origin": built["origin"],
        "compiler": manifest["compiler"],
        "targets": manifest["targets"],
        "build_seconds": manifest["build_seconds"],
        "num_kernels": len(manifest["kernels"]),
        "most_registers": max(kernel["registers"] for kernel in manifest["kernels"]),
        "local_memory_bytes": sum(kernel[name] for kernel in manifest["kernels"] for name in spilled),
        "source_hash": manifest["source_hash"],
    }


def _golden_findings(folder: Path) -> Findings:
    names = sorted(path.name for path in folder.glob("*.json"))
    if not names:
        raise ValueError("no golden was made")
    return {"files": names, "log": (folder / LOG_NAME).read_text().splitlines()}


# In the order in which they run: what the others rest on first, what is slow last.
STAGES = {
    "build": Stage(120, lambda folder: _python("-m", "mlpdown", "build", "--json"), _build_findings),
    "check": _json_stage(90, "check.json", "-m", "mlpdown", "check", key="check"),
    "accuracy": _json_stage(90, "accuracy.json", "-m", "mlpdown.receipt_accuracy", key="shapes"),
    "goldens": Stage(
        60, lambda folder: _python("-m", "mlpdown.receipt_goldens", "--out", str(folder)), _golden_findings
    ),
    "tests": _pytest_stage(150, "-n", str(MAX_TEST_PROCESSES), f"--ignore={HAZARD_TESTS}", f"--ignore={SANITIZER_TESTS}", "tests"),
    "hazard": _pytest_stage(90, HAZARD_TESTS),
    "sanitizers": _pytest_stage(300, SANITIZER_TESTS),
}
