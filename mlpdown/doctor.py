"""``mlpdown doctor``: what this machine has, which backend is taken here, and why. Works on any machine, broken ones above all."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .jit import BuildError
from .plan import MINIMUM_COMPUTE_CAPABILITY

PACKAGES = ("mlpdown", "torch", "numpy", "numba", "numba-cuda", "ninja", "transformers", "safetensors")
# All that mlpdown reads, and what it looks at because everybody does.
VARIABLES = ("MLPDOWN_CACHE_DIR", "MLPDOWN_NVCC", "MLPDOWN_LOG")
CUSTOMARY_VARIABLES = ("CUDA_HOME", "CUDA_VISIBLE_DEVICES")
PYTHIA_SHAPE = (2560, 10240)
_SELF_TEST_SHAPE = (96, 512)
# What a probe of a broken machine may raise; it then says so instead of its finding.
_PROBE_ERRORS = (RuntimeError, OSError, ImportError, ValueError, AssertionError)

Findings = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for a bug report")


def main(arguments: argparse.Namespace) -> int:
    """Print the report. Exit status 1 if something is broken; a machine without a GPU or a compiler is not broken."""
    findings = examine()
    if arguments.json:
        print(json.dumps(findings, indent=1))
    else:
        _print(findings)
    return 1 if findings["problems"] else 0


def examine() -> Findings:
    """Everything, as plain values: one section a key, and ``problems``, a list of what to mend."""
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
    findings: Findings = {}
    problems: list[str] = []
    for name, probe in sections.items():
        try:
            findings[name] = probe()
        except _PROBE_ERRORS as error:
            findings[name] = {"error": f"{type(error).__name__}: {error}"}
            problems.append(f"{name}: {error}")
    findings["problems"] = problems + _problems(findings)
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
    try:
        match = re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        match = None
    return {
        "version": match[1] if match else None,
        "supports_cuda": None if supported is None else ".".join(map(str, supported)),
    }


def _gpus() -> list[Findings]:
    import torch

    if not torch.cuda.is_available():
        return []
    from .native_backend import device_properties

    gpus = []
    for index in range(torch.cuda.device_count()):
        device = device_properties(index)
        gpus.append(
            {
                "index": index,
                "name": device.name,
                "compute_capability": ".".join(map(str, device.compute_capability)),
                "num_sms": device.num_sms,
                "shared_memory_per_block": device.shared_memory_per_block,
            }
        )
    return gpus


def _compilers() -> Findings:
    from .jit import toolchain

    nvcc, host = list(toolchain.nvcc_compilers()), list(toolchain.host_compilers())
    return {"nvcc": [dataclasses.asdict(c) | {"path": str(c.path)} for c in nvcc], "host": [dataclasses.asdict(c) | {"path": str(c.path)} for c in host]}


def _cache() -> Findings:
    from .jit import cache
    from .jit.sources import package_sources

    folder = cache.cache_folder()
    findings: Findings = {"folder": str(folder), "exists": folder.is_dir(), "entries": [], "refusal": None}
    try:
        entries = cache.entries(folder)
    except BuildError as error:
        findings["refusal"] = str(error)
        return findings
    source_hash = package_sources().source_hash
    for entry in entries:
        findings["entries"].append(
            {
                "key": entry.folder.name,
                "targets": list(entry.manifest.targets),
                "compiler": entry.manifest.compiler,
                "of_these_sources": entry.manifest.source_hash == source_hash,
                "broken": cache.verify(entry),
            }
        )
    return findings


def _library() -> Findings:
    from .jit import library
    from .jit.sources import package_sources

    try:
        found, refusals = library.find()
    except BuildError as error:
        found, refusals = None, [str(error)]
    findings: Findings = {"source_hash": package_sources().source_hash, "passed_over": refusals}
    if found is None:
        return {**findings, "origin": None, "path": None}
    return {
        **findings,
        "origin": found.origin,
        "path": str(found.path),
        "bytes": found.path.stat().st_size,
        "targets": list(found.manifest.targets),
        "cuda": ".".join(map(str, found.manifest.cuda_version)),
    }


def _backends() -> Findings:
    from .backends import backends

    states = backends()
    auto = "native" if states["native"].available else "torch"
    return {"auto_takes": auto, **{name: dataclasses.asdict(state) for name, state in states.items()}}


def _environment() -> Findings:
    return {name: os.environ.get(name) for name in (*VARIABLES, *CUSTOMARY_VARIABLES)}


def _plan() -> list[Findings]:
    import torch

    from . import plan
    from .native_backend import MINIMUM_COMPUTE_CAPABILITY, device_properties

    devices = [plan.H200, plan.RTX_5090]
    if torch.cuda.is_available():
        present = device_properties(torch.cuda.current_device())
        devices = [present] if present.compute_capability >= MINIMUM_COMPUTE_CAPABILITY else []
    return [
        {
            "hidden_dim": PYTHIA_SHAPE[0],
            "intermediate_dim": PYTHIA_SHAPE[1],
            "device": device.name,
            **dataclasses.asdict(plan.choose_plan(*PYTHIA_SHAPE, device)),
        }
        for device in devices
    ]


def _self_test() -> list[Findings]:
    """The op at a small size through every backend that can run here, against the specification on the CPU and against float64."""
    import torch

    from . import ops
    from .backends import backends

    hidden_dim, intermediate_dim = _SELF_TEST_SHAPE
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, hidden_dim), (1, hidden_dim), (1, intermediate_dim), (hidden_dim, intermediate_dim), (hidden_dim,))
    tensors = [torch.randn(shape, generator=generator).half() for shape in shapes]
    expected = ops.run(*tensors, backend="numba")
    hidden_states, attn_output, mlp_intermediate, weight, bias = (tensor.double() for tensor in tensors)
    exact = hidden_states + attn_output + mlp_intermediate @ weight.T + bias
    magnitudes = hidden_states.abs() + attn_output.abs() + mlp_intermediate.abs() @ weight.abs().T + bias.abs()
    # One rounding to float16 (half an ULP, at most 2**-11 of the value or half the smallest subnormal) and intermediate_dim + 3 float32
    # additions, in any order.
    summation = magnitudes * (intermediate_dim + 3) * 2.0**-24
    bound = summation + ((exact.abs() + summation) * 2.0**-11).clamp_min(2.0**-25)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    for name, state in backends().items():
        if not state.available:
            continue
        out = ops.run(*(tensor.to(device) for tensor in tensors), backend=name).cpu()
        wrong_bits = int((out.view(torch.int16) != expected.view(torch.int16)).sum())
        promised = name != "torch"  # which rounds more than once
        outside = int(((out.double() - exact).abs() > bound).sum()) if promised else None
        results.append(
            {
                "backend": name,
                "device": device,
                "elements": hidden_dim,
                "promises_bits": promised,
                "wrong_bits": wrong_bits,
                "outside_bound": outside,
            }
        )
    return results


def _problems(findings: Findings) -> list[str]:
    """What is to be mended, each with its remedy. A section that could not be examined has been counted already."""
    problems = []
    backends, gpus = findings["backends"], findings["gpus"]
    if isinstance(gpus, list) and "error" not in backends:
        able = [gpu for gpu in gpus if tuple(map(int, gpu["compute_capability"].split("."))) >= MINIMUM_COMPUTE_CAPABILITY]
        if able and not backends["native"]["available"]:
            problems.append(f"{able[0]['name']} could run the native backend, but: {backends['native']['reason']}")
        if not able and findings["driver"].get("version") and findings["versions"].get("torch_cuda") is None:
            problems.append(
                "there is an NVIDIA driver, but this torch is built without CUDA: install a CUDA build of torch"
            )
    if findings["cache"].get("refusal"):
        problems.append(findings["cache"]["refusal"])
    for entry in findings["cache"].get("entries", []):
        if entry["broken"]:
            problems.append(f"{entry['broken']}; the next build replaces it")
    for result in findings["self_test"] if isinstance(findings["self_test"], list) else []:
        where = f"backend {result['backend']} on {result['device']}"
        if result["promises_bits"] and result["wrong_bits"]:
            problems.append(f"{where}: {result['wrong_bits']} of {result['elements']} outputs have wrong bits")
        if result["outside_bound"]:
            problems.append(
                f"{where}: {result['outside_bound']} of {result['elements']} outputs are too far from the float64 result"
            )
    return problems


def _print(findings: Findings) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for section, values in findings.items():
        if section == "problems":
            continue
        console.print(f"[bold]{section.replace('_', ' ')}[/bold]")
        for line in _lines(values) or ["none"]:
            console.print(f"  {line}", markup=False)
    problems = findings["problems"]
    console.print("[bold]problems[/bold]" if problems else "[bold]no problems[/bold]")
    for problem in problems:
        console.print(f"  {problem}", markup=False)
    sys.stdout.flush()


def _lines(values: Any) -> list[str]:
    """A section as lines of ``name: value``; nested values on one line each."""
    if isinstance(values, dict):
        lines: list[str] = []
        for name, value in values.items():
            if isinstance(value, list) and value:
                lines.extend(f"{name}: {_one_line(item)}" for item in value)
            else:
                lines.append(f"{name}: {_one_line(value)}")
        return lines
    if isinstance(values, list):
        return [_one_line(value) for value in values]
    return [str(values)]


def _one_line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_one_line(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
