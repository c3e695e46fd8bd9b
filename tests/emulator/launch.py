"""Launches of the emulated kernel, from NumPy arrays."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import structs

from mlpdown.plan import Plan

from .build import NATIVE, build

Bits = npt.NDArray[np.uint16]


class ProtocolViolation(Exception):
    """A check of the emulator failed. ``check`` is its name, the message says who, what and where."""

    def __init__(self, check: str, report: str, seed: int) -> None:
        super().__init__(f"{check}: {report} (seed {seed})")
        self.check = check


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The tensors of one call as bits of ``dtype``; ``[hidden_dim]`` but for the two that are named after their shape."""

    dtype: str
    mlp_intermediate: Bits  # [intermediate_dim]
    weight: Bits  # [hidden_dim, intermediate_dim]
    hidden_states: Bits
    attn_output: Bits | None
    bias: Bits | None


class Statistics(NamedTuple):
    """What one launch came to."""

    num_switches: int
    num_landings: int
    num_phases: int
    bytes_prefetched: int


class _Result(ctypes.Structure):
    _fields_ = (
        ("num_switches", ctypes.c_uint64),
        ("num_landings", ctypes.c_uint64),
        ("num_phases", ctypes.c_uint64),
        ("bytes_prefetched", ctypes.c_uint64),
        ("check", ctypes.c_char * 32),
        ("report", ctypes.c_char * 8192),
    )


class Kernel:
    """The kernels in a folder of sources, built for a host: ``ring`` are cluster sizes, rows per stage and vectors in registers,
    ``registers`` are rows in registers and vectors in flight."""

    def __init__(
        self,
        ring: list[tuple[int, int, int]],
        registers: tuple[tuple[int, int], ...],
        native: Path = NATIVE,
        *,
        optimise: bool = True,
    ) -> None:
        self._library = ctypes.CDLL(str(build(native, ring, registers, optimise=optimise)))
        for name, structure in (("problem", structs.problem_type()), ("plan", structs.plan_type())):
            assert getattr(self._library, f"emulator_{name}_bytes")() == ctypes.sizeof(structure)
        self._library.emulator_launch.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_uint32,
            ctypes.c_uint64,
            ctypes.c_bool,
            ctypes.c_void_p,
        ]
        self.widen_float16 = self._library.emulator_cvt_f32_f16
        self.widen_float16.argtypes, self.widen_float16.restype = [ctypes.c_uint16], ctypes.c_float
        self.round_once = {
            "float16": self._library.emulator_cvt_rn_f16_f32,
            "bfloat16": self._library.emulator_cvt_rn_bf16_f32,
        }
        self.launched: list[tuple[tuple[int, ...], Plan]] = []
        for function in self.round_once.values():
            function.argtypes, function.restype = [ctypes.c_float], ctypes.c_uint16

    def launch(
        self,
        inputs: Inputs,
        plan: Plan,
        *,
        seed: int,
        num_clusters: int = 1,
        is_partial_sums: bool = False,
        earlier_grids_last: bool = False,
    ) -> tuple[npt.NDArray[Any], Statistics]:
        """Run one call under the schedule that ``seed`` stands for.

        ``num_clusters`` is the size of the ring's grid; the registers kernel has its own. ``earlier_grids_last``: they end when nothing
        else can happen in the cluster, not at some moment. Returns ``out``, ``[hidden_dim]``, as bits, or
        as float32 for partial sums; and what it took.

        Raises:
            ProtocolViolation: a check failed.
        """
        hidden_dim, intermediate_dim = inputs.weight.shape
        # Poisoned: NaN in every type.
        out = (
            np.full(hidden_dim, 0xFFFFFFFF, np.uint32).view(np.float32)
            if is_partial_sums
            else np.full(hidden_dim, 0xFFFF, np.uint16)
        )
        problem = structs.problem_type()(
            hidden_states=inputs.hidden_states.ctypes.data,
            attn_output=None if inputs.attn_output is None else inputs.attn_output.ctypes.data,
            mlp_intermediate=inputs.mlp_intermediate.ctypes.data,
            weight=inputs.weight.ctypes.data,
            bias=None if inputs.bias is None else inputs.bias.ctypes.data,
            out=out.ctypes.data,
            hidden_dim=hidden_dim,
            intermediate_dim=intermediate_dim,
            is_bfloat16=inputs.dtype == "bfloat16",
            is_partial_sums=is_partial_sums,
        )
        c_plan = structs.c_plan(plan)
        result = _Result()
        if self._library.emulator_launch(
            ctypes.byref(problem), ctypes.byref(c_plan), num_clusters, seed, earlier_grids_last, ctypes.byref(result)
        ):
            raise ValueError(f"plan must be one of the instantiations that were built, got {plan}")
        if result.check:
            raise ProtocolViolation(result.check.decode(), result.report.decode(), seed)
        self.launched.append((inputs.weight.shape, plan))
        return out, Statistics(result.num_switches, result.num_landings, result.num_phases, result.bytes_prefetched)
