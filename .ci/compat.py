"""The wheel's library and the specification's bits under every torch, Python and numba that can be had here: ``make compat``. Writes
results.json and results.md.

Where only a CUDA build of torch is to be had, and NVIDIA's libraries (gigabytes) are not, stubs stand in for them: functions that all
answer "no device". Torch then imports as on a machine without a GPU, which is all that is asked of it here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NO_DEVICE = 100  # cudaErrorNoDevice, CUDA_ERROR_NO_DEVICE
# What torch and mlpdown need to run, NVIDIA's libraries apart.
LIGHT_DEPENDENCIES = (
    "filelock",
    "typing-extensions",
    "sympy",
    "networkx",
    "jinja2",
    "fsspec",
    "setuptools",
    "numpy>=2.0,<2.5",
    "numba-cuda>=0.30.4,<0.31",
    "ninja",
    "rich",
)

# Loads the wheel's library, runs the op's fake, is refused by the op, runs the specification, and replays the small goldens.
PROBE = """
import json, numba, torch, mlpdown
from mlpdown import check, native_backend
from mlpdown.jit import library
info = library.load()
native_backend.load()
plan = [False if str(value.type) == "bool" else 1 for value in torch.ops.mlpdown.run.default._schema.arguments[5:]]
def tensors(device):
    shapes = ((1, 32), (1, 32), (1, 64), (32, 64), (32,))
    return [torch.ones(shape, dtype=torch.float16, device=device) for shape in shapes]
shape = tuple(torch.ops.mlpdown.run(*tensors("meta"), *plan).shape)
try:
    torch.ops.mlpdown.run(*tensors("cpu"), *plan)
    refused = None
except RuntimeError as error:
    refused = str(error).splitlines()[0]
out = mlpdown.run(*tensors("cpu"), backend="numba")
trials, broken = check.recorded_trials(largest=1 << 21)
replayed = 0
for trial in trials:
    broken += check.run_trial(trial, ["numba"])[1]
    replayed += 1
said = {"torch": torch.__version__, "numba": numba.__version__, "origin": info.origin, "meta_shape": shape, "refused": refused}
print(json.dumps({**said, "out": out.tolist(), "replayed": replayed, "broken": broken}))
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """A torch and a numba under a Python."""

    torch: str
    python: str
    numba: str = "0.68.1"


# Every supported torch and every supported Python, each at least once; what vLLM 0.33 and SGLang 0.5.23 pin.
CASES = (
    Case("2.13.0", "3.11"),
    Case("2.10.0", "3.10"),
    Case("2.11.0", "3.12"),
    Case("2.12.0", "3.11"),
    Case("2.15.0", "3.13"),
    Case("2.14.0", "3.12", "0.65.0"),
    Case("2.14.1", "3.11", "0.65.1"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "build" / "compat")
    parser.add_argument("--wheel", type=Path, help="the wheel to try (default: build one)")
    parser.add_argument("--case", action="append", metavar="TORCH:PYTHON[:NUMBA]", help="e.g. 2.10.0:3.10 (default: all)")
    arguments = parser.parse_args()
    cases = [Case(*text.split(":")) for text in arguments.case] if arguments.case else CASES
    output_folder = arguments.output_dir.resolve()
    output_folder.mkdir(parents=True, exist_ok=True)
    wheel = arguments.wheel.resolve() if arguments.wheel else _build_wheel(output_folder)
    results = []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="mlpdown-compat-") as folder:
            result = try_case(case, wheel, Path(folder))
        print(f"torch {case.torch}, Python {case.python}, numba {case.numba}: {result['outcome']}", flush=True)
        results.append({**dataclasses.asdict(case), **result})
    (output_folder / "results.json").write_text(json.dumps({"wheel": wheel.name, "results": results}, indent=1) + "\n")
    (output_folder / "results.md").write_text(_table(wheel, results))
    return 1 if any(result["outcome"].startswith("failed") for result in results) else 0


