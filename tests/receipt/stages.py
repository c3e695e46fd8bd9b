"""The stages of a receipt: commands with a time limit each, so that a kernel that hangs costs seconds; and what their files say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).parent.parent.parent
LOG_NAME = "log.txt"
JUNIT_NAME = "tests.xml"
LOG_TAIL_CHARACTERS = 2000
# An interrupt first, so that pytest can end what it has started.
TIMEOUT = ("env", "--default-signal=INT", "timeout", "--signal=INT", "--kill-after=5")
TIMED_OUT = (124, 137)  # timeout's exit status after the interrupt, and after the kill
HAZARD_TESTS = "tests/gpu/test_hazard.py"
SANITIZER_TESTS = "tests/gpu/test_sanitizers.py"
# The specification on the CPU is most of the tests' time.
MAX_TEST_PROCESSES = min(12, os.cpu_count() or 1)

Findings = dict[str, Any]


class Stage(NamedTuple):
    """A Python command, in which ``{folder}`` stands for the stage's own folder."""

    limit_seconds: int
    words: tuple[str, ...]
    read: Callable[[Path], Findings]
    """That folder -> what goes into the receipt. Raises OSError, ValueError or KeyError if the command left nothing to read."""


def run_stage(stage: Stage, folder: Path) -> dict[str, Any]:
    """Run a stage in ``folder``, which must not be there yet: what lies in it is this run's, all that it printed in ``log.txt``.

    Returns:
        ``verdict`` ("passed", "failed", "timed out"), ``seconds``, ``findings``, and ``log_tail``: the end of the output, unless it passed.
    """
    folder.mkdir(parents=True)
    words = [sys.executable, *(word.format(folder=folder) for word in stage.words)]
    begin = time.monotonic()
    with (folder / LOG_NAME).open("wb") as log:
        command = [*TIMEOUT, str(stage.limit_seconds), *words]
        status = subprocess.run(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False).returncode
    verdict = "passed" if status == 0 else "timed out" if status in TIMED_OUT else "failed"
    seconds = round(time.monotonic() - begin, 1)
    try:
        findings = stage.read(folder)
    except (OSError, ValueError, KeyError, xml.etree.ElementTree.ParseError) as error:
        findings = {"unreadable": f"{type(error).__name__}: {error}"}
        verdict = "failed" if verdict == "passed" else verdict
    tail = "" if verdict == "passed" else (folder / LOG_NAME).read_text(errors="replace")[-LOG_TAIL_CHARACTERS:]
    return {"verdict": verdict, "seconds": seconds, "findings": findings, "log_tail": tail}


def read_junit(folder: Path) -> Findings:
    """Counts, failures and recorded properties of a pytest run, from its JUnit file. Raises ValueError if not one test ran."""
    files: dict[str, dict[str, int]] = {}
    failures, skips, properties = [], [], {}
    for case in xml.etree.ElementTree.parse(folder / JUNIT_NAME).getroot().iter("testcase"):
        name, outcome = case.get("name", ""), "passed"
        for element in case:
            text = f"{name}: {(element.get('message') or '').partition(chr(10))[0]}"[:300]
            if element.tag in ("failure", "error"):
                outcome = "failed"
                failures.append(text)
            elif element.tag == "skipped":
                outcome = "skipped"
                skips.append(text)
            elif element.tag == "properties":
                properties[name] = {item.get("name", ""): item.get("value", "") for item in element}
        counts = files.setdefault(case.get("classname", "").split(".Test")[0], dict.fromkeys(("passed", "failed", "skipped"), 0))
        counts[outcome] += 1
    totals = {outcome: sum(counts[outcome] for counts in files.values()) for outcome in ("passed", "failed", "skipped")}
    if not totals["passed"] and not totals["failed"]:
        raise ValueError(f"not one test ran, {totals['skipped']} were skipped: {skips[0] if skips else ''}")
    return {**totals, "files": files, "failures": failures, "skips": skips, "properties": properties}


