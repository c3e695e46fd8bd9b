"""The harness over the C launcher, ``harness.cu``: built on demand, run alone or under compute-sanitizer."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mlpdown.bench.cuda_program import compile_cuda
from mlpdown.build.sources import package_sources
from mlpdown.build.toolchain import find_toolchain

SOURCE = "harness.cu"
# (cluster_size, rows_per_warp) of the plans in harness.cu: compiling all takes longer than running them.
INSTANTIATIONS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 4)]
NUM_RING_CASES = 9
RUN_LIMIT_SECONDS = 60
MAX_HAZARDS_LISTED = 50
FINDING = re.compile(r"Invalid|Barrier error|Uninitialized|Error:|Warning:|Race reported|Program hit")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a tool said of a run."""

    num_errors: int
    """Errors, or for racecheck hazards of severity error."""
    num_warnings: int
    """racecheck's hazards of severity warning."""
    findings: tuple[str, ...]
    """Each distinct finding, a line each."""
    output: str


def build_harness(built_targets: Sequence[str] | None = None) -> Path:
    """Compile the launcher with the harness. Raises BuildError if that cannot be."""
    names = [name for name in package_sources().files if name.endswith((".h", ".cuh"))] + ["launcher.cu"]
    files = {name: package_sources().files[name] for name in names}
    files["instantiations.h"] = _only_needed(files["instantiations.h"].decode()).encode()
    files[SOURCE] = (Path(__file__).parent / SOURCE).read_bytes()
    return compile_cuda("harness", files, ["launcher.cu", SOURCE], shared=False, built_targets=built_targets)


def _only_needed(header: str) -> str:
    def keep(match: re.Match[str]) -> str:
        return match[0] if (int(match[1]), int(match[2])) in INSTANTIATIONS else ""

    return re.sub(r"X\((\d+), (\d+)\)", keep, header)


@functools.cache
def find_sanitizer() -> Path | None:
    """compute-sanitizer of the toolkit that nvcc is from, or the one on PATH."""
    beside = find_toolchain().nvcc.resolve().parent / "compute-sanitizer"
    on_path = shutil.which("compute-sanitizer")
    if beside.is_file():
        return beside
    return Path(on_path) if on_path else None


def run_harness(program: Path, *arguments: str) -> str:
    """Run without a tool; all it prints. Raises TimeoutExpired if it hangs."""
    process = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=RUN_LIMIT_SECONDS, check=False)
    return f"{process.stdout}{process.stderr}exit status {process.returncode}\n"


def sanitize(tool: str, program: Path, *arguments: str) -> Verdict:
    """Run under a tool of compute-sanitizer. Raises TimeoutExpired if it hangs, ValueError if the tool did not come to an end."""
    sanitizer = find_sanitizer()
    assert sanitizer is not None
    options = {"racecheck": ["--racecheck-report=all"]}.get(tool, [])
    command = [str(sanitizer), f"--tool={tool}", *options, str(program), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=RUN_LIMIT_SECONDS, check=False)
    return parse_output(tool, process.stdout + process.stderr)


def parse_output(tool: str, output: str) -> Verdict:
    """Read compute-sanitizer's summary and findings.

    Raises:
        ValueError: there is no summary: the tool could not do its work.
    """
    lines = [line.removeprefix("=========").strip() for line in output.splitlines() if line.startswith("=========")]
    findings = tuple(dict.fromkeys(line for line in lines if FINDING.match(line)))
    for line in lines:
        summary = re.match(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)", line)
        if summary is not None:
            return Verdict(int(summary[1]), int(summary[2]), findings[:MAX_HAZARDS_LISTED], output)
        summary = re.match(r"ERROR SUMMARY: (\d+) errors?", line)
        if summary is not None:
            return Verdict(int(summary[1]), 0, findings[:MAX_HAZARDS_LISTED], output)
    raise ValueError(f"{tool} gave no summary: {output[-1000:]}")
