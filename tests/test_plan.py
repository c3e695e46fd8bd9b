"""Plans: what is refused and in which words, and that every chosen plan fits its device."""

from __future__ import annotations

import ctypes
import dataclasses
import random
from pathlib import Path

import pytest

from mlpdown import plan
from mlpdown.bench import shapes as bench
from mlpdown.jit import library
from mlpdown.plan import H200, RTX_5090, Device, Plan, check_plan, choose_plan

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


@pytest.mark.parametrize("weight_prefetch", [False, True])
@pytest.mark.parametrize("device", [H200, RTX_5090], ids=lambda device: device.name)
@pytest.mark.parametrize(("hidden_dim", "intermediate_dim"), SHAPES)
def test_chosen_plan_fits(hidden_dim: int, intermediate_dim: int, device: Device, weight_prefetch: bool) -> None:
    chosen = choose_plan(hidden_dim, intermediate_dim, device, weight_prefetch=weight_prefetch)
    check_plan(chosen, intermediate_dim, device)
    assert plan.shared_memory_bytes(chosen, intermediate_dim) <= device.shared_memory_per_block
    if chosen.rows_in_registers:
        assert chosen.rows_in_registers in plan.ROWS_IN_REGISTERS
    else:
        assert plan.instantiation(chosen, intermediate_dim) in plan.instantiations()
        # With one stage nothing is in flight while a stage is being summed.
        assert chosen.num_stages >= 2


def test_large_weights_take_the_ring_and_small_ones_registers() -> None:
    assert choose_plan(2560, 10240, H200).rows_in_registers == 0
    assert choose_plan(512, 2048, H200).rows_in_registers > 0


@pytest.mark.parametrize("weight_prefetch", [False, True])
@pytest.mark.parametrize(("hidden_dim", "intermediate_dim"), SHAPES)
def test_gpus_without_rings_get_registers(hidden_dim: int, intermediate_dim: int, weight_prefetch: bool) -> None:
    chosen = choose_plan(hidden_dim, intermediate_dim, A100, weight_prefetch=weight_prefetch)
    assert chosen == Plan.in_registers(4, weight_prefetch=weight_prefetch)
    check_plan(chosen, intermediate_dim, A100)


def test_a_ring_is_refused_where_there_are_none() -> None:
    check_plan(GOOD, 1024, H200)
    words = r"^plan\.rows_in_registers must be one of \[1, 2, 4\] on NVIDIA A100: the ring needs .* 9\.0 or newer, got 0 on 8\.0$"
    with pytest.raises(ValueError, match=words):
        check_plan(GOOD, 1024, A100)


def test_only_who_asks_gets_prefetch() -> None:
    for hidden_dim, intermediate_dim in SHAPES:
        assert choose_plan(hidden_dim, intermediate_dim, H200, weight_prefetch=True).weight_prefetch
        assert not choose_plan(hidden_dim, intermediate_dim, H200).weight_prefetch


def test_rtx_5090_has_99_kilobytes_a_block() -> None:
    assert RTX_5090.shared_memory_per_block == 99 * 1024
    assert H200.shared_memory_per_block == 227 * 1024


def test_instantiations_are_every_pair_once_and_what_registers_hold() -> None:
    kernels = plan.instantiations()
    assert len(set(kernels)) == len(kernels)
    pairs = {(cluster_size, rows) for cluster_size, rows, vectors in kernels if vectors == 0}
    assert pairs == {(c, r) for c in plan.CLUSTER_SIZES for r in plan.ROWS_PER_STAGE}
    for rows, most in plan.VECTORS_IN_REGISTERS.items():
        assert {vectors for cluster_size, r, vectors in kernels if r == rows and vectors > 0} == set(range(1, most + 1))
    assert plan.CLUSTER_SIZES == (1, 2, 4, 8), "sizes that split 8 segments and that every GPU since Hopper takes"