def read_build(folder: Path) -> Findings:
    """From what ``mlpdown build --json`` printed."""
    text = (folder / LOG_NAME).read_text()
    built = json.loads(text[text.index("{\n") :])
    manifest, kernels = built["manifest"], built["manifest"]["kernels"]
    spilled = ("spill_store_bytes", "spill_load_bytes", "stack_bytes", "local_bytes")
    return {
        "origin": built["origin"],
        **{name: manifest[name] for name in ("compiler", "targets", "build_seconds", "source_hash")},
        "num_kernels": len(kernels),
        "most_registers": max(kernel["registers"] for kernel in kernels),
        "local_memory_bytes": sum(kernel[name] for kernel in kernels for name in spilled),
    }


def read_goldens(folder: Path) -> Findings:
    """Which were made."""
    names = sorted(path.name for path in folder.glob("*.json"))
    if not names:
        raise ValueError("no golden was made")
    return {"files": names, "log": (folder / LOG_NAME).read_text().splitlines()}


def summarize(name: str, findings: Findings) -> str:
    """What a stage found, in a line; and a line for each property that a test recorded."""
    if "unreadable" in findings:
        return findings["unreadable"]
    if name == "build":
        kernels = "{num_kernels} kernels, at most {most_registers} registers, {local_memory_bytes} bytes of local memory"
        return (kernels + ", {build_seconds} s ({origin})").format(**findings)
    if name == "check":
        results = [result for result in findings["check"]["results"] if result["promises_bits"]]
        return f"{sum(result['wrong_bits'] for result in results)} wrong bits in {len(results)} runs of backends that promise bits"
    if name == "accuracy":
        rows = findings["shapes"]
        wrong = sum(row["wrong_bits"] + row["wrong_bits_rtx_5090_plan"] for row in rows)
        worst, mean = (max(row[f"native_{kind}_ulps"] for row in rows) for kind in ("max", "mean"))
        held = sum(row["holds"] for row in rows)
        return (
            f"{wrong} wrong bits at {len(rows)} shapes and dtypes, under the GPU's own plan and the RTX 5090's; error at most {worst:.2f} "
            f"ULP, on average at most {mean:.2f}; no larger than PyTorch's at {held}"
        )
    if name == "goldens":
        return f"{len(findings['files'])} made"
    tests = {test: ", ".join(f"{key} {value}" for key, value in values.items()) for test, values in findings["properties"].items()}
    counts = "{passed} passed, {failed} failed, {skipped} skipped".format(**findings)
    return "\n".join([counts, *(f"{test}: {values}" for test, values in tests.items())])


def _json_stage(limit_seconds: int, key: str, *words: str) -> Stage:
    path = f"{key}.json"
    return Stage(limit_seconds, (*words, "--json", f"{{folder}}/{path}"), lambda folder: {key: json.loads((folder / path).read_text())})


def _pytest_stage(limit_seconds: int, *words: str) -> Stage:
    options = ("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={{folder}}/{JUNIT_NAME}")
    return Stage(limit_seconds, (*options, *words), read_junit)


# In the order in which they run: what the others rest on first, what is slow last.
_OTHER_TESTS = (f"--ignore={HAZARD_TESTS}", f"--ignore={SANITIZER_TESTS}", "tests")
STAGES = {
    "build": Stage(120, ("-m", "mlpdown", "build", "--json"), read_build),
    "check": _json_stage(90, "check", "-m", "mlpdown", "check"),
    "accuracy": _json_stage(90, "shapes", "-m", "tests.receipt.accuracy"),
    "goldens": Stage(60, ("-m", "tests.receipt.goldens", "--out", "{folder}"), read_goldens),
    "tests": _pytest_stage(150, "-n", str(MAX_TEST_PROCESSES), *_OTHER_TESTS),
    "hazard": _pytest_stage(90, HAZARD_TESTS),
    "sanitizers": _pytest_stage(300, SANITIZER_TESTS),
}
