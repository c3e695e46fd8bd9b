"""Plans: what is refused and in which words, and that every chosen plan fits its device."""

from __future__ import annotations

import ctypes
import dataclasses
import random

import pytest
from mlpdown.reference.order import num_segments
from structs import c_plan, problem_type

from mlpdown import heuristics, plan
from mlpdown.header import constant, plan_members
from mlpdown.heuristics import choose_plan
from mlpdown.jit import library
from mlpdown.plan import H200, RTX_5090, Device, Plan, check_plan

PYTHIA_SHAPES = [(512, 2048), (768, 3072), (1024, 4096), (2048, 8192), (2560, 10240), (4096, 16384), (5120, 20480)]
COMMON_SHAPES = [(4096, 11008), (4096, 14336), (3584, 18944)]
RAGGED_SHAPES = [
    (1, 8),
    (1, 32768),
    (7, 8),
    (3, 72),
    (129, 1032),
    (2561, 10248),
    (262144, 8),
    (262144, 32768),
    (50, 32760),
]
SHAPES = PYTHIA_SHAPES + COMMON_SHAPES + RAGGED_SHAPES

A100 = Device("NVIDIA A100", (8, 0), 108, 163 * 1024)
GOOD = Plan(cluster_size=4, rows_per_stage=4, num_stages=4, stages_in_flight=2, num_consumer_warps=8)
LENGTH = 8192  # of a row of 8 segments


@pytest.mark.parametrize("weight_prefetch", [False, True])
@pytest.mark.parametrize("device", [H200, RTX_5090], ids=lambda device: device.name)
@pytest.mark.parametrize(("hidden_dim", "intermediate_dim"), SHAPES)
def test_chosen_plan_fits(hidden_dim: int, intermediate_dim: int, device: Device, weight_prefetch: bool) -> None:
    chosen = choose_plan(hidden_dim, intermediate_dim, device, weight_prefetch=weight_prefetch)
    check_plan(chosen, intermediate_dim, device)
    if chosen.rows_in_registers:
        assert (chosen.rows_in_registers, chosen.vectors_in_flight) in plan.REGISTERS_KERNELS
    else:
        assert plan.instantiation(chosen, intermediate_dim) in plan.instantiations()
        # With one stage nothing is in flight while a stage is being summed.
        assert chosen.num_stages >= 2


def test_prefetch_takes_the_ring_where_it_is_faster() -> None:
    assert choose_plan(2560, 10240, H200, weight_prefetch=True).rows_in_registers == 0
    assert choose_plan(2560, 10240, H200).rows_in_registers > 0, "nothing may be read ahead"
    assert choose_plan(512, 2048, H200, weight_prefetch=True).rows_in_registers > 0, "over before a ring is set up"
    assert choose_plan(5120, 20480, H200, weight_prefetch=True).rows_in_registers > 0, (
        "its activation does not fit registers"
    )


@pytest.mark.parametrize("weight_prefetch", [False, True])
@pytest.mark.parametrize(("hidden_dim", "intermediate_dim"), SHAPES)
def test_gpus_without_rings_get_registers(hidden_dim: int, intermediate_dim: int, weight_prefetch: bool) -> None:
    chosen = choose_plan(hidden_dim, intermediate_dim, A100, weight_prefetch=weight_prefetch)
    assert chosen.rows_in_registers > 0 and chosen.weight_prefetch == weight_prefetch
    check_plan(chosen, intermediate_dim, A100)


