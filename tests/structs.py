"""The C structures of ``native/plan.h`` as ctypes, read from the header."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.resources
import re

from mlpdown.header import plan_members
from mlpdown.plan import Plan

_C_TYPES = {
    "const void*": ctypes.c_void_p,
    "void*": ctypes.c_void_p,
    "unsigned int": ctypes.c_uint,
    "int": ctypes.c_int,
}


@functools.cache
def problem_type() -> type[ctypes.Structure]:
    """``MlpDownProblem``."""
    header = (importlib.resources.files("mlpdown.native") / "plan.h").read_text()
    body = re.search(r"struct MlpDownProblem {(.*?)};", header, re.DOTALL)
    assert body is not None, "native/plan.h has no struct MlpDownProblem"
    code = re.sub(r"//[^\n]*", "", body[1])
    members = re.findall(r"([\w ]+?[ *]+)(\w+);", code)
    assert len(members) == code.count(";"), f"not all members were understood: {members}"
    fields = [(member, _C_TYPES[c_type.strip()]) for c_type, member in members]
    return type("MlpDownProblem", (ctypes.Structure,), {"_fields_": fields})


@functools.cache
def plan_type() -> type[ctypes.Structure]:
    """``MlpDownPlan``."""
    return type("MlpDownPlan", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_uint) for name in plan_members()]})


def c_plan(plan: Plan) -> ctypes.Structure:
    """A plan as the C interface takes it."""
    return plan_type()(**dataclasses.asdict(plan))
