"""The machines of the specification: the float32 operations that they compile to, and no other, whatever mode their thread is in."""

from __future__ import annotations

import re
import subprocess
import sys
import types as python_types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scalar_replay
import torch
from assertions import assert_same_bits
from mlpdown.reference import finish, machines, row_sums
from numba import types
from numba.cuda import dispatcher

from mlpdown import reference
from mlpdown.cases import make_case

SPECIAL = np.array([0.0, -0.0, 1.0, -3.0, 2.0**-149, -(2.0**-126), 3.4e38, np.inf, -np.inf, np.nan], np.float32)
MACHINES = {"cpu": machines.cpu_machine, "simulator": machines.simulator_machine}


def operands(count: int) -> list[np.ndarray]:
    """Any bits as float32, and all pairs of special values."""
    random = np.random.default_rng(count)
    pairs = np.array(np.meshgrid(SPECIAL, SPECIAL)).reshape(2, -1)
    drawn = random.integers(0, 1 << 32, (count, 2000), np.uint32).view(np.float32)
    return [np.concatenate([drawn[i], pairs[i % 2], pairs[(i + 1) % 2]]) for i in range(count)]


def evaluate(machine: str, name: str, values: list[np.ndarray]) -> np.ndarray:
    """An operation of a machine, element by element."""
    made = MACHINES[machine]()
    operation = call = getattr(made, name)
    if machine == "cpu":
        calls = {1: lambda a: operation(a), 2: lambda a, b: operation(a, b), 3: lambda a, b, c: operation(a, b, c)}
        call = made.compile(calls[len(values)])
    return np.array([call(*row) for row in zip(*values, strict=True)], np.float32)


def assert_same_numbers(actual: np.ndarray, expected: np.ndarray) -> None:
    """The same bits, but that one NaN is as good as another."""
    nans = np.isnan(expected)
    np.testing.assert_array_equal(actual[~nans].view(np.uint32), expected[~nans].view(np.uint32))
    assert np.isnan(actual[nans]).all()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("name", "operation"),
    [("add", lambda a, b: a + b), ("mul", lambda a, b: a * b), ("div", lambda a, b: a / b), ("sqrt", np.sqrt)],
)
def test_operations_are_those_of_ieee_754(machine: str, name: str, operation: Callable[..., np.ndarray]) -> None:
    """Against float64 rounded to float32: for these four, that is the exact result rounded once (S. Figueroa, 1995)."""
    values = operands(1 if name == "sqrt" else 2)
    with np.errstate(all="ignore"):
        expected = operation(*(v.astype(np.float64) for v in values)).astype(np.float32)
    assert_same_numbers(evaluate(machine, name, values), expected)


@pytest.mark.parametrize("machine", MACHINES)
def test_fused_multiply_add_rounds_once(machine: str) -> None:
    values = operands(3)
    exact = [scalar_replay.multiply_add(*row) for row in zip(*(v.tolist() for v in values), strict=True)]
    with np.errstate(all="ignore"):
        assert_same_numbers(evaluate(machine, "fma", values), np.array(exact, np.float32))


@pytest.mark.parametrize("machine", MACHINES)
def test_bits_of_a_float_come_back(machine: str) -> None:
    made = MACHINES[machine]()
    to_bits, to_float = made.float_to_bits, made.bits_to_float
    there_and_back = made.compile(lambda value: to_float(to_bits(value)))
    bits = made.compile(lambda value: to_bits(value))
    numbers = operands(1)[0]
    numbers = numbers[~np.isnan(numbers)]
    assert [int(bits(value)) for value in numbers] == numbers.view(np.uint32).tolist()
    assert np.array([there_and_back(value) for value in numbers], np.float32).tobytes() == numbers.tobytes()


# ---- What they are compiled to --------------------------------------------------------------------------------------------------------

MATRIX = types.Array(types.float32, 2, "C")
BITS = types.Array(types.int16, 2, "C")


def ptx_of(kernel: object, signature: tuple[types.Type, ...], monkeypatch: pytest.MonkeyPatch) -> str:
    """PTX for compute capability 9.0, made without a GPU."""
    from numba import cuda

    device = python_types.SimpleNamespace(compute_capability=(9, 0))
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: device)
    return cuda.compile_ptx(kernel.py_func, signature, cc=(9, 0))[0]  # type: ignore[attr-defined]


def float_instructions(ptx: str) -> set[str]:
    """Instructions on float32 or float64, but for those that only move values."""
    found = set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][a-z0-9_.:]*\.f(?:32|64)(?:\.f(?:32|64))?)\b", ptx, re.MULTILINE))
    return {name for name in found if name.partition(".")[0] not in ("ld", "st", "mov", "selp")}


