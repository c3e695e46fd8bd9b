"""The plan: everything that decides how fast the native kernel runs, and nothing that decides what it computes.

There are two kernels, of one arithmetic: the ring (``native/ring.cuh``) and registers (``native/registers.cuh``). The
values that they need at compile time are listed here once: :func:`instantiations` of the ring, and
:data:`REGISTERS_KERNELS`. ``heuristics.py`` chooses plans.
"""

from __future__ import annotations

import dataclasses
import itertools

from .header import constant
from .reference.order import MAX_SEGMENTS, NUM_LANES, VECTOR_SIZE, num_segments, vectors_per_segment

BYTES_PER_ELEMENT = constant("kElementBytes")
VECTOR_BYTES = VECTOR_SIZE * BYTES_PER_ELEMENT

# The oldest GPUs that the native kernels are built for, and the oldest that have what the ring is made of. Those in
# between get weights in registers, without dependent launch.
MINIMUM_COMPUTE_CAPABILITY = (8, 0)
RING_COMPUTE_CAPABILITY = (9, 0)

CLUSTER_SIZES = (1, 2, 4, 8)
ROWS_PER_STAGE = (1, 2, 4)
# The registers kernels: rows of a warp, and vectors of each row that a lane has under way.
REGISTERS_KERNELS = ((1, 4), (1, 5), (1, 6), (1, 7), (2, 4))
ROWS_IN_REGISTERS = (1, 2)
# A ring of clusters of one may keep the activation in registers: rows of a stage -> the most vectors a lane, 8 float32 each. Two CTAs can
# then still share an SM, and no kernel spills. Eight vectors are an intermediate_dim of 16384.
VECTORS_IN_REGISTERS = {1: 8, 2: 7}
MAX_STAGES = constant("kMaxStages")
NUM_PARTIAL_SLOTS = constant("kNumPartialSlots")
MAX_CONSUMER_WARPS = constant("kMaxConsumerWarps")
MAX_STAGGER_ROWS = 63


def instantiations() -> list[tuple[int, int, int]]:
    """``(cluster_size, rows_per_stage, vectors)`` of every ring kernel that the build compiles, for each dtype.

    ``vectors`` of the activation a lane keeps in registers; 0 if the activation is in shared memory.
    """
    in_shared_memory = itertools.product(CLUSTER_SIZES, ROWS_PER_STAGE, (0,))
    in_registers = ((1, rows, vectors) for rows, most in VECTORS_IN_REGISTERS.items() for vectors in range(1, most + 1))
    return [*in_shared_memory, *in_registers]


