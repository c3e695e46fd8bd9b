"""``mlpdown build``: the native library ahead of time."""

from __future__ import annotations

import argparse
import json
import sys

from rich.console import Console
from rich.table import Table

from . import library, targets
from .cache import Manifest

REPORT_COLUMNS = 160


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        action="append",
        metavar="ARCH",
        help=f"what to build for: {', '.join(targets.ALL_TARGETS)} or all; may be given again "
        "(default: the GPUs of this machine; without one, all)",
    )
    parser.add_argument("--force", action="store_true", help="build even if the cache has this library")
    parser.add_argument(
        "--report", action="store_true", help="print registers, spills and shared memory of every kernel"
    )
    parser.add_argument("--json", action="store_true", help="print the library's path and manifest as JSON")


def main(arguments: argparse.Namespace) -> int:
    try:
        requested = targets.parse_targets(arguments.arch) if arguments.arch else None
    except ValueError as error:
        print(f"mlpdown build: {error}", file=sys.stderr)
        return 2
    if requested is None:
        requested = targets.targets_for_devices(targets.present_capabilities())
    info = library.build(requested, force=arguments.force, for_this_machine=arguments.arch is None)
    if arguments.json:
        print(
            json.dumps(
                {"path": str(info.path), "origin": info.origin, "manifest": json.loads(info.manifest.to_json())},
                indent=1,
            )
        )
        return 0
    print(f"{info.path} ({info.origin}; {', '.join(info.manifest.targets)}; {info.path.stat().st_size / 1e6:.2f} MB)")
    if arguments.report:
        console = Console()
        # A file or a pipe has no width of its own; the table has one column for each target.
        wide = console if console.is_terminal else Console(width=REPORT_COLUMNS)
        wide.print(resource_table(info.manifest))
    return 0


def resource_table(manifest: Manifest) -> Table:
    """The resources of each kernel, one row a kernel, one column a target."""
    machine_targets = [target for target in manifest.targets if target.startswith("sm_")]
    rows: dict[str, dict[str, str]] = {}
    for kernel in manifest.kernels:
        in_local_memory = (
            kernel["spill_store_bytes"] + kernel["spill_load_bytes"] + kernel["stack_bytes"] + kernel["local_bytes"]
        )
        cell = f"{kernel['registers']} / {in_local_memory} / {kernel['static_shared_bytes']}"
        rows.setdefault(kernel["kernel"], {})[kernel["target"]] = cell
    table = Table(title="registers a thread / bytes of spills, stack and local memory / bytes of static shared memory")
    table.add_column("kernel<dtype, compile-time values of the plan>", no_wrap=True)
    for target in machine_targets:
        table.add_column(target, justify="right")
    for name, cells in sorted(rows.items()):
        table.add_row(name, *(cells.get(target, "") for target in machine_targets))
    return table
