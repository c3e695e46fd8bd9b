"""``mlpdown doctor``: what this machine has, which backend is taken here, and why. Works on any machine, broken ones above all."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .jit import BuildError
from .plan import MINIMUM_COMPUTE_CAPABILITY

PACKAGES = ("mlpdown", "torch", "numpy", "numba", "numba-cuda", "transformers", "safetensors")
# All that mlpdown reads, and what it looks at, or leaves out, because everybody sets it.
VARIABLES = ("MLPDOWN_CACHE_DIR", "MLPDOWN_NVCC", "MLPDOWN_LOG")
CUSTOMARY_VARIABLES = ("CUDA_HOME", "CUDA_VISIBLE_DEVICES")
PYTHIA_SHAPE = (2560, 10240)
# Goldens with at most so many weights are replayed; of larger ones only mlpdown check has the time.
SELF_TEST_WEIGHTS = 1 << 21

Findings = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mlpdown doctor``."""
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for a bug report")


def main(arguments: argparse.Namespace) -> int:
    """Print the report. Returns 1 if a promise is broken here, 2 if something else is; a machine without a GPU or a compiler is not
    broken."""
    findings = examine()
    if arguments.json:
        print(json.dumps(findings, indent=1))
    else:
        _print(findings)
    return 1 if findings["broken_promises"] else 2 if findings["problems"] else 0


def examine() -> Findings:
    """Everything, as plain values: a headline, one section a key, ``broken_promises``, and ``problems``: what to mend."""
    sections: dict[str, Callable[[], Any]] = {
        "versions": _versions,
        "driver": _driver,
        "gpus": _gpus,
        "compilers": _compilers,
        "cache": _cache,
        "library": _library,
        "backends": _backends,
        "environment": _environment,
        "plan": _plan,
        "self_test": _self_test,
    }
    findings: Findings = {"headline": ""}
    problems: list[str] = []
    for name, probe in sections.items():
        try:
            findings[name] = probe()
        except Exception as error:  # noqa: BLE001 (of a broken machine; it is a finding)
            findings[name] = {"error": f"{type(error).__name__}: {error}"}
            problems.append(f"{name}: {error}")
    findings["broken_promises"] = findings["self_test"].get("broken", [])
    findings["problems"] = problems + _problems(findings) + findings["broken_promises"]
    findings["headline"] = _headline(findings)
    return findings


def _versions() -> Findings:
    versions: Findings = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    import torch

    versions["torch"] = torch.__version__
    versions["torch_cuda"] = torch.version.cuda
    versions["package_folder"] = str(Path(__file__).parent)
    return versions


def _driver() -> Findings:
    from .jit import toolchain

    supported = toolchain.supported_cuda()
    file = Path("/proc/driver/nvidia/version")
    match = re.search(r"Kernel Module\D*([\d.]+)", file.read_text()) if file.is_file() else None
    return {"version": match and match[1], "supports_cuda": supported and ".".join(map(str, supported))}


def _gpus() -> list[Findings]:
    import torch

    from .native_backend import device_properties

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [dataclasses.asdict(device_properties(index)) for index in range(count)]
    return [{**device, "compute_capability": ".".join(map(str, device["compute_capability"]))} for device in devices]


def _compilers() -> Findings:
    from .jit import toolchain

    findings: Findings = {
        kind: [{**dataclasses.asdict(compiler), "path": str(compiler.path)} for compiler in found]
        for kind, found in (("nvcc", toolchain.nvcc_compilers()), ("host", toolchain.host_compilers()), ("ninja", toolchain.ninjas()))
    }
    try:
        tools, ninja = toolchain.find_toolchain(), toolchain.find_ninja()
    except BuildError as error:
        return {**findings, "taken": None, "refusal": str(error)}
    return {**findings, "taken": f"{tools.nvcc} with {tools.host_compiler}, run by {ninja}"}


def _cache() -> Findings:
    from .jit import cache
    from .jit.sources import package_sources

    try:
        folder = cache.cache_folder()
        entries = cache.entries(folder)
    except BuildError as error:
        return {"folder": None, "refusal": str(error), "entries": []}
    source_hash = package_sources().source_hash
    found = [
        {
            "key": entry.path.parent.name,
            "targets": list(entry.manifest.targets),
            "compiler": entry.manifest.compiler,
            "of_these_sources": entry.manifest.source_hash == source_hash,
            "broken": cache.verify(entry),
        }
        for entry in entries
    ]
    return {"folder": str(folder), "entries": found}


def _library() -> Findings:
    from .jit import library

    try:
        found, refusals = library.find()
    except BuildError as error:
        found, refusals = None, [str(error)]
    findings: Findings = {"origin": found and found.origin, "path": found and str(found.path), "passed_over": refusals}
    if found is not None:
        manifest = found.manifest
        findings |= {"targets": list(manifest.targets), "compiler": manifest.compiler, "source_hash": manifest.source_hash}
    return findings


