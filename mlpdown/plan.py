"""The plan: everything that decides how fast the native kernel runs, and nothing that decides what it computes.

There are two kernels, of one arithmetic: the ring (``native/mlp_down.cuh``) and registers (``native/mlp_down_registers.cuh``). The values
that they need at compile time are listed once, in :data:`CLUSTER_SIZES`, :data:`ROWS_PER_STAGE` and :data:`ROWS_IN_REGISTERS`; the build
instantiates every pair of the first two, and each of the third.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

NUM_SEGMENTS = 8  # of the canonical order: a cluster can split them, not cut them
VECTOR_SIZE = 8
BYTES_PER_ELEMENT = 2

CLUSTER_SIZES = (1, 2, 4, 8)
ROWS_PER_STAGE = (1, 2, 4)
ROWS_IN_REGISTERS = (1, 2, 4)
MAX_STAGES = 16
MAX_CONSUMER_WARPS = 16

# Alone, registers win at 18.9 MB (1536 x 6144), and lose at 23.1 MB (2048 x 5632); native/NOTES.md says what is open.
SMALL_WEIGHT_BYTES = 20 * 2**20
# Larger stages do not keep memory busier, and the last one takes longer to sum.
MAX_STAGE_BYTES = 44 * 2**10
# Under way for each CTA at the least: one stage, for the rows of all models measured; for shorter ones, which were not timed, several.
MIN_BYTES_IN_FLIGHT = 16 * 2**10
# How many CTAs share an SM, and the cluster sizes to look at for each, the better first: while one CTA starts, ends or sums, memory works
# for the others. Three only of CTAs that need nothing of each other; clusters of them were slower. (Where short rows leave room for
# stages of two or four, those kernels' registers allow two CTAs; at 2048 x 5632, the one such shape timed, that was the faster.)
PLACEMENTS = ((3, (1,)), (2, CLUSTER_SIZES), (1, CLUSTER_SIZES))
# Of an SM's shared memory the device keeps so much for each CTA.
RESERVED_BYTES_PER_CTA = 2**10

_LISTS = {"cluster_size": "CLUSTER_SIZES", "rows_per_stage": "ROWS_PER_STAGE", "rows_in_registers": "ROWS_IN_REGISTERS"}
_BARRIER_BYTES = 8
_NUM_PARTIAL_SLOTS = 16


def instantiations() -> list[tuple[int, int]]:
    """``(cluster_size, rows_per_stage)`` of every ring kernel that the build compiles, for each dtype."""
    return list(itertools.product(CLUSTER_SIZES, ROWS_PER_STAGE))


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


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is carried out. No value here changes a bit of the result.

    A stage of the ring holds ``rows_per_stage`` rows of a CTA's slice of the reduction axis. A group of consumer warps, one for each of
    the CTA's ``8 / cluster_size`` segments, sums them.
    """

    cluster_size: int
    """CTAs that split the reduction axis: 1, 2, 4 or 8."""
    rows_per_stage: int
    """Rows of weights in a stage, which a warp sums together, sharing each activation it loads: 1, 2 or 4."""
    num_stages: int
    """Stages of the ring, 1 to 16."""
    stages_in_flight: int
    """Stages whose copies may be under way at a time, 1 to ``num_stages``. Whatever an SM asks for queues behind them: enough keep memory
    busy, more make the activation and the first stage late."""
    num_consumer_warps: int
    """Warps that sum, beside the producer and the epilogue warp, at most 16: ``8 / cluster_size`` for each group. The number of groups
    must divide ``num_stages``."""
    weight_prefetch: bool = False
    """Fill the ring before earlier kernels have finished. Only for a weight that no kernel of the stream may still be writing."""
    dependent_launch: bool = True
    """Start while the kernel before is still draining (programmatic dependent launch). Safe always: reads wait for that kernel."""
    rows_in_registers: int = 0
    """0 for the ring. 1, 2 or 4 for the kernel that lands so many rows of weights a CTA in registers; the ring's members then mean
    nothing."""

    @classmethod
    def in_registers(cls, rows: int, *, weight_prefetch: bool = False, dependent_launch: bool = True) -> Plan:
        """A plan for the kernel that lands ``rows`` (1, 2 or 4) rows a CTA in registers."""
        return cls(1, 1, 1, 1, NUM_SEGMENTS, weight_prefetch, dependent_launch, rows)


