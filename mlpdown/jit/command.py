"""``mlpdown build``: the native library ahead of time."""

from __future__ import annotations

import argparse
import json
import sys

from . import library, targets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mlpdown build``."""
    parser.add_argument(
        "--arch",
        action="append",
        metavar="ARCH",
        help=f"what to build for: {', '.join(targets.ALL_TARGETS)} or all; may be given again "
        "(default: the GPUs of this machine; without one, all)",
    )
    parser.add_argument("--force", action="store_true", help="build even if there is a library for these targets")
    parser.add_argument("--report", action="store_true", help="print registers, local and shared memory of every kernel")
    parser.add_argument("--json", action="store_true", help="print the library's path and manifest as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Find or build the library, and print where it is; 2 for a target that there is not."""
    try:
        requested = targets.parse_targets(arguments.arch) if arguments.arch else None
    except ValueError as error:
        print(f"mlpdown build: {error}", file=sys.stderr)
        return 2
    if requested is None:
        requested = targets.targets_for_devices(targets.present_capabilities())
    found = None if arguments.force else library.find()[0]
    if found is not None and set(requested) <= set(found.manifest.targets):
        info = found
    else:
        info = library.build(requested, force=arguments.force, for_this_machine=arguments.arch is None)
    manifest = info.manifest
    if arguments.json:
        manifest_values = json.loads(manifest.to_json())
        print(json.dumps({"path": str(info.path), "origin": info.origin, "manifest": manifest_values}, indent=1))
        return 0
    if info is found:
        print(f"The {info.origin} library has {', '.join(requested)}: nothing to build.")
    print(f"{info.path} ({info.origin}; {', '.join(manifest.targets)}; {info.path.stat().st_size / 1e6:.2f} MB)")
    if arguments.report:
        print("target registers local_bytes static_shared_bytes kernel<dtype, compile-time values of the plan>")
        for kernel in manifest.kernels:
            local_bytes = sum(kernel[name] for name in ("spill_store_bytes", "spill_load_bytes", "stack_bytes", "local_bytes"))
            print(f"{kernel['target']:6} {kernel['registers']:9} {local_bytes:11} {kernel['static_shared_bytes']:19} {kernel['kernel']}")
    return 0