def test_a_lane_has_every_32nd_vector_of_its_segment() -> None:
    for intermediate_dim in [*range(8, 5000, 8), 10240, 11008, 14336, 16376, 16384, 16392, 20480]:
        num_vectors = intermediate_dim // 8
        segment = -(-num_vectors // 8)
        assert plan.vectors_per_lane(intermediate_dim) == max(len(range(lane, segment, 32)) for lane in range(32))


@pytest.mark.parametrize(
    ("field", "values", "words"),
    [
        (
            "cluster_size",
            [0, 3, 16, -1, 4.0, True, "4", None],
            r"one of \[1, 2, 4, 8\] \(mlpdown\.plan\.CLUSTER_SIZES\)",
        ),
        ("rows_per_stage", [0, 3, 8, 1.0, False], r"one of \[1, 2, 4\] \(mlpdown\.plan\.ROWS_PER_STAGE\)"),
        ("num_stages", [0, 17, -1, None], "1 to 16"),
        ("stages_in_flight", [0, 17, 1.0], "1 to 16"),
        ("num_consumer_warps", [0, 17, "8"], "1 to 16"),
        ("stagger_rows", [-1, 64, 1.0, True], "0 to 63"),
        ("rows_in_registers", [3, -1, 8, 2.0], r"one of \[0, 1, 2, 4\] \(mlpdown\.plan\.ROWS_IN_REGISTERS\)"),
    ],
)
def test_wrong_values_name_what_is_allowed(field: str, values: list[object], words: str) -> None:
    check_plan(GOOD, 1024, H200)
    for value in values:
        with pytest.raises(ValueError, match=rf"^plan\.{field} must be {words}, got {value!r}$"):
            check_plan(dataclasses.replace(GOOD, **{field: value}), 1024, H200)


@pytest.mark.parametrize(
    ("num_stages", "num_consumer_warps", "possible"),
    [(4, 2, True), (4, 4, True), (4, 8, True), (8, 16, True), (3, 2, True), (4, 3, False), (3, 4, False), (3, 6, False), (4, 1, False)],
)
def test_groups_of_warps_share_out_the_stages(num_stages: int, num_consumer_warps: int, possible: bool) -> None:
    """At a cluster size of 4 a group has two warps; as many groups as divide the stages, and the 16 slots for partial sums."""
    candidate = Plan(4, 1, num_stages, 1, num_consumer_warps)
    if possible:
        check_plan(candidate, 1024, H200)
    else:
        with pytest.raises(ValueError, match=r"^plan\.num_consumer_warps must be 2 \(8 / cluster_size\) times a divisor of num_stages"):
            check_plan(candidate, 1024, H200)


@pytest.mark.parametrize(
    ("cluster_size", "rows_per_stage", "intermediate_dim", "possible"),
    [
        (1, 1, 16384, True),
        (1, 1, 16392, False),
        (1, 2, 8192, True),
        (1, 2, 8200, False),
        (1, 4, 8, False),
        (2, 1, 8, False),
    ],
)
def test_activation_in_registers_has_its_limits(cluster_size: int, rows_per_stage: int, intermediate_dim: int, possible: bool) -> None:
    candidate = Plan(cluster_size, rows_per_stage, 2, 1, 8, activation_in_registers=True)
    if possible:
        check_plan(candidate, intermediate_dim, H200)
    else:
        words = (
            r"^plan\.activation_in_registers needs cluster_size 1 and \(rows_per_stage 1, intermediate_dim up to 16384\) or .* 8192\), "
            rf"got cluster_size {cluster_size}, rows_per_stage {rows_per_stage} and intermediate_dim {intermediate_dim}$"
        )
        with pytest.raises(ValueError, match=words):
            check_plan(candidate, intermediate_dim, H200)
    with pytest.raises(ValueError, match=r"^plan\.activation_in_registers must be True or False, got 1$"):
        check_plan(dataclasses.replace(candidate, activation_in_registers=1), intermediate_dim, H200)  # type: ignore[arg-type]


def test_no_more_stages_in_flight_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"^plan\.stages_in_flight must be at most num_stages 4, got 5$"):
        check_plan(dataclasses.replace(GOOD, stages_in_flight=5), 1024, H200)


@pytest.mark.parametrize("weight_prefetch", [False, True])
@pytest.mark.parametrize("shape", [shape for shape in bench.SHAPES if shape.weight_bytes >= plan.SMALL_WEIGHT_BYTES], ids=str)
def test_chosen_plans_share_an_sm(shape: bench.Shape, weight_prefetch: bool) -> None:
    """Two CTAs at least, of the shared memory that an SM of an H200 has; tests/test_machine_code.py holds their registers to it."""
    chosen = choose_plan(shape.hidden_dim, shape.intermediate_dim, H200, weight_prefetch=weight_prefetch)
    reserved = plan.RESERVED_BYTES_PER_CTA
    available = H200.shared_memory_per_block + reserved
    assert 2 * (plan.shared_memory_bytes(chosen, shape.intermediate_dim) + reserved) <= available