def shared_memory_bytes(plan: Plan, intermediate_dim: int) -> int:
    """Shared memory of one CTA: the ring's as ``native/shared_layout.h`` lays it out, or the sums alone."""
    if plan.rows_in_registers:
        return plan.rows_in_registers * NUM_SEGMENTS * 4
    slice_bytes = _slice_bytes(plan.cluster_size, intermediate_dim)
    owned_rows_per_slot = -(-plan.rows_per_stage // plan.cluster_size)
    num_barriers = 2 * MAX_STAGES + 2 * _NUM_PARTIAL_SLOTS + 1
    partials = _align(num_barriers * _BARRIER_BYTES, 16)
    activation = _align(partials + _NUM_PARTIAL_SLOTS * owned_rows_per_slot * NUM_SEGMENTS * 4, 128)
    ring = _align(activation + slice_bytes, 128)
    return ring + plan.num_stages * plan.rows_per_stage * slice_bytes


def check_plan(plan: Plan, intermediate_dim: int, device: Device) -> None:
    """Raise ValueError, naming the member and what it may be, unless the kernel can run ``plan`` on ``device``."""
    allowed = {
        "cluster_size": CLUSTER_SIZES,
        "rows_per_stage": ROWS_PER_STAGE,
        "num_stages": range(1, MAX_STAGES + 1),
        "stages_in_flight": range(1, MAX_STAGES + 1),
        "num_consumer_warps": range(1, MAX_CONSUMER_WARPS + 1),
        "rows_in_registers": (0, *ROWS_IN_REGISTERS),
    }
    for name in ("weight_prefetch", "dependent_launch"):
        if type(getattr(plan, name)) is not bool:
            raise ValueError(f"plan.{name} must be True or False, got {getattr(plan, name)!r}")
    for name, values in allowed.items():
        value = getattr(plan, name)
        if type(value) is not int or value not in values:
            expected = (
                f"{values.start} to {values.stop - 1}"
                if isinstance(values, range)
                else f"one of {list(values)} (mlpdown.plan.{_LISTS[name]})"
            )
            raise ValueError(f"plan.{name} must be {expected}, got {value!r}")
    if plan.rows_in_registers:
        return
    if plan.stages_in_flight > plan.num_stages:
        raise ValueError(f"plan.stages_in_flight must be at most num_stages {plan.num_stages}, got {plan.stages_in_flight}")
    warps_per_group = NUM_SEGMENTS // plan.cluster_size
    num_groups = plan.num_consumer_warps // warps_per_group
    if plan.num_consumer_warps % warps_per_group or plan.num_stages % num_groups or _NUM_PARTIAL_SLOTS % num_groups:
        raise ValueError(
            f"plan.num_consumer_warps must be {warps_per_group} (8 / cluster_size) times a divisor of num_stages {plan.num_stages} and of "
            f"{_NUM_PARTIAL_SLOTS}, got {plan.num_consumer_warps}"
        )
    needed = shared_memory_bytes(plan, intermediate_dim)
    if needed > device.shared_memory_per_block:
        raise ValueError(
            f"plan needs {needed} bytes of shared memory a block at intermediate_dim {intermediate_dim}, {device.name} has "
            f"{device.shared_memory_per_block}: fewer stages, fewer rows_per_stage or a larger cluster_size"
        )


@functools.lru_cache(maxsize=1024)
def choose_plan(hidden_dim: int, intermediate_dim: int, device: Device, *, weight_prefetch: bool = False) -> Plan:
    """The plan for a shape on a device, by what an H200 measured (``native/NOTES.md``).

    A small weight is over before a ring is set up: registers. For the others the ring, with as many CTAs on an SM and in as small a
    cluster as leaves each two stages (more where rows are short); stages of as many rows as keep them small. With weight_prefetch, which
    fills the rings while earlier kernels end, longer ones in clusters of two where these hold half of the weight.
    """
    row_bytes = intermediate_dim * BYTES_PER_ELEMENT
    if hidden_dim * row_bytes <= SMALL_WEIGHT_BYTES:
        return Plan.in_registers(4, weight_prefetch=weight_prefetch)
    if weight_prefetch:
        ring = _ring(2, intermediate_dim, _share(device, 2), weight_prefetch, MAX_STAGES)
        if ring is not None:
            held = 2 * device.num_sms * _ring_bytes(ring, intermediate_dim)  # two CTAs an SM
            if 2 * held >= hidden_dim * row_bytes:
                return ring
    for ctas_per_sm, cluster_sizes in PLACEMENTS:
        for cluster_size in cluster_sizes:
            ring = _ring(cluster_size, intermediate_dim, _share(device, ctas_per_sm), weight_prefetch, 2)
            if ring is not None:
                return ring
    # Two stages of a single row do not fit: registers, which need no shared memory for weights.
    return Plan.in_registers(1, weight_prefetch=weight_prefetch)


def _share(device: Device, ctas_per_sm: int) -> int:
    """Bytes of shared memory for each of so many CTAs on an SM."""
    return (device.shared_memory_per_block + RESERVED_BYTES_PER_CTA) // ctas_per_sm - RESERVED_BYTES_PER_CTA


def _ring(cluster_size: int, intermediate_dim: int, limit: int, weight_prefetch: bool, max_stages: int) -> Plan | None:
    """As many rows as a stage may have, and as many stages, at least two, as fit in ``limit`` bytes; None if they do not."""
    for rows in reversed(ROWS_PER_STAGE):
        stage_bytes = rows * _slice_bytes(cluster_size, intermediate_dim)
        if rows > 1 and stage_bytes > MAX_STAGE_BYTES:
            continue
        in_flight = min(MAX_STAGES // 2, -(-MIN_BYTES_IN_FLIGHT // stage_bytes))
        for num_stages in range(max(max_stages, 2 * in_flight), 1, -1):
            stages_in_flight = min(in_flight, num_stages)
            plan = Plan(cluster_size, rows, num_stages, stages_in_flight, NUM_SEGMENTS // cluster_size, weight_prefetch)
            if shared_memory_bytes(plan, intermediate_dim) <= limit:
                return plan
    return None


def _ring_bytes(plan: Plan, intermediate_dim: int) -> int:
    return plan.num_stages * plan.rows_per_stage * _slice_bytes(plan.cluster_size, intermediate_dim)


def _slice_bytes(cluster_size: int, intermediate_dim: int) -> int:
    num_vectors = intermediate_dim // VECTOR_SIZE
    slice_vectors = -(-num_vectors // NUM_SEGMENTS) * (NUM_SEGMENTS // cluster_size)
    return min(slice_vectors, num_vectors) * VECTOR_SIZE * BYTES_PER_ELEMENT


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
