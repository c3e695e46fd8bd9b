"""Which plan a shape gets on a device. Every threshold was measured on an H100 (``native/NOTES.md`` has the figures);
no other GPU was tuned for."""

from __future__ import annotations

import functools

from .plan import (
    BYTES_PER_ELEMENT,
    MAX_STAGES,
    REGISTERS_KERNELS,
    RING_COMPUTE_CAPABILITY,
    VECTORS_IN_REGISTERS,
    Device,
    Plan,
    shared_memory_bytes,
    vectors_per_lane,
)
from .reference.order import MAX_SEGMENTS, num_segments

# Prefetching, the ring holds more bytes ahead of the wait. Smaller weights are over before it is set up. Larger ones,
# if rows are short, start so many CTAs that the registers kernel is as good.
SMALL_PREFETCHED_BYTES = 8 * 2**20
LARGE_PREFETCHED_BYTES = 200 * 2**20

# Warps of a CTA that loads weights into registers. Of a large weight few, so that another CTA takes its place soon.
SMALL_WEIGHT_BYTES = 16 * 2**20
MIN_REGISTERS_WARPS = 4
# Vectors of a row that a lane of a larger weight has registers for, at least: with more than the 4 that many rows have,
# fewer CTAs share an SM, and a chain was up to 3 % faster.
MIN_VECTORS_IN_FLIGHT = 5

# CTAs of the ring that share an SM: while one starts, ends or sums, memory works for the other. For each of them the
# device keeps this much of an SM's shared memory.
CTAS_PER_SM = 2
RESERVED_BYTES_PER_CTA = 2**10
# Under way for each CTA: enough to keep memory busy. More only makes all that is asked for later.
BYTES_IN_FLIGHT = 32 * 2**10
SHORT_ROWS_BYTES_IN_FLIGHT = 24 * 2**10
FEW_ROWS_BYTES_IN_FLIGHT = 16 * 2**10
FEW_ROWS_PER_CTA = 6
# Two rows a stage while they are no larger than this.
MAX_BYTES_OF_TWO_ROWS = 24 * 2**10
# Warps that sum short rows: 2 groups where a row has 2 segments, 1 where it has 4.
SHORT_ROWS_WARPS = 4
# Each CTA of the first half of the grid takes a few rows less than an even share, the other half the rest: then the two
# CTAs of an SM do not end together. (Fewest and most rows of an even share, rows less), for rows of 8 segments and for
# shorter ones.
STAGGERS = ((3, 12, 1),)
SHORT_ROWS_STAGGERS = ((6, 14, 4), (14, 48, 1))


@functools.lru_cache(maxsize=1024)
def choose_plan(hidden_dim: int, intermediate_dim: int, device: Device, *, weight_prefetch: bool = False) -> Plan:
    """The plan for a shape on a device.

    Weights go into registers where nothing may be read ahead, which is also all that GPUs without rings have. With
    ``weight_prefetch`` they go through the ring, if two CTAs of two stages each fit on an SM and the activation fits
    into their registers, and the weight is neither very small nor very large.
    """
    weight_bytes = hidden_dim * intermediate_dim * BYTES_PER_ELEMENT
    is_short = num_segments(intermediate_dim) < MAX_SEGMENTS
    may_ring = weight_prefetch and device.compute_capability >= RING_COMPUTE_CAPABILITY
    is_large = is_short and weight_bytes >= LARGE_PREFETCHED_BYTES
    if may_ring and weight_bytes >= SMALL_PREFETCHED_BYTES and not is_large:
        ring = _ring(hidden_dim, intermediate_dim, device)
        if ring is not None:
            return ring
    return _registers(intermediate_dim, weight_bytes, weight_prefetch)


def _registers(intermediate_dim: int, weight_bytes: int, weight_prefetch: bool) -> Plan:
    """All vectors of a lane under way at once, or in rounds of as many."""
    vectors, segments = vectors_per_lane(intermediate_dim), num_segments(intermediate_dim)
    if weight_prefetch and weight_bytes < SMALL_PREFETCHED_BYTES and (2, vectors) in REGISTERS_KERNELS:
        return Plan.in_registers(2, vectors, weight_prefetch=True)
    possible = [in_flight for rows, in_flight in REGISTERS_KERNELS if rows == 1]
    is_small = weight_bytes < SMALL_WEIGHT_BYTES
    num_rounds = -(-vectors // max(possible))
    fewest = MIN_VECTORS_IN_FLIGHT if num_rounds == 1 and not is_small else min(possible)
    in_flight = max(fewest, -(-vectors // num_rounds))
    warps = MAX_SEGMENTS if is_small else max(MIN_REGISTERS_WARPS, segments)
    return Plan.in_registers(1, in_flight, num_consumer_warps=warps, weight_prefetch=weight_prefetch)


def _ring(hidden_dim: int, intermediate_dim: int, device: Device) -> Plan | None:
    """As many stages as fit, at least two; None if they do not, or if the activation does not fit registers."""
    vectors, segments = vectors_per_lane(intermediate_dim), num_segments(intermediate_dim)
    is_short = segments < MAX_SEGMENTS
    row_bytes = intermediate_dim * BYTES_PER_ELEMENT
    rows = 2 if 2 * row_bytes <= MAX_BYTES_OF_TWO_ROWS and vectors <= VECTORS_IN_REGISTERS[2] else 1
    if vectors > VECTORS_IN_REGISTERS[rows]:
        return None
    rows_per_cta = hidden_dim / (CTAS_PER_SM * device.num_sms)
    warps = max(segments, SHORT_ROWS_WARPS)
    num_groups = warps // segments
    bytes_in_flight = SHORT_ROWS_BYTES_IN_FLIGHT if is_short else BYTES_IN_FLIGHT
    if is_short and rows_per_cta < FEW_ROWS_PER_CTA:
        bytes_in_flight = FEW_ROWS_BYTES_IN_FLIGHT
    limit = (device.shared_memory_per_block + RESERVED_BYTES_PER_CTA) // CTAS_PER_SM - RESERVED_BYTES_PER_CTA
    for num_stages in range(MAX_STAGES, 1, -1):
        # What is not in flight is being summed: one stage at the least, and half of the longest ring.
        stages_in_flight = min(-(-bytes_in_flight // (rows * row_bytes)), num_stages - 1, MAX_STAGES // 2)
        # A ring that is not long enough to run ahead of the other half gains nothing from unequal shares.
        staggers = SHORT_ROWS_STAGGERS if is_short else STAGGERS if num_stages > 2 * stages_in_flight else ()
        plan = Plan(
            1,
            rows,
            num_stages,
            stages_in_flight,
            warps,
            weight_prefetch=True,
            activation_in_registers=True,
            stagger_rows=next((less for fewest, most, less in staggers if fewest <= rows_per_cta <= most), 0),
        )
        if num_stages % num_groups == 0 and shared_memory_bytes(plan, intermediate_dim) <= limit:
            return plan
    return None