@pytest.mark.parametrize("weight_prefetch", [False, True])
@pytest.mark.parametrize(("hidden_dim", "intermediate_dim"), [(16384, 1024), (65536, 256), (8192, 2048), (2560, 10240)])
def test_short_rows_keep_as_much_under_way(hidden_dim: int, intermediate_dim: int, weight_prefetch: bool) -> None:
    """As many stages as it takes, up to half of the longest ring; and one at least to be summed meanwhile."""
    chosen = choose_plan(hidden_dim, intermediate_dim, H200, weight_prefetch=weight_prefetch)
    stage_bytes = chosen.rows_per_stage * 2 * intermediate_dim // chosen.cluster_size
    wanted = plan.BYTES_IN_FLIGHT
    assert chosen.stages_in_flight * stage_bytes >= wanted or chosen.stages_in_flight == plan.MAX_STAGES // 2
    assert chosen.num_stages > chosen.stages_in_flight


def test_small_weights_prefetched_keep_half_as_much_under_way() -> None:
    for hidden_dim, in_flight in ((2048, 1), (4096, 2)):
        assert choose_plan(hidden_dim, 5632, H200, weight_prefetch=True).stages_in_flight == in_flight
        assert choose_plan(hidden_dim, 5632, H200).stages_in_flight == 2


def test_an_activation_in_registers_leaves_its_shared_memory_to_the_ring() -> None:
    chosen = choose_plan(2560, 10240, H200)
    assert chosen.activation_in_registers
    in_shared_memory = dataclasses.replace(chosen, activation_in_registers=False)
    difference = plan.shared_memory_bytes(in_shared_memory, 10240) - plan.shared_memory_bytes(chosen, 10240)
    assert difference == 10240 * 2


def test_only_prefetch_staggers_the_shares() -> None:
    for hidden_dim, intermediate_dim in SHAPES:
        assert choose_plan(hidden_dim, intermediate_dim, H200).stagger_rows == 0
    assert choose_plan(2560, 10240, H200, weight_prefetch=True).stagger_rows == 1
    assert choose_plan(4096, 11008, H200, weight_prefetch=True).stagger_rows == 0, "many rows a CTA end at many times anyway"
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


@pytest.mark.parametrize("rows", [0, 3, -1, 8])
def test_registers_hold_one_two_or_four_rows(rows: int) -> None:
    with pytest.raises(ValueError, match=rf"^rows must be one of \[1, 2, 4\], got {rows}$"):
        Plan.in_registers(rows)


def test_plans_are_values() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GOOD.cluster_size = 8  # type: ignore[misc]
    assert hash(GOOD) == hash(dataclasses.replace(GOOD))


def test_shared_memory_is_what_the_kernel_lays_out() -> None:
    """One arithmetic in Python, to choose plans without a library, and one in C++: the same numbers."""
    native = ctypes.CDLL(str(library.load().path)).mlpdown_shared_memory_bytes
    native.restype = ctypes.c_uint

    def shared_memory_bytes(candidate: Plan, intermediate_dim: int) -> int:
        return int(native(intermediate_dim, ctypes.byref(NativePlan(**dataclasses.asdict(candidate)))))

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
        if plan.instantiation(candidate, intermediate_dim) not in plan.instantiations():
            assert shared_memory_bytes(candidate, intermediate_dim) == 0, "not compiled in"
            continue
        expected = shared_memory_bytes(candidate, intermediate_dim)
        assert plan.shared_memory_bytes(candidate, intermediate_dim) == expected, (candidate, intermediate_dim)
        compared[candidate.activation_in_registers] += 1
    assert min(compared) > 100
    for wrong in (dataclasses.replace(GOOD, cluster_size=3), dataclasses.replace(GOOD, rows_per_stage=3)):
        assert shared_memory_bytes(wrong, 1024) == 0, "not compiled in"