def test_a_lane_has_its_vectors_under_way_in_the_fewest_rounds() -> None:
    most = max(vectors for _, vectors in plan.REGISTERS_KERNELS)
    for intermediate_dim in range(8, 40000, 8):
        vectors = plan.vectors_per_lane(intermediate_dim)
        chosen = choose_plan(4096, intermediate_dim, H200)
        assert -(-vectors // chosen.vectors_in_flight) == -(-vectors // most), intermediate_dim


def test_a_ring_is_refused_where_there_are_none() -> None:
    check_plan(GOOD, LENGTH, H200)
    words = r"^plan\.rows_in_registers must be one of \[1, 2\] on NVIDIA A100: the ring needs .* 9\.0 or newer, got 0 on 8\.0$"
    with pytest.raises(ValueError, match=words):
        check_plan(GOOD, LENGTH, A100)


def test_only_who_asks_gets_prefetch() -> None:
    for hidden_dim, intermediate_dim in SHAPES:
        assert choose_plan(hidden_dim, intermediate_dim, H200, weight_prefetch=True).weight_prefetch
        assert not choose_plan(hidden_dim, intermediate_dim, H200).weight_prefetch


def test_instantiations_are_every_pair_once_and_what_registers_hold() -> None:
    kernels = plan.instantiations()
    assert len(set(kernels)) == len(kernels)
    pairs = {(cluster_size, rows) for cluster_size, rows, vectors in kernels if vectors == 0}
    assert pairs == {(c, r) for c in plan.CLUSTER_SIZES for r in plan.ROWS_PER_STAGE}
    for rows, most in plan.VECTORS_IN_REGISTERS.items():
        assert {vectors for cluster_size, r, vectors in kernels if r == rows and vectors > 0} == set(range(1, most + 1))
    assert plan.CLUSTER_SIZES == (1, 2, 4, 8), "sizes that split 8 segments and that every GPU since Hopper takes"


def test_a_lane_has_every_32nd_vector_of_its_segment() -> None:
    for intermediate_dim in [*range(8, 9000, 8), 10240, 11008, 14336, 16376, 16384, 16392, 20480]:
        num_vectors = intermediate_dim // 8
        segments = 8 if num_vectors >= 1024 else 4 if num_vectors >= 512 else 2 if num_vectors >= 256 else 1
        longest = -(-num_vectors // segments)
        assert plan.vectors_per_lane(intermediate_dim) == max(len(range(lane, longest, 32)) for lane in range(32))


@pytest.mark.parametrize(
    ("field", "values", "words"),
    [
        ("cluster_size", [0, 3, 16, -1, 4.0, True, "4", None], r"one of \[1, 2, 4, 8\]"),
        ("rows_per_stage", [0, 3, 8, 1.0, False], r"one of \[1, 2, 4\]"),
        ("num_stages", [0, 17, -1, None], "1 to 16"),
        ("stages_in_flight", [0, 17, 1.0], "1 to 16"),
        ("num_consumer_warps", [0, 17, "8"], "1 to 16"),
        ("stagger_rows", [-1, 64, 1.0, True], "0 to 63"),
        ("vectors_in_flight", [-1, 8, 1.0], "0 to 7"),
        ("rows_in_registers", [3, -1, 8, 2.0], r"one of \[0, 1, 2\]"),
        ("weight_prefetch", [0, 1, None], r"one of \[False, True\]"),
        ("activation_in_registers", [1, "yes"], r"one of \[False, True\]"),
    ],
)
def test_wrong_values_name_what_is_allowed(field: str, values: list[object], words: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^plan\.{field} must be {words}, got {value!r}$"):
            dataclasses.replace(GOOD, **{field: value})


@pytest.mark.parametrize(
    ("intermediate_dim", "cluster_size", "possible"),
    [
        (8192, 8, True),
        (8184, 8, False),
        (8184, 4, True),
        (4096, 4, True),
        (4088, 4, False),
        (2048, 2, True),
        (2040, 2, False),
        (8, 1, True),
    ],
)
def test_a_cluster_has_at_most_a_cta_a_segment(intermediate_dim: int, cluster_size: int, possible: bool) -> None:
    candidate = Plan(cluster_size, 1, 2, 1, num_segments(intermediate_dim) // cluster_size or 1)
    if possible:
        check_plan(candidate, intermediate_dim, H200)
    else:
        words = (
            rf"^plan\.cluster_size must be at most {cluster_size // 2}, the segments of a row of {intermediate_dim}, "
            rf"got {cluster_size}$"
        )
        with pytest.raises(ValueError, match=words):
            check_plan(candidate, intermediate_dim, H200)


@pytest.mark.parametrize(
    ("num_stages", "num_consumer_warps", "possible"),
    [
        (4, 2, True),
        (4, 4, True),
        (4, 8, True),
        (8, 16, True),
        (3, 2, True),
        (4, 3, False),
        (3, 4, False),
        (3, 6, False),
        (4, 1, False),
    ],
)
def test_groups_of_warps_share_the_stages(num_stages: int, num_consumer_warps: int, possible: bool) -> None:
    """At a cluster size of 4 a group has two warps; as many groups as divide the stages, and the 16 slots for partial sums."""
    candidate = Plan(4, 1, num_stages, 1, num_consumer_warps)
    if possible:
        check_plan(candidate, LENGTH, H200)
    else:
        with pytest.raises(ValueError, match=r"^plan\.num_consumer_warps must be 2 .* times a divisor of num_stages"):
            check_plan(candidate, LENGTH, H200)


@pytest.mark.parametrize(
    ("warps", "intermediate_dim", "possible"),
    [(8, 8192, True), (4, 8192, False), (4, 4096, True), (2, 2048, True), (1, 2048, False), (1, 8, True)],
)
def test_registers_take_whole_rows_a_cta(warps: int, intermediate_dim: int, possible: bool) -> None:
    candidate = Plan.in_registers(1, num_consumer_warps=warps)
    if possible:
        check_plan(candidate, intermediate_dim, H200)
    else:
        segments = num_segments(intermediate_dim)
        with pytest.raises(
            ValueError, match=rf"^plan\.num_consumer_warps must be a multiple of {segments}, .* got {warps}$"
        ):
            check_plan(candidate, intermediate_dim, H200)


@pytest.mark.parametrize(
    ("cluster_size", "rows_per_stage", "intermediate_dim", "vectors", "most"),
    [
        (1, 1, 16384, 8, 8),
        (1, 1, 16392, 9, 8),
        (1, 2, 14336, 7, 7),
        (1, 2, 14344, 8, 7),
        (1, 4, 8, 1, 0),
        (2, 1, 8192, 4, 0),
    ],
)
def test_activation_in_registers_has_its_limits(
    cluster_size: int, rows_per_stage: int, intermediate_dim: int, vectors: int, most: int
) -> None:
    warps = num_segments(intermediate_dim) // cluster_size
    candidate = Plan(cluster_size, rows_per_stage, 2, 1, warps, activation_in_registers=True)
    if vectors <= most:
        check_plan(candidate, intermediate_dim, H200)
    else:
        words = (
            rf"^plan\.activation_in_registers holds {most} vectors a lane at cluster_size {cluster_size} and "
            rf"rows_per_stage {rows_per_stage}, got intermediate_dim {intermediate_dim}, which has {vectors}$"
        )
        with pytest.raises(ValueError, match=words):
            check_plan(candidate, intermediate_dim, H200)


def test_a_ring_has_no_vectors_in_flight() -> None:
    with pytest.raises(ValueError, match=r"^plan\.vectors_in_flight must be 0 without rows_in_registers, got 2$"):
        check_plan(dataclasses.replace(GOOD, vectors_in_flight=2), LENGTH, H200)


def test_no_more_stages_in_flight_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"^plan\.stages_in_flight must be at most num_stages 4, got 5$"):
        check_plan(dataclasses.replace(GOOD, stages_in_flight=5), LENGTH, H200)


@pytest.mark.parametrize(("hidden_dim", "intermediate_dim"), [(16384, 1024), (65536, 256), (8192, 2048), (2560, 10240)])
def test_short_rows_keep_as_much_under_way(hidden_dim: int, intermediate_dim: int) -> None:
    """As many stages as it takes, up to half of the longest ring; and one at least to be summed meanwhile."""
    chosen = choose_plan(hidden_dim, intermediate_dim, H200, weight_prefetch=True)
    stage_bytes = chosen.rows_per_stage * 2 * intermediate_dim
    wanted = heuristics.SHORT_ROWS_BYTES_IN_FLIGHT if num_segments(intermediate_dim) < 8 else heuristics.BYTES_IN_FLIGHT
    assert chosen.stages_in_flight * stage_bytes >= wanted or chosen.stages_in_flight == plan.MAX_STAGES // 2
    assert chosen.num_stages > chosen.stages_in_flight


def test_an_activation_in_registers_leaves_its_shared_memory_to_the_ring() -> None:
    chosen = choose_plan(2560, 10240, H200, weight_prefetch=True)
    assert chosen.activation_in_registers
    in_shared_memory = dataclasses.replace(chosen, activation_in_registers=False)
    difference = plan.shared_memory_bytes(in_shared_memory, 10240) - plan.shared_memory_bytes(chosen, 10240)
    assert difference == 10240 * 2


def test_only_prefetch_staggers_the_shares() -> None:
    for hidden_dim, intermediate_dim in SHAPES:
        assert choose_plan(hidden_dim, intermediate_dim, H200).stagger_rows == 0
    assert choose_plan(2560, 10240, H200, weight_prefetch=True).stagger_rows == 1
    assert choose_plan(4096, 11008, H200, weight_prefetch=True).stagger_rows == 0, (
        "many rows a CTA end at many times anyway"
    )
    assert choose_plan(792, 10240, H200, weight_prefetch=True).stagger_rows == 1
    assert choose_plan(791, 10240, H200, weight_prefetch=True).stagger_rows == 0, "a row of three is too much"


def test_plan_too_large_for_the_device_says_by_how_much() -> None:
    large = dataclasses.replace(GOOD, num_stages=8)
    check_plan(large, 10240, H200)
    needed = plan.shared_memory_bytes(large, 10240)
    with pytest.raises(
        ValueError, match=rf"needs {needed} bytes of shared memory .* RTX 5090 has {99 * 1024}: fewer stages"
    ):
        check_plan(large, 10240, RTX_5090)


@pytest.mark.parametrize(("rows", "vectors"), [(0, 4), (3, 4), (1, 3), (2, 5), (4, 4)])
def test_registers_hold_what_was_compiled_in(rows: int, vectors: int) -> None:
    with pytest.raises(
        ValueError, match=rf"^\(rows, vectors_in_flight\) must be one of \[.*\], got \({rows}, {vectors}\)$"
    ):
        Plan.in_registers(rows, vectors)


def test_members_are_those_of_the_c_structure() -> None:
    assert {field.name for field in dataclasses.fields(Plan)} == set(plan_members())
    assert sum(plan_members().values()) < 63, "a plan must fit the op's number"
    with pytest.raises(LookupError, match=r"native/geometry\.h has no constant kNothing"):
        constant("kNothing")


def test_shared_memory_is_what_the_kernel_lays_out() -> None:
    """One arithmetic in Python, to choose plans without a library, and one in C++: the same numbers."""
    native = ctypes.CDLL(str(library.load().path)).mlpdown_shared_memory_bytes
    native.restype = ctypes.c_uint

    def shared_memory_bytes(candidate: Plan, intermediate_dim: int) -> int:
        return int(native(intermediate_dim, ctypes.byref(c_plan(candidate))))

    generator = random.Random(0)
    compared = [0, 0]
    for _ in range(2000):
        candidate = Plan(
            cluster_size=generator.choice(plan.CLUSTER_SIZES),
            rows_per_stage=generator.choice(plan.ROWS_PER_STAGE),
            num_stages=generator.randint(1, plan.MAX_STAGES),
            stages_in_flight=1,
            num_consumer_warps=8,
            activation_in_registers=generator.choice([False, True]),
        )
        intermediate_dim = 8 * generator.choice([1, 2, 7, 8, 9, 129, 1280, generator.randint(1, 4096)])
        possible = candidate.cluster_size <= num_segments(intermediate_dim)
        if not possible or plan.instantiation(candidate, intermediate_dim) not in plan.instantiations():
            assert shared_memory_bytes(candidate, intermediate_dim) == 0, "not compiled in"
            continue
        expected = shared_memory_bytes(candidate, intermediate_dim)
        assert plan.shared_memory_bytes(candidate, intermediate_dim) == expected, (candidate, intermediate_dim)
        compared[candidate.activation_in_registers] += 1
    assert min(compared) > 100


RING = {
    "cluster_size": 1,
    "rows_per_stage": 1,
    "num_stages": 2,
    "stages_in_flight": 1,
    "num_consumer_warps": 8,
    "dependent_launch": 1,
}
REGISTERS = {"rows_in_registers": 1, "vectors_in_flight": 4, "num_consumer_warps": 8}


@pytest.mark.parametrize(
    ("intermediate_dim", "members", "words"),
    [
        (
            (1 << 24) - 8,
            {**RING, "rows_per_stage": 4, "num_stages": 16},
            b"more shared memory a block than any device has",
        ),
        (2**21, {**RING, "rows_per_stage": 4, "num_stages": 16}, b"more shared memory a block than any device has"),
        (8192, {**RING, "cluster_size": 3}, b"not compiled in"),
        (8192, {**RING, "cluster_size": 0}, b"not compiled in"),
        (8192, {**RING, "rows_per_stage": 3}, b"not compiled in"),
        (8192, {**RING, "cluster_size": 2, "activation_in_registers": 1}, b"not compiled in"),
        (16392, {**RING, "activation_in_registers": 1}, b"not compiled in"),
        (8192, {**REGISTERS, "rows_in_registers": 3}, b"not compiled in"),
        (8192, {**REGISTERS, "vectors_in_flight": 3}, b"not compiled in"),
        (8192, {**REGISTERS, "num_consumer_warps": 16}, b"a multiple of the number of segments, at most 8"),
        (8192, {**REGISTERS, "num_consumer_warps": 4}, b"a multiple of the number of segments, at most 8"),
        (8192, {**REGISTERS, "num_consumer_warps": 0}, b"a multiple of the number of segments, at most 8"),
        (
            8184,
            {**RING, "cluster_size": 8, "num_consumer_warps": 1},
            b"cluster_size must be at most the number of segments",
        ),
        (8192, {**RING, "num_stages": 17}, b"num_stages must be in 1..16"),
        (8192, {**RING, "stages_in_flight": 3}, b"stages_in_flight in 1..num_stages"),
        (8192, {**RING, "cluster_size": 8, "num_stages": 3, "num_consumer_warps": 2}, b"times a divisor of num_stages"),
        (8192, {**RING, "num_consumer_warps": 12}, b"times a divisor of num_stages"),
        (8188, RING, b"multiple of 8"),
    ],
)
def test_launcher_refuses_what_the_kernel_cannot_run(
    intermediate_dim: int, members: dict[str, int], words: bytes
) -> None:
    """The last gate, for callers of torch.ops and of the C interface. No tensor is touched, so none is needed."""
    native = ctypes.CDLL(str(library.load().path)).mlpdown_launch
    problem = problem_type()(hidden_dim=4, intermediate_dim=intermediate_dim)
    error = ctypes.create_string_buffer(512)
    c_members = type(c_plan(GOOD))(**members)
    status = native(ctypes.byref(problem), ctypes.byref(c_members), None, error, ctypes.c_size_t(len(error)))
    assert status == 1
    assert words in error.value