def _backends() -> Findings:
    from .backends import backends

    states = backends()
    auto = "native" if states["native"].available else "torch"
    return {"auto_takes": auto, **{name: dataclasses.asdict(state) for name, state in states.items()}}


def _environment() -> Findings:
    from .jit.toolchain import HOST_VARIABLES, IGNORED_VARIABLES

    values = {name: os.environ.get(name) for name in (*VARIABLES, *CUSTOMARY_VARIABLES, *HOST_VARIABLES)}
    ignored = {name: f"{os.environ[name]} (not used: it could change bits)" for name in IGNORED_VARIABLES if name in os.environ}
    return values | ignored


def _plan() -> Findings:
    """The plan of this machine's GPU at Pythia-2.8B's size; without a GPU there is none."""
    import torch

    from .heuristics import choose_plan
    from .native_backend import device_properties

    device = device_properties(torch.cuda.current_device()) if torch.cuda.is_available() else None
    if device is None or device.compute_capability < MINIMUM_COMPUTE_CAPABILITY:
        return {}
    chosen = dataclasses.asdict(choose_plan(*PYTHIA_SHAPE, device))
    return {"hidden_dim": PYTHIA_SHAPE[0], "intermediate_dim": PYTHIA_SHAPE[1], **chosen}


def _self_test() -> Findings:
    """The small goldens through every backend that promises their bits and can run here: what was compared, and what is broken."""
    from . import check
    from .backends import backends

    trials, broken = check.recorded_trials(largest=SELF_TEST_WEIGHTS)
    available = [name for name, state in backends().items() if state.available and name in check.PROMISE_BITS]
    results: list[check.Result] = []
    for trial in trials:
        found, complaints = check.run_trial(trial, available)
        results += found
        broken += complaints
    return {"compared": check.comparisons(results) if results else [], "broken": broken}


def _problems(findings: Findings) -> list[str]:
    """What is to be mended, each with its remedy. A section that could not be examined has been counted already."""
    problems = []
    backends, gpus, self_test = findings["backends"], findings["gpus"], findings["self_test"]
    if isinstance(gpus, list) and "error" not in backends:
        able = [gpu for gpu in gpus if tuple(map(int, gpu["compute_capability"].split("."))) >= MINIMUM_COMPUTE_CAPABILITY]
        if able and not backends["native"]["available"]:
            problems.append(f"{able[0]['name']} could run the native backend, but: {backends['native']['reason']}")
        if not able and findings["driver"].get("version") and findings["versions"].get("torch_cuda") is None:
            problems.append("there is an NVIDIA driver, but this torch is built without CUDA: install a CUDA build of torch")
    if "error" not in backends and not backends["numba"]["available"]:
        problems.append(f"the specification cannot run here: {backends['numba']['reason']}")
    if not self_test.get("compared") and "error" not in self_test:
        problems.append("no recorded result was replayed: nothing here shows that the bits are right")
    if findings["cache"].get("refusal"):
        problems.append(findings["cache"]["refusal"])
    for entry in findings["cache"].get("entries", []):
        if entry["broken"]:
            problems.append(f"{entry['broken']}; the next build replaces it")
    return problems


def _headline(findings: Findings) -> str:
    backends, gpus = findings["backends"], findings["gpus"]
    if "error" in backends or not isinstance(gpus, list):
        return "What can run here cannot be found out: see the problems."
    if backends["native"]["available"]:
        return f"The native kernel runs here, on {gpus[0]['name']}: auto takes it."
    exact = "numba gives the exact bits, slowly" if backends["numba"]["available"] else "nothing gives the exact bits"
    return f"The native kernel does not run here: auto takes PyTorch; {exact}. {backends['native']['reason']}"


def _print(findings: Findings) -> None:
    problems = findings["problems"]
    print(findings["headline"])
    for section, values in findings.items():
        if section not in ("headline", "problems", "broken_promises") and values not in ({}, []):
            print("", section.replace("_", " "), *(f"  {line}" for line in _lines(values)), sep="\n")
    print("", "problems" if problems else "no problems", *(f"  {problem}" for problem in problems), sep="\n")


def _lines(values: Any) -> list[str]:
    """A section as lines of ``name: value``; each item of a list on a line of its own."""
    if isinstance(values, list):
        return [_one_line(value) for value in values]
    lists = {name: value if isinstance(value, list) and value else [value] for name, value in values.items()}
    return [f"{name}: {_one_line(item)}" for name, items in lists.items() for item in items]


def _one_line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_one_line(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)
