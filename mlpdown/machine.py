"""What a measurement was made on: hardware, versions, clocks, commit, command."""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import mlpdown

_QUESTION_SECONDS = 10
_SMI_FIELDS = {
    "driver_version": "driver",
    "clocks.sm": "sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "clocks.max.sm": "max_sm_clock_mhz",
    "clocks.max.mem": "max_memory_clock_mhz",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
    "ecc.mode.current": "ecc",
}


def describe(commit: str | None = None) -> dict[str, Any]:
    """Plain values for a JSON file. What this machine does not have or does not say is None. ``commit``: what to say of it, if not what the
    checkout says: ``-dirty`` behind it if files differ, None outside of a checkout."""
    folder = Path(mlpdown.__file__).parent.parent
    if commit is None and (folder / ".git").exists():
        commit = _ask("git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") or None
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "mlpdown": mlpdown.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        # nvidia-smi counts all GPUs, torch only those it may see: so it is asked by the GPU's own name.
        query = [f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits", f"--id=GPU-{properties.uuid}"]
        values = [value.strip() for value in _ask("nvidia-smi", *query).split(",")]
        facts.update(
            gpu=properties.name,
            compute_capability=f"{properties.major}.{properties.minor}",
            num_sms=properties.multi_processor_count,
            l2_bytes=properties.L2_cache_size,
            memory_bytes=properties.total_memory,
            **(dict(zip(_SMI_FIELDS.values(), values, strict=True)) if len(values) == len(_SMI_FIELDS) else {}),
        )
    return facts


def current_device(device: torch.device | None) -> torch.device:
    """The device to measure on, with its index, and current from now on; by default a GPU where there is one, else the CPU."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def _ask(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=_QUESTION_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""