def vectors_per_lane(intermediate_dim: int) -> int:
    """The most vectors that a lane has of a segment."""
    return -(-vectors_per_segment(intermediate_dim) // NUM_LANES)


@dataclasses.dataclass(frozen=True)
class Device:
    """The properties of a GPU that a plan depends on."""

    name: str
    compute_capability: tuple[int, int]
    num_sms: int
    shared_memory_per_block: int
    """Bytes of shared memory that one block can ask for."""


H200 = Device("NVIDIA H200", (9, 0), 132, 227 * 1024)
RTX_5090 = Device("NVIDIA GeForce RTX 5090", (12, 0), 170, 99 * 1024)

_ALLOWED: dict[str, tuple[object, ...]] = {
    "cluster_size": CLUSTER_SIZES,
    "rows_per_stage": ROWS_PER_STAGE,
    "num_stages": tuple(range(1, MAX_STAGES + 1)),
    "stages_in_flight": tuple(range(1, MAX_STAGES + 1)),
    "num_consumer_warps": tuple(range(1, MAX_CONSUMER_WARPS + 1)),
    "weight_prefetch": (False, True),
    "dependent_launch": (False, True),
    "rows_in_registers": (0, *ROWS_IN_REGISTERS),
    "vectors_in_flight": tuple(range(8)),
    "activation_in_registers": (False, True),
    "stagger_rows": tuple(range(MAX_STAGGER_ROWS + 1)),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is carried out. No value here changes a bit of the result.

    A stage of the ring holds ``rows_per_stage`` rows of a CTA's slice of the reduction axis. A group of consumer warps,
    one for each segment of the slice, sums them. A row has 8, 4, 2 or 1 segments, by its length
    (``reference/order.py``), and a CTA ``num_segments / cluster_size``.

    Raises:
        ValueError: a member is not one of the values below.
    """

    cluster_size: int
    """CTAs that split the reduction axis: 1, 2, 4 or 8, and at most one for each segment."""
    rows_per_stage: int
    """Rows of weights in a stage, which a warp sums together, sharing each activation it loads: 1, 2 or 4."""
    num_stages: int
    """Stages of the ring, 1 to 16."""
    stages_in_flight: int
    """Stages whose copies may be under way at a time, 1 to ``num_stages``. Whatever an SM asks for queues behind them: enough keep memory
    busy, more make the activation and the first stage late."""
    num_consumer_warps: int
    """Warps that sum, beside the producer and the epilogue warp, at most 16: one for each segment of the slice in each group. The number of
    groups must divide ``num_stages``."""
    weight_prefetch: bool = False
    """Fill the ring before earlier kernels have finished. Only for a weight that no kernel of the stream may still be writing."""
    dependent_launch: bool = True
    """Start while the kernel before is still draining (programmatic dependent launch), on GPUs of compute capability 9.0 and newer. Safe
    always: reads wait for that kernel."""
    rows_in_registers: int = 0
    """0 for the ring. 1 or 2 for the kernel that loads so many rows of weights a warp into registers. Of the members above, only
    num_consumer_warps, at most 8, then means anything."""
    _: dataclasses.KW_ONLY
    vectors_in_flight: int = 0
    """Of that kernel: vectors of each row that a lane has under way, 4 to 7 with 1 row and 4 with 2. 0 for the ring."""
    activation_in_registers: bool = False
    """Each lane keeps its part of the activation in registers, as float32, instead of reading it from shared memory for every row: for
    clusters of one, and an ``intermediate_dim`` of up to 16384 with 1 row a stage."""
    stagger_rows: int = 0
    """Rows, up to 63, that each cluster of the first half of the grid takes fewer than an even share rounded down. The second half shares
    the rest."""

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if not any(value == choice and type(value) is type(choice) for choice in allowed):
                expected = f"{allowed[0]} to {allowed[-1]}" if len(allowed) > 4 else f"one of {list(allowed)}"
                raise ValueError(f"plan.{name} must be {expected}, got {value!r}")

    @classmethod
    def in_registers(
        cls,
        rows: int,
        vectors_in_flight: int = 4,
        *,
        num_consumer_warps: int = MAX_SEGMENTS,
        weight_prefetch: bool = False,
        dependent_launch: bool = True,
    ) -> Plan:
        """A plan for the kernel that loads weights into registers. Raises ValueError if it was not compiled in."""
        if (rows, vectors_in_flight) not in REGISTERS_KERNELS:
            raise ValueError(
                f"(rows, vectors_in_flight) must be one of {list(REGISTERS_KERNELS)}, got {(rows, vectors_in_flight)!r}"
            )
        return cls(
            1, 1, 1, 1, num_consumer_warps, weight_prefetch, dependent_launch, rows, vectors_in_flight=vectors_in_flight
        )


def instantiation(plan: Plan, intermediate_dim: int) -> tuple[int, int, int]:
    """The ring kernel of a plan: of :func:`instantiations`, if the plan is possible."""
    vectors = vectors_per_lane(intermediate_dim) if plan.activation_in_registers else 0
    return plan.cluster_size, plan.rows_per_stage, vectors


def slice_bytes(cluster_size: int, intermediate_dim: int) -> int:
    """Bytes of a row that a CTA of the cluster takes, at the most."""
    vectors = vectors_per_segment(intermediate_dim) * (num_segments(intermediate_dim) // cluster_size)
    return min(vectors * VECTOR_BYTES, intermediate_dim * BYTES_PER_ELEMENT)


def shared_memory_bytes(plan: Plan, intermediate_dim: int) -> int:
    """Shared memory of one CTA of the ring, as ``SharedLayout`` of ``native/geometry.h`` lays it out."""
    bytes_of_slice = slice_bytes(plan.cluster_size, intermediate_dim)
    activation = 0 if plan.activation_in_registers else -(-bytes_of_slice // 128) * 128
    sums = plan.rows_per_stage * constant("kPartialsBytesPerRow")
    return constant("kBarriersBytes") + sums + activation + plan.num_stages * plan.rows_per_stage * bytes_of_slice


def check_plan(plan: Plan, intermediate_dim: int, device: Device) -> None:
    """Raise ValueError, naming the member and what it may be, unless the kernel can run ``plan`` on ``device``."""
    segments = num_segments(intermediate_dim)
    if plan.rows_in_registers:
        if (plan.rows_in_registers, plan.vectors_in_flight) not in REGISTERS_KERNELS:
            raise ValueError(
                f"plan.vectors_in_flight must be one of {[v for r, v in REGISTERS_KERNELS if r == plan.rows_in_registers]} with "
                f"rows_in_registers {plan.rows_in_registers}, got {plan.vectors_in_flight}"
            )
        if plan.num_consumer_warps % segments or plan.num_consumer_warps > MAX_SEGMENTS:
            raise ValueError(
                f"plan.num_consumer_warps must be a multiple of {segments}, the segments of a row, and at most {MAX_SEGMENTS} beside "
                f"rows_in_registers, got {plan.num_consumer_warps}"
            )
        return
    if plan.vectors_in_flight:
        raise ValueError(f"plan.vectors_in_flight must be 0 without rows_in_registers, got {plan.vectors_in_flight}")
    if device.compute_capability < RING_COMPUTE_CAPABILITY:
        raise ValueError(
            f"plan.rows_in_registers must be one of {list(ROWS_IN_REGISTERS)} on {device.name}: the ring needs compute capability 9.0 or "
            f"newer, got {plan.rows_in_registers} on {'.'.join(map(str, device.compute_capability))}"
        )
    if plan.cluster_size > segments:
        raise ValueError(
            f"plan.cluster_size must be at most {segments}, the segments of a row of {intermediate_dim}, got {plan.cluster_size}"
        )
    vectors = vectors_per_lane(intermediate_dim)
    most = VECTORS_IN_REGISTERS.get(plan.rows_per_stage, 0) if plan.cluster_size == 1 else 0
    if plan.activation_in_registers and vectors > most:
        raise ValueError(
            f"plan.activation_in_registers holds {most} vectors a lane at cluster_size {plan.cluster_size} and rows_per_stage "
            f"{plan.rows_per_stage}, got intermediate_dim {intermediate_dim}, which has {vectors}"
        )
    if plan.stages_in_flight > plan.num_stages:
        raise ValueError(
            f"plan.stages_in_flight must be at most num_stages {plan.num_stages}, got {plan.stages_in_flight}"
        )
    warps_per_group = segments // plan.cluster_size
    num_groups = plan.num_consumer_warps // warps_per_group
    if plan.num_consumer_warps % warps_per_group or plan.num_stages % num_groups or NUM_PARTIAL_SLOTS % num_groups:
        raise ValueError(
            f"plan.num_consumer_warps must be {warps_per_group} (the segments of a CTA's slice) times a divisor of num_stages "
            f"{plan.num_stages} and of {NUM_PARTIAL_SLOTS}, got {plan.num_consumer_warps}"
        )
    needed = shared_memory_bytes(plan, intermediate_dim)
    if needed > device.shared_memory_per_block:
        raise ValueError(
            f"plan needs {needed} bytes of shared memory a block at intermediate_dim {intermediate_dim}, {device.name} has "
            f"{device.shared_memory_per_block}: fewer stages, fewer rows_per_stage or a larger cluster_size"
        )
