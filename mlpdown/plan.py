"""The plan: everything that decides how fast the native kernel runs, and nothing that decides what it computes.

There are two kernels, of one arithmetic: the ring (``native/mlp_down.cuh``) and registers (``native/mlp_down_registers.cuh``). The values
that they need at compile time are listed once: :func:`instantiations` of the ring, and :data:`ROWS_IN_REGISTERS`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

NUM_SEGMENTS = 8  # of the canonical order: a cluster can split them, not cut them
NUM_LANES = 32
VECTOR_SIZE = 8
BYTES_PER_ELEMENT = 2

# The oldest GPUs that the native kernels are built for, and the oldest that have what the ring is made of. Those in
# between get weights in registers, without dependent launch.
MINIMUM_COMPUTE_CAPABILITY = (8, 0)
RING_COMPUTE_CAPABILITY = (9, 0)

CLUSTER_SIZES = (1, 2, 4, 8)
ROWS_PER_STAGE = (1, 2, 4)
ROWS_IN_REGISTERS = (1, 2, 4)
# A ring of clusters of one may keep the activation in registers: rows of a stage -> the most vectors a lane, 8 float32 each. Two CTAs can
# then still share an SM, and no kernel spills. Eight vectors are an intermediate_dim of 16384.
VECTORS_IN_REGISTERS = {1: 8, 2: 4}
MAX_STAGES = 16
MAX_CONSUMER_WARPS = 16
MAX_STAGGER_ROWS = 63

# Smaller weights are over before a ring is set up. Prefetching, a ring wins sooner: it is set up while the kernel before is still running.
SMALL_WEIGHT_BYTES = 16 * 2**20
SMALL_PREFETCHED_BYTES = 8 * 2**20
# How many CTAs share an SM, the better first: while one starts, ends or sums, memory works for the other.
CTAS_PER_SM = (2, 1)
# Under way for each CTA: with two CTAs an SM enough to keep memory busy. More only makes all that is asked for later. Half of it was faster
# where stages of two rows are prefetched, of weights from 8 to 23 MB.
BYTES_IN_FLIGHT = 32 * 2**10
MAX_BYTES_FOR_HALF_IN_FLIGHT = 24 * 2**20
# The largest stage of more than one row. Beside an activation in registers, larger ones were slower, and a second row costs registers.
MAX_STAGE_BYTES = 44 * 2**10
MAX_STAGE_BYTES_BESIDE_ACTIVATION = 24 * 2**10
# With weight prefetch and so many rows a CTA, the first half of the grid takes a row less than an even share rounded down, the other half
# the rest: then the two CTAs of an SM do not end together.
ROWS_TO_STAGGER = (3, 12)
# Of an SM's shared memory the device keeps so much for each CTA.
RESERVED_BYTES_PER_CTA = 2**10

_LISTS = {"cluster_size": "CLUSTER_SIZES", "rows_per_stage": "ROWS_PER_STAGE", "rows_in_registers": "ROWS_IN_REGISTERS"}
_BARRIER_BYTES = 8
_NUM_PARTIAL_SLOTS = 16


def instantiations() -> list[tuple[int, int, int]]:
    """``(cluster_size, rows_per_stage, vectors)`` of every ring kernel that the build compiles, for each dtype.

    ``vectors`` of the activation a lane keeps in registers; 0 if the activation is in shared memory.
    """
    in_shared_memory = itertools.product(CLUSTER_SIZES, ROWS_PER_STAGE, (0,))
    in_registers = ((1, rows, vectors) for rows, most in VECTORS_IN_REGISTERS.items() for vectors in range(1, most + 1))
    return [*in_shared_memory, *in_registers]


def vectors_per_lane(intermediate_dim: int) -> int:
    """The most vectors that a lane has of a segment."""
    return -(-_segment_vectors(intermediate_dim) // NUM_LANES)


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
    """Start while the kernel before is still draining (programmatic dependent launch), on GPUs of compute capability 9.0 and newer. Safe
    always: reads wait for that kernel."""
    rows_in_registers: int = 0
    """0 for the ring. 1, 2 or 4 for the kernel that lands so many rows of weights a CTA in registers; the ring's members then mean
    nothing."""
    _: dataclasses.KW_ONLY
    activation_in_registers: bool = False
    """Each lane keeps its part of the activation in registers, as float32, instead of reading it from shared memory for every row: for
    clusters of one, and an ``intermediate_dim`` of up to 16384 with 1 row a stage, 8192 with 2."""
    stagger_rows: int = 0
    """Rows, up to 63, that each cluster of the first half of the grid takes fewer than an even share rounded down. The second half shares
    out the rest."""

    @classmethod
    def in_registers(cls, rows: int, *, weight_prefetch: bool = False, dependent_launch: bool = True) -> Plan:
        """A plan for the kernel that lands ``rows`` (1, 2 or 4; else ValueError) rows a CTA in registers."""
        if rows not in ROWS_IN_REGISTERS:
            raise ValueError(f"rows must be one of {list(ROWS_IN_REGISTERS)}, got {rows!r}")
        return cls(1, 1, 1, 1, NUM_SEGMENTS, weight_prefetch, dependent_launch, rows)


def instantiation(plan: Plan, intermediate_dim: int) -> tuple[int, int, int]:
    """The ring kernel of a plan: of :func:`instantiations`, if the plan is possible."""
    vectors = vectors_per_lane(intermediate_dim) if plan.activation_in_registers else 0
    return plan.cluster_size, plan.rows_per_stage, vectors


def shared_memory_bytes(plan: Plan, intermediate_dim: int) -> int:
    """Shared memory of one CTA: the ring's as ``native/shared_layout.h`` lays it out, or the sums alone."""
    if plan.rows_in_registers:
        return plan.rows_in_registers * NUM_SEGMENTS * 4
    slice_bytes = _slice_bytes(plan.cluster_size, intermediate_dim)
    owned_rows_per_slot = -(-plan.rows_per_stage // plan.cluster_size)
    num_barriers = 2 * MAX_STAGES + 2 * _NUM_PARTIAL_SLOTS + 1
    partials = _align(num_barriers * _BARRIER_BYTES, 16)
    activation = _align(partials + _NUM_PARTIAL_SLOTS * owned_rows_per_slot * NUM_SEGMENTS * 4, 128)
    ring = _align(activation + (0 if plan.activation_in_registers else slice_bytes), 128)
    return ring + plan.num_stages * plan.rows_per_stage * slice_bytes


def check_plan(plan: Plan, intermediate_dim: int, device: Device) -> None:
    """Raise ValueError, naming the member and what it may be, unless the kernel can run ``plan`` on ``device``."""
    allowed = {
        "cluster_size": CLUSTER_SIZES,
        "rows_per_stage": ROWS_PER_STAGE,
        "num_stages": range(1, MAX_STAGES + 1),
        "stages_in_flight": range(1, MAX_STAGES + 1),
        "num_consumer_warps": range(1, MAX_CONSUMER_WARPS + 1),
        "stagger_rows": range(MAX_STAGGER_ROWS + 1),
        "rows_in_registers": (0, *ROWS_IN_REGISTERS),
    }
    for name in ("activation_in_registers", "weight_prefetch", "dependent_launch"):
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
    if device.compute_capability < RING_COMPUTE_CAPABILITY:
        raise ValueError(
            f"plan.rows_in_registers must be one of {list(ROWS_IN_REGISTERS)} on {device.name}: the ring needs compute capability 9.0 or "
            f"newer, got {plan.rows_in_registers} on {'.'.join(map(str, device.compute_capability))}"
        )
    if instantiation(plan, intermediate_dim) not in instantiations():
        longest = {rows: vectors * NUM_SEGMENTS * NUM_LANES * VECTOR_SIZE for rows, vectors in VECTORS_IN_REGISTERS.items()}
        reach = " or ".join(f"(rows_per_stage {rows}, intermediate_dim up to {dim})" for rows, dim in longest.items())
        raise ValueError(
            f"plan.activation_in_registers needs cluster_size 1 and {reach}, got cluster_size {plan.cluster_size}, rows_per_stage "
            f"{plan.rows_per_stage} and intermediate_dim {intermediate_dim}"
        )
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
    """The plan for a shape on a device, by what an H200 measured (``native/NOTES.md``). No GPU without rings was measured.

    A small weight is over before a ring is set up: registers, as for all on GPUs that have no rings. For the others the ring, with as many
    CTAs on an SM and in as small a cluster as leaves each two stages (more where rows are short), and the activation in registers as far
    as these reach. With weight_prefetch, and about ten rows for each of two CTAs an SM, shares are staggered where rings are long enough to
    run ahead. Where two stages of a single row do not fit, registers again, a row a CTA.
    """
    if device.compute_capability < RING_COMPUTE_CAPABILITY:
        return Plan.in_registers(4, weight_prefetch=weight_prefetch)
    weight_bytes = hidden_dim * intermediate_dim * BYTES_PER_ELEMENT
    if weight_bytes < (SMALL_PREFETCHED_BYTES if weight_prefetch else SMALL_WEIGHT_BYTES):
        return Plan.in_registers(4, weight_prefetch=weight_prefetch)
    may_halve = weight_prefetch and weight_bytes <= MAX_BYTES_FOR_HALF_IN_FLIGHT
    for ctas_per_sm, cluster_size in itertools.product(CTAS_PER_SM, CLUSTER_SIZES):
        ring = _ring(cluster_size, intermediate_dim, _share(device, ctas_per_sm), may_halve)
        if ring is None:
            continue
        # Of two CTAs an SM, and with rings long enough to run ahead of the other half.
        may_stagger = weight_prefetch and ctas_per_sm == 2 and ring.rows_per_stage == 1 and ring.num_stages > 2 * ring.stages_in_flight
        fewest, most = (rows * 2 * device.num_sms for rows in ROWS_TO_STAGGER)
        stagger_rows = int(may_stagger and fewest <= hidden_dim <= most)
        return dataclasses.replace(ring, stagger_rows=stagger_rows, weight_prefetch=weight_prefetch)
    # Two stages of a single row do not fit: registers, which need no shared memory for weights.
    return Plan.in_registers(1, weight_prefetch=weight_prefetch)


def _share(device: Device, ctas_per_sm: int) -> int:
    """Bytes of shared memory for each of so many CTAs on an SM."""
    return (device.shared_memory_per_block + RESERVED_BYTES_PER_CTA) // ctas_per_sm - RESERVED_BYTES_PER_CTA


def _ring(cluster_size: int, intermediate_dim: int, limit: int, may_halve_in_flight: bool) -> Plan | None:
    """As many rows as a stage may have, and as many stages, at least two, as fit in ``limit`` bytes; None if they do not."""
    vectors = vectors_per_lane(intermediate_dim)
    in_registers = cluster_size == 1 and vectors <= VECTORS_IN_REGISTERS[1]
    max_stage_bytes = MAX_STAGE_BYTES_BESIDE_ACTIVATION if in_registers else MAX_STAGE_BYTES
    for rows in reversed(ROWS_PER_STAGE):
        stage_bytes = rows * _slice_bytes(cluster_size, intermediate_dim)
        if rows > 1 and (stage_bytes > max_stage_bytes or (in_registers and vectors > VECTORS_IN_REGISTERS.get(rows, 0))):
            continue
        bytes_in_flight = BYTES_IN_FLIGHT // 2 if may_halve_in_flight and in_registers and rows > 1 else BYTES_IN_FLIGHT
        for num_stages in range(MAX_STAGES, 1, -1):
            # What is not in flight is being summed: one stage at the least, and half of the longest ring.
            stages_in_flight = min(-(-bytes_in_flight // stage_bytes), num_stages - 1, MAX_STAGES // 2)
            warps = NUM_SEGMENTS // cluster_size
            plan = Plan(cluster_size, rows, num_stages, stages_in_flight, warps, activation_in_registers=in_registers)
            if shared_memory_bytes(plan, intermediate_dim) <= limit:
                return plan
    return None


def _segment_vectors(intermediate_dim: int) -> int:
    return -(-(intermediate_dim // VECTOR_SIZE) // NUM_SEGMENTS)


def _slice_bytes(cluster_size: int, intermediate_dim: int) -> int:
    num_vectors = intermediate_dim // VECTOR_SIZE
    slice_vectors = _segment_vectors(intermediate_dim) * (NUM_SEGMENTS // cluster_size)
    return min(slice_vectors, num_vectors) * VECTOR_SIZE * BYTES_PER_ELEMENT


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