class NativeProblem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hidden_states", "attn_output", "mlp_intermediate", "weight", "bias", "out")),
        *((name, ctypes.c_uint) for name in ("hidden_dim", "intermediate_dim")),
        *((name, ctypes.c_int) for name in ("is_bfloat16", "is_partial_sums")),
    ]


class NativePlan(ctypes.Structure):
    _fields_ = [
        ("rows_in_registers", ctypes.c_uint),
        ("cluster_size", ctypes.c_uint),
        ("rows_per_stage", ctypes.c_uint),
        ("num_stages", ctypes.c_uint),
        ("stages_in_flight", ctypes.c_uint),
        ("num_consumer_warps", ctypes.c_uint),
        ("weight_prefetch", ctypes.c_int),
        ("dependent_launch", ctypes.c_int),
        ("activation_in_registers", ctypes.c_int),
        ("stagger_rows", ctypes.c_uint),
    ]


def describe(chosen: Plan) -> str:
    """As native/NOTES.md writes it."""
    if chosen.rows_in_registers:
        return f"registers, {chosen.rows_in_registers} rows"
    words = [f"{chosen.rows_per_stage} x {chosen.num_stages}, {chosen.stages_in_flight} under way"]
    words += [f"cluster of {chosen.cluster_size}"] * (chosen.cluster_size > 1)
    words += ["activation shared"] * (not chosen.activation_in_registers) + ["staggered"] * (chosen.stagger_rows > 0)
    return ", ".join(words)


def test_notes_have_the_plan_of_every_shape() -> None:
    notes = (Path(__file__).parent.parent / "native" / "NOTES.md").read_text()
    columns = [(H200, False), (H200, True), (RTX_5090, False)]
    for shape in bench.SHAPES:
        plans = [
            choose_plan(shape.hidden_dim, shape.intermediate_dim, device, weight_prefetch=weight_prefetch)
            for device, weight_prefetch in columns
        ]
        assert f"\n| {shape} | {' | '.join(map(describe, plans))} | " in notes


@pytest.mark.parametrize(
    ("intermediate_dim", "native_plan", "words"),
    [
        ((1 << 24) - 8, (0, 1, 4, 16, 1, 8, 0, 1, 0, 0), b"more shared memory a block than any device has"),
        (2**21, (0, 1, 4, 16, 1, 8, 0, 1, 0, 0), b"more shared memory a block than any device has"),
        (2048, (0, 3, 1, 1, 1, 8, 0, 1, 0, 0), b"not compiled in"),
        (2048, (3, 1, 1, 1, 1, 8, 0, 1, 0, 0), b"not compiled in"),
        (2048, (0, 1, 3, 1, 1, 8, 0, 1, 0, 0), b"not compiled in"),
        (2048, (0, 2, 1, 2, 1, 4, 0, 1, 1, 0), b"not compiled in"),
        (16392, (0, 1, 1, 2, 1, 8, 0, 1, 1, 0), b"not compiled in"),
        (2048, (0, 1, 1, 17, 1, 8, 0, 1, 0, 0), b"num_stages must be in 1..16"),
        (2048, (0, 1, 1, 2, 3, 8, 0, 1, 0, 0), b"stages_in_flight in 1..num_stages"),
        (2048, (0, 8, 1, 3, 1, 2, 0, 1, 0, 0), b"times a divisor of num_stages"),
        (2048, (0, 1, 1, 1, 1, 12, 0, 1, 0, 0), b"times a divisor of num_stages"),
        (2044, (0, 1, 1, 1, 1, 8, 0, 1, 0, 0), b"multiple of 8"),
    ],
)
def test_launcher_refuses_what_the_kernel_cannot_run(
    intermediate_dim: int, native_plan: tuple[int, ...], words: bytes
) -> None:
    """The last gate, for callers of torch.ops and of the C interface. No tensor is touched, so none is needed."""
    native = ctypes.CDLL(str(library.load().path)).mlpdown_launch
    problem = NativeProblem(hidden_dim=4, intermediate_dim=intermediate_dim)
    error = ctypes.create_string_buffer(512)
    status = native(
        ctypes.byref(problem), ctypes.byref(NativePlan(*native_plan)), None, error, ctypes.c_size_t(len(error))
    )
    assert status == 1
    assert words in error.value