def test_numba_makes_the_gpu_no_other_float_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused multiply-adds and additions, rounded to nearest even, subnormals kept: no .ftz, no float64, no fusing of what is apart."""
    sums = ptx_of(row_sums._cuda_kernel(), (MATRIX, MATRIX, types.int64, types.int64, MATRIX), monkeypatch)
    assert float_instructions(sums) == {"fma.rn.f32", "add.rn.f32"}
    add_tensor, round_sums = finish._cuda_kernels()
    assert float_instructions(ptx_of(add_tensor, (MATRIX, MATRIX), monkeypatch)) == {"add.rn.f32"}
    assert float_instructions(ptx_of(round_sums, (MATRIX, types.int64, BITS), monkeypatch)) == set(), (
        "rounding is done on integers"
    )


@pytest.mark.parametrize(
    ("name", "instruction"),
    [("add", "add.rn.f32"), ("mul", "mul.rn.f32"), ("fma", "fma.rn.f32"), ("div", "div.rn.f32"), ("sqrt", "sqrt.rn.f32")],
)
def test_each_operation_is_one_instruction_of_a_gpu(
    name: str, instruction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded to nearest even, subnormals kept, even where a compiler could fuse it with the next."""
    from numba import cuda

    made = machines.gpu_machine()
    operation = getattr(made, name)
    num_operands = {"fma": 3, "sqrt": 1}.get(name, 2)

    def kernel(values: Any) -> None:
        if num_operands == 3:
            values[0, 0] = operation(values[0, 0], values[0, 1], values[0, 2])
        elif num_operands == 2:
            values[0, 0] = operation(values[0, 0], values[0, 1])
        else:
            values[0, 0] = operation(values[0, 0])

    assert float_instructions(ptx_of(cuda.jit(kernel), (MATRIX,), monkeypatch)) == {instruction}


def test_numba_makes_the_cpu_no_other_float_instruction() -> None:
    """In LLVM's own language, where a flag (fast, contract, reassoc) would allow another result."""
    case = make_case(64, 2048, "float16")
    case.expected_bits()
    loops = (row_sums._cpu_loop(), *finish._cpu_loops())
    code = "\n".join(text for loop in loops for text in loop.inspect_llvm().values())  # type: ignore[attr-defined]
    operations = re.findall(r"= (f(?:add|sub|mul|div|rem|neg)\b[^%\n]*)", code) + re.findall(
        r"call (.*@llvm\.fm[\w.]+)", code
    )
    # The finish has an element in each place of a vector.
    operations = [re.sub(r"<\d+ x float>", "float", operation).strip() for operation in operations]
    assert set(operations) == {"fadd float", "float @llvm.fma.f32"}
    assert "double" not in code


# ---- Modes and threads --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def flushing() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no mode that flushes subnormals")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("flushing")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_mode_that_flushes_subnormals_changes_no_bit(dtype: str) -> None:
    case = make_case(256, 1032, dtype, "special", num_tokens=2)
    flushed = case.expected_bits()
    tiny = np.full((1, 64), 2.0**-126, np.float32)
    assert reference.partial_sums(tiny, np.full((200, 64), 2.0**-10, np.float32))[0, 0] == np.float32(64 * 2.0**-136)
    assert np.float32(2.0**-140) * SPECIAL[2] == 0, "the caller's mode is back"
    torch.set_flush_denormal(False)
    assert_same_bits(flushed, case.expected_bits(), dtype)


AT_THE_END = """
import atexit, threading, time
import numpy as np
from mlpdown import reference

def compute(where):
    sums = reference.partial_sums(np.ones((1, 64), np.float32), np.ones((1000, 64), np.float32))
    print(where, int(sums.sum()), flush=True)

def later():
    threading.main_thread().join()
    compute("thread")

compute("main")
threading.Thread(target=later).start()
atexit.register(compute, "atexit")
"""


def test_threads_that_outlive_the_main_thread_get_results() -> None:
    process = subprocess.run(
        [sys.executable, "-c", AT_THE_END], capture_output=True, text=True, timeout=120, check=False
    )
    assert process.stderr == ""
    assert sorted(process.stdout.split("\n")) == ["", "atexit 64000", "main 64000", "thread 64000"]


def test_an_error_in_a_thread_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(first: int, end: int) -> None:
        if first > 0:
            raise ArithmeticError(f"share from {first}")

    monkeypatch.setattr(machines.os, "cpu_count", lambda: 4)
    with pytest.raises(ArithmeticError, match="share from"):
        machines.run_in_threads(fail, 1 << 20, 1)
