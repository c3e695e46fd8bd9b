"""The harness over the C launcher, ``harness.cu``: built on demand, run alone or under compute-sanitizer."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from gpu.harness_cases import RACECHECK_CASES, RING_CASES
from mlpdown.jit.program import compile_cuda
from mlpdown.jit.sources import package_sources
from mlpdown.jit.toolchain import find_toolchain
from mlpdown.plan import Plan, instantiation

SOURCE = "harness.cu"
RUN_LIMIT_SECONDS = 60
RACECHECK_LIMIT_SECONDS = 30  # a case: it follows every byte of shared memory, and every look at a barrier
FINDING = re.compile(r"Invalid|Barrier error|Uninitialized|Error:|Warning:|Program hit")
# racecheck's report takes a line for an access, and one more for each access that it may clash with.
RACE = re.compile(r"\w+: Race reported between (?P<access>.*)")
OTHER_ACCESS = re.compile(r"and (?P<access>(?:Read|Write) access at .*)")
ACCESS = re.compile(r"(?P<kind>Read|Write) access at (?P<signature>.+)\+0x[0-9a-f]+")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a tool said of a run."""

    num_errors: int
    """Errors, or for racecheck hazards of severity error."""
    num_warnings: int
    """racecheck's hazards of severity warning."""
    findings: tuple[str, ...]
    """Each distinct finding, a line each; racecheck's as ``Read f / Write g``, the accesses in the order of the alphabet."""
    output: str


def build_harness(built_targets: Sequence[str] | None = None) -> Path:
    """Compile the launcher with the harness. Raises BuildError if that cannot be."""
    names = [name for name in package_sources().files if name.endswith((".h", ".cuh"))] + ["launcher.cu"]
    files = {name: package_sources().files[name] for name in names}
    # The ring kernels of the cases: compiling all takes longer than running them.
    needed = {instantiation(case.plan, case.intermediate_dim) for case in (*RING_CASES, *RACECHECK_CASES)}
    listed = re.compile(r"X\((\d+), (\d+), (\d+)\)")
    header = files["instantiations.h"].decode()
    kept = listed.sub(lambda match: match[0] if tuple(map(int, match.groups())) in needed else "", header)
    members = " ".join(f"X({member.name})" for member in dataclasses.fields(Plan))
    files |= {"instantiations.h": kept.encode(), "case_members.h": f"#define FOR_EACH_PLAN_MEMBER(X) {members}\n".encode()}
    files[SOURCE] = (Path(__file__).parent / SOURCE).read_bytes()
    return compile_cuda("harness", files, ["launcher.cu", SOURCE], shared=False, built_targets=built_targets)


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
    # Pairs of accesses, not every byte that they clash over: those take minutes to print.
    options = ["--racecheck-report=analysis", "--show-backtrace=no"] if tool == "racecheck" else []
    limit = RACECHECK_LIMIT_SECONDS if tool == "racecheck" else RUN_LIMIT_SECONDS
    command = [str(sanitizer), f"--tool={tool}", *options, str(program), *arguments]
    # A session of its own: what is left of it when the time is up would go on using the GPU.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except BaseException:  # an interrupt too
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return parse_output(tool, output)


def parse_output(tool: str, output: str) -> Verdict:
    """Read compute-sanitizer's summary and findings.

    Raises:
        ValueError: there is no summary: the tool could not do its work.
    """
    lines = [line.removeprefix("=========").strip() for line in output.splitlines() if line.startswith("=========")]
    findings = tuple(dict.fromkeys([*_races(lines), *(line for line in lines if FINDING.match(line) and not RACE.match(line))]))
    for line in lines:
        summary = re.match(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)", line)
        if summary is not None:
            return Verdict(int(summary[1]), int(summary[2]), findings, output)
        summary = re.match(r"ERROR SUMMARY: (\d+) errors?", line)
        if summary is not None:
            return Verdict(int(summary[1]), 0, findings, output)
    raise ValueError(f"{tool} gave no summary: {output[-1000:]}")


def _races(lines: Sequence[str]) -> list[str]:
    """The pairs of accesses that racecheck reports, without addresses, lines and counts: equal ones are one."""
    pairs, first = [], ""
    for line in lines:
        if race := RACE.match(line):
            first = _access(race["access"])
        elif first and (other := OTHER_ACCESS.match(line)):
            pairs.append(" / ".join(sorted((first, _access(other["access"])))))
        else:
            first = ""
    return pairs


def _access(text: str) -> str:
    """``Read f`` from ``Read access at void f<Float16, (unsigned int)1>(float (&)[8])+0x1ba0 in activation.cuh:68 [8 hazards]``.

    Neither the type of the result nor arguments; a text that is not of this form as it is.
    """
    match = ACCESS.match(text)
    name = _function_name(match["signature"]) if match else ""
    return f"{match['kind']} {name}" if match and name else text


def _function_name(signature: str) -> str:
    """What stands before the parameters, which may follow template arguments with parentheses of their own; empty if that is not clear."""
    before_parameters, depth = "", 0
    for character in signature:
        if character == "(" and depth == 0:
            break
        depth -= character == ">"
        if depth == 0 and character != "<" and character != ">":
            before_parameters += character
        depth += character == "<"
    words = before_parameters.split()
    return words[-1] if words and depth == 0 else ""
