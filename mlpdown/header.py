"""What Python takes from the native headers, so that it is written once: constants, and the members of the plan."""

from __future__ import annotations

import functools
import importlib.resources
import re


@functools.cache
def constant(name: str, header: str = "geometry.h") -> int:
    """The value of ``constexpr unsigned int name = value;``."""
    match = re.search(rf"\bconstexpr unsigned int {name} = (\d+);", _text(header))
    if match is None:
        raise LookupError(f"native/{header} has no constant {name}")
    return int(match[1])


@functools.cache
def plan_members() -> dict[str, int]:
    """The members of a plan in the order of the C structure, each with its bits in the number that the op takes."""
    members = re.findall(r"\bmember\((\w+), (\d+)\)", _text("plan.h"))
    return {name: int(bits) for name, bits in members}


@functools.cache
def _text(header: str) -> str:
    # The package's metadata maps mlpdown.native to native/. A package in a zip has it too.
    return (importlib.resources.files("mlpdown.native") / header).read_text(encoding="utf-8")
