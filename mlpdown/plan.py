"""The plan: everything that decides how fast the native kernel runs, and nothing that decides what it computes.

There are two kernels, of one arithmetic: the ring (``native/mlp_down.cuh``) and registers (``native/mlp_down_registers.cuh``). The values
that they need at compile time are listed once, in :data:`CLUSTER_SIZES`, :data:`ROWS_PER_WARP` and :data:`ROWS_IN_REGISTERS`; the build
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
ROWS_PER_WARP = (1, 2, 4)
ROWS_IN_REGISTERS = (1, 2, 4)
MAX_ROWS_PER_STAGE = 32
MAX_STAGES = 16
MAX_CONSUMER_WARPS = 16

# Registers won at 8 MB and lost at 33 MB; between these nothing was timed.
SMALL_WEIGHT_BYTES = 16 * 2**20
# A stage of four rows must not be larger; by whether the ring is filled ahead of the wait (many small stages) or not (few large ones).
MAX_STAGE_BYTES = {True: 64 * 2**10, False: 88 * 2**10}

_LISTS = {"cluster_size": "CLUSTER_SIZES", "rows_per_warp": "ROWS_PER_WARP", "rows_in_registers": "ROWS_IN_REGISTERS"}
_BARRIER_BYTES = 8
_NUM_PARTIAL_SLOTS = 16


def instantiations() -> list[tuple[int, int]]:
    """``(cluster_size, rows_per_warp)`` of every ring kernel that the build compiles, for each dtype."""
    return list(itertools.product(CLUSTER_SIZES, ROWS_PER_WARP))


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

    A stage of the ring holds ``rows_per_stage`` rows of a CTA's slice of the reduction axis. Each consumer warp takes ``rows_per_warp``
    of them and one of the CTA's ``8 / cluster_size`` segments at a time.
    """

    cluster_size: int
    """CTAs that split the reduction axis: 1, 2, 4 or 8."""
    rows_per_warp: int
    """Rows that a warp sums at once, sharing each activation it loads: 1, 2 or 4."""
    rows_per_stage: int
    """Rows of weights in a stage, 1 to 32."""
    num_stages: int
    """Stages of the ring, 1 to 16."""
    num_consumer_warps: int
    """Warps that sum, 1 to 16, beside the producer and the epilogue warp. A tile has ``ceil(rows_per_stage / rows_per_warp) * 8 /
    cluster_size`` items of work; more warps than that share out several tiles at once, whose number must divide ``num_stages``."""
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
        return cls(1, 1, 1, 1, 1, weight_prefetch, dependent_launch, rows)


def shared_memory_bytes(plan: Plan, intermediate_dim: int) -> int:
    """Shared memory of one CTA: the ring's as ``native/shared_layout.h`` lays it out, or the sums alone."""
    if plan.rows_in_registers:
        return plan.rows_in_registers * NUM_SEGMENTS * 4
    slice_bytes = _slice_bytes(plan.cluster_size, intermediate_dim)
    owned_rows_per_slot = -(-plan.rows_per_stage // plan.cluster_size)
    num_barriers = 2 * plan.num_stages + 2 * _NUM_PARTIAL_SLOTS + 1
    partials = _align(num_barriers * _BARRIER_BYTES, 16)
    activation = _align(partials + _NUM_PARTIAL_SLOTS * owned_rows_per_slot * NUM_SEGMENTS * 4, 128)
    ring = _align(activation + slice_bytes, 128)
    return ring + plan.num_stages * plan.rows_per_stage * slice_bytes


def check_plan(plan: Plan, intermediate_dim: int, device: Device) -> None:
    """Raise ValueError, naming the member and what it may be, unless the kernel can run ``plan`` on ``device``."""
    allowed = {
        "cluster_size": CLUSTER_SIZES,
        "rows_per_warp": ROWS_PER_WARP,
        "rows_per_stage": range(1, MAX_ROWS_PER_STAGE + 1),
        "num_stages": range(1, MAX_STAGES + 1),
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
    if not _warps_share_out_tiles(plan):
        raise ValueError(
            f"plan.num_consumer_warps must be at most the {_items_per_tile(plan)} items of a tile "
            f"(rows_per_stage / rows_per_warp rounded up, times 8 / cluster_size), or a multiple of them that divides num_stages "
            f"{plan.num_stages}, got {plan.num_consumer_warps}"
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

    A small weight is over before a ring is set up: registers. For the others the ring, with as many rows in flight for each warp as make a
    stage of the right size, in the smallest cluster in which two stages fit: CTAs that need nothing of each other start and end sooner.
    """
    row_bytes = intermediate_dim * BYTES_PER_ELEMENT
    if hidden_dim * row_bytes <= SMALL_WEIGHT_BYTES:
        return Plan.in_registers(4, weight_prefetch=weight_prefetch)
    max_stage_bytes = MAX_STAGE_BYTES[weight_prefetch]
    fewest_rows_last = [rows for rows in reversed(ROWS_PER_WARP) if rows <= 2 or rows * row_bytes <= max_stage_bytes]
    for rows, cluster_size in itertools.product(fewest_rows_last, CLUSTER_SIZES):
        # Every consumer warp has one item of each tile: cluster_size row groups of 8 / cluster_size segments.
        plan = Plan(cluster_size, rows, rows * cluster_size, 2, NUM_SEGMENTS, weight_prefetch)
        if shared_memory_bytes(plan, intermediate_dim) <= device.shared_memory_per_block:
            return _fill_shared_memory(plan, intermediate_dim, device)
    # Two stages of a single row do not fit: registers, which need no shared memory for weights.
    return Plan.in_registers(1, weight_prefetch=weight_prefetch)


def _fill_shared_memory(plan: Plan, intermediate_dim: int, device: Device) -> Plan:
    """The plan with as many stages as the device's shared memory holds."""
    plans = (dataclasses.replace(plan, num_stages=num_stages) for num_stages in range(MAX_STAGES, 0, -1))
    return next(plan for plan in plans if shared_memory_bytes(plan, intermediate_dim) <= device.shared_memory_per_block)


def _items_per_tile(plan: Plan) -> int:
    return -(-plan.rows_per_stage // plan.rows_per_warp) * (NUM_SEGMENTS // plan.cluster_size)


def _warps_share_out_tiles(plan: Plan) -> bool:
    """Whether the consumer warps find work in one tile, or share out several whole ones that lie together in the ring."""
    items_per_tile = _items_per_tile(plan)
    tiles_at_once = -(-plan.num_consumer_warps // items_per_tile)
    return tiles_at_once == 1 or not (
        plan.num_consumer_warps % items_per_tile
        or plan.num_stages % tiles_at_once
        or _NUM_PARTIAL_SLOTS % tiles_at_once
    )


def _slice_bytes(cluster_size: int, intermediate_dim: int) -> int:
    num_vectors = intermediate_dim // VECTOR_SIZE
    slice_vectors = -(-num_vectors // NUM_SEGMENTS) * (NUM_SEGMENTS // cluster_size)
    return min(slice_vectors, num_vectors) * VECTOR_SIZE * BYTES_PER_ELEMENT


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