def try_case(case: Case, wheel: Path, folder: Path) -> dict[str, str]:
    """``works``, ``failed: ...``, or ``not to be had here: ...``; and on which build of torch."""
    interpreter = _interpreter(case.python)
    if interpreter is None:
        return {"outcome": f"not to be had here: no Python {case.python}", "build": ""}
    subprocess.run([interpreter, "-m", "venv", folder / "environment"], check=True)
    python = folder / "environment" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    # One at a time, so that nothing draws in another torch, or NVIDIA's libraries.
    for what in (["--no-deps", f"torch=={case.torch}"], [*LIGHT_DEPENDENCIES, f"numba=={case.numba}"], ["--no-deps", str(wheel)]):
        process = subprocess.run([*pip, *what], capture_output=True, text=True, check=False)
        if process.returncode != 0:
            errors = [line for line in process.stderr.splitlines() if line.startswith("ERROR")]
            return {"outcome": f"not to be had here: {(errors or ['pip failed'])[-1]}", "build": ""}
    environment = {**os.environ, "PATH": str(folder), "HOME": str(folder)}  # no compiler
    (torch_folder,) = (folder / "environment").glob("lib/python*/site-packages/torch")
    stubs = make_stubs(torch_folder, folder / "stubs")
    if stubs:
        environment["LD_LIBRARY_PATH"] = str(folder / "stubs")
    probe = subprocess.run(
        [python, "-c", PROBE], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    build = f"CUDA build, {len(stubs)} of NVIDIA's libraries replaced by stubs" if stubs else "CPU build"
    if probe.returncode != 0:
        return {
            "outcome": f"failed: {(probe.stderr.strip().splitlines() or [f'status {probe.returncode}'])[-1]}",
            "build": build,
        }
    said = json.loads(probe.stdout.splitlines()[-1])
    right = (
        said["origin"] == "prebuilt"
        and said["meta_shape"] == [1, 32]
        and "weight must be on a CUDA device" in (said["refused"] or "")
        and said["out"] == [[67.0] * 32]
        and said["numba"] == case.numba
        and said["replayed"] > 0
        and not said["broken"]
    )
    return {"outcome": "works" if right else f"failed: {said}", "build": f"{said['torch']}, {build}"}


def make_stubs(torch_folder: Path, folder: Path) -> list[str]:
    """Stubs of the libraries that torch's own libraries need and this machine has not; their names."""
    own = sorted(torch_folder.glob("lib/*.so*")) + sorted(torch_folder.glob("_C*.so"))
    available = {path.name for path in own}
    missing = sorted({name for path in own for name in _needed(path) if name not in available and not _on_system(name)})
    if not missing:
        return []
    defined = {symbol for path in own for symbol, _ in _symbols(path, "--defined-only")}
    by_library: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in missing}
    for path in own:
        for symbol, version in _symbols(path, "--undefined-only"):
            if symbol in defined or version.startswith(("GLIBC", "GCC_", "CXXABI", "GOMP_", "LIBC")):
                continue
            # Symbols without a version are looked up in every library: any may have them.
            by_library[version if version in by_library else missing[0]][version].add(symbol)
    folder.mkdir()
    for name, versions in by_library.items():
        _compile_stub(folder, name, versions)
    return missing


def _compile_stub(folder: Path, name: str, versions: dict[str, set[str]]) -> None:
    symbols = sorted(set().union(*versions.values())) if versions else []
    # In assembly, since C++ symbols are no C names. They return NO_DEVICE.
    bodies = [f'.globl "{symbol}"\n.type "{symbol}", @function\n"{symbol}":' for symbol in symbols]
    code = (
        ".text\n" + "\n".join(bodies) + f"\nmov ${NO_DEVICE}, %eax\nret\n" + '.section .note.GNU-stack,"",@progbits\n'
    )
    source, script = folder / f"{name}.s", folder / f"{name}.map"
    source.write_text(code)
    nodes = [
        f"{version} {{ global: {' '.join(f'{chr(34)}{symbol}{chr(34)};' for symbol in sorted(named))} }};"
        for version, named in sorted(versions.items())
        if version
    ]
    options = []
    if nodes:
        script.write_text("\n".join(nodes))
        options = [f"-Wl,--version-script={script}"]
    subprocess.run(
        ["gcc", "-shared", "-nostdlib", f"-Wl,-soname,{name}", *options, "-o", str(folder / name), str(source)],
        check=True,
    )


def _needed(path: Path) -> list[str]:
    output = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=False).stdout
    return [line.split("[")[1].rstrip("]") for line in output.splitlines() if "(NEEDED)" in line]


def _symbols(path: Path, which: str) -> Iterable[tuple[str, str]]:
    command = ["nm", "-D", "--with-symbol-versions", which, str(path)]
    for line in subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines():
        symbol, _, version = line.split()[-1].partition("@")
        yield symbol, version.lstrip("@")


def _on_system(name: str) -> bool:
    listing = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    return any(line.split()[0] == name for line in listing.splitlines() if line.strip())


def _interpreter(version: str) -> str | None:
    found = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    return str(found[-1]) if found else shutil.which(f"python{version}")


def _build_wheel(output_folder: Path) -> Path:
    subprocess.run([sys.executable, ROOT / ".ci" / "wheel.py", "--output-dir", output_folder], check=True)
    return max(output_folder.glob("*.whl"), key=lambda path: path.stat().st_mtime)


def _table(wheel: Path, results: list[dict[str, str]]) -> str:
    rows = [
        f"| {result['torch']} | {result['python']} | {result['numba']} | {result['outcome']} | {result['build']} |" for result in results
    ]
    return "\n".join(
        [f"`{wheel.name}`", "", "| torch | Python | numba | outcome | build of torch |", "|---|---|---|---|---|", *rows, ""]
    )


if __name__ == "__main__":
    sys.exit(main())
