"""What a call may read before the kernels ahead of it have finished: nothing by default; with weight_prefetch, the weight.

A kernel that starts its dependents, sleeps and then writes runs right before every call. Results are compared on the device, so that
nothing ever waits and the calls stay as close to the writer as they can be.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from mlpdown.reference.order import MAX_SEGMENTS

import mlpdown
from gpu.weight_writer import write_late
from mlpdown.cases import Case, make_case
from mlpdown.plan import CLUSTER_SIZES, REGISTERS_KERNELS, Plan

pytestmark = pytest.mark.gpu

NUM_CALLS = 10_000
SHAPE = (2560, 10240)


def _ring(cluster_size: int) -> Plan:
    """A ring that is small enough for every GPU, and a group of warps."""
    return Plan(cluster_size, 1, num_stages=3, stages_in_flight=2, num_consumer_warps=MAX_SEGMENTS // cluster_size)


# The activation in shared memory, in registers, and there with two groups of warps; weights in registers.
KERNELS = [
    *(_ring(size) for size in CLUSTER_SIZES),
    dataclasses.replace(_ring(1), activation_in_registers=True),
    Plan(1, 1, num_stages=4, stages_in_flight=2, num_consumer_warps=16, activation_in_registers=True, stagger_rows=1),
    *(Plan.in_registers(*kernel) for kernel in REGISTERS_KERNELS),
]


class Alternating:
    """Two calls that differ in one input, which a writer exchanges before each call."""

    def __init__(self, name: str) -> None:
        cases = [_case(seed) for seed in (1, 2)]
        cases[1] = dataclasses.replace(cases[0], **{name: getattr(cases[1], name)})
        self.sources = [_tensor(case, name) for case in cases]
        self.target = torch.empty_like(self.sources[0])
        hidden_states, attn_output, mlp_intermediate, weight, bias = cases[0].tensors("cuda")
        self.arguments = {
            "hidden_states": hidden_states,
            "attn_output": attn_output,
            "mlp_intermediate": mlp_intermediate,
            "weight": weight,
            "bias": bias,
        }
        self.arguments[name] = self.target
        self.expected = [torch.from_numpy(case.expected_bits().view("int16")).cuda() for case in cases]
        # Stale bits show in nearly every element.
        assert (self.expected[0] != self.expected[1]).float().mean() > 0.9

    def run(self, call: Callable[[dict[str, torch.Tensor]], torch.Tensor], num_calls: int) -> tuple[int, int]:
        """Calls with a wrong bit and wrong elements in all, of so many calls."""
        wrong = torch.zeros(2, dtype=torch.int64, device="cuda")
        self.target.copy_(self.sources[1])
        for index in range(num_calls):
            write_late(self.target, self.sources[index % 2])
            out = call(self.arguments)
            unlike = out.view(torch.int16) != self.expected[index % 2]
            wrong += torch.stack([unlike.any(), unlike.sum()])
        num_wrong_calls, num_wrong_elements = wrong.tolist()
        return num_wrong_calls, num_wrong_elements


def test_weight_written_just_before_the_call(record_property: Callable[[str, object], None]) -> None:
    """Default settings: the new weight is read, always."""
    wrong_calls, wrong_elements = Alternating("weight").run(_native, NUM_CALLS)
    record_property("calls", NUM_CALLS)
    record_property("calls_with_stale_bits", wrong_calls)
    assert (wrong_calls, wrong_elements) == (0, 0)


def test_weight_written_two_calls_before() -> None:
    """A call in between, which starts early too, does not break the chain of waits."""
    alternating = Alternating("weight")
    other_weight = alternating.sources[0].clone()

    def call(arguments: dict[str, torch.Tensor]) -> torch.Tensor:
        _native({**arguments, "weight": other_weight})
        return _native(arguments)

    assert alternating.run(call, NUM_CALLS // 10) == (0, 0)


def test_prefetch_of_a_weight_being_written_reads_stale_bits(record_property: Callable[[str, object], None]) -> None:
    """The hazard is real, and the tests above would see it."""
    num_calls = NUM_CALLS // 10
    wrong_calls, wrong_elements = Alternating("weight").run(_native_with_prefetch, num_calls)
    record_property("calls", num_calls)
    record_property("calls_with_stale_bits", wrong_calls)
    record_property("stale_elements", wrong_elements)
    assert wrong_calls > 0


@pytest.mark.parametrize("name", ["mlp_intermediate", "hidden_states", "attn_output", "bias"])
def test_prefetch_reads_nothing_early_but_the_weight(name: str, record_property: Callable[[str, object], None]) -> None:
    """With weight_prefetch and a weight that stays, whatever else is written right before the call is read as written."""
    num_calls = NUM_CALLS if name == "mlp_intermediate" else NUM_CALLS // 10
    wrong_calls, wrong_elements = Alternating(name).run(_native_with_prefetch, num_calls)
    record_property("calls", num_calls)
    record_property("calls_with_wrong_bits", wrong_calls)
    assert (wrong_calls, wrong_elements) == (0, 0)


@pytest.mark.parametrize("plan", KERNELS, ids=str)
def test_weight_written_just_before_the_call_under_every_kernel(plan: Plan) -> None:
    def call(arguments: dict[str, torch.Tensor]) -> torch.Tensor:
        return mlpdown.run(**arguments, backend="native", plan=plan)

    assert Alternating("weight").run(call, NUM_CALLS // 20) == (0, 0)


@pytest.mark.parametrize("plan", KERNELS, ids=str)
@pytest.mark.parametrize("name", ["mlp_intermediate", "hidden_states"])
def test_prefetch_reads_nothing_early_but_the_weight_under_every_kernel(name: str, plan: Plan) -> None:
    def call(arguments: dict[str, torch.Tensor]) -> torch.Tensor:
        return mlpdown.run(**arguments, backend="native", plan=dataclasses.replace(plan, weight_prefetch=True))

    assert Alternating(name).run(call, NUM_CALLS // 20) == (0, 0)


@functools.cache
def _case(seed: int) -> Case:
    return make_case(*SHAPE, "float16", "ordinary", seed)


def _native(arguments: dict[str, torch.Tensor]) -> torch.Tensor:
    return mlpdown.run(**arguments, backend="native")


def _native_with_prefetch(arguments: dict[str, torch.Tensor]) -> torch.Tensor:
    return mlpdown.run(**arguments, backend="native", weight_prefetch=True)


def _tensor(case: Case, name: str) -> torch.Tensor:
    names = [field.name for field in dataclasses.fields(Case)][1:]
    tensor = case.tensors("cuda")[names.index(name)]
    assert tensor is not None
    return tensor
