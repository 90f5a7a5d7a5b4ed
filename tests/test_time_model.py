"""Sampled traffic and the time of layers, against arithmetic by hand."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from synthetic import write_trace

from mxmoe_steps.allocation.blocks import Blocks
from mxmoe_steps.allocation.times import layer_times
from mxmoe_steps.errors import UserError
from mxmoe_steps.gating import Gating
from mxmoe_steps.kernels.architectures import BUILT, DEFAULT, PHASES
from mxmoe_steps.kernels.formats import FORMATS
from mxmoe_steps.kernels.plan import plan_layer
from mxmoe_steps.schemes import SHARED, parse_scheme
from mxmoe_steps.timing.layer import cut_shared, step_phases
from mxmoe_steps.timing.model import tile_counts
from mxmoe_steps.timing.predict import block_times, mean_layer_us
from mxmoe_steps.timing.profile import Profile, timing_schemes
from mxmoe_steps.timing.shapes import MODELS, by_warp
from mxmoe_steps.timing.traffic import Traffic, sample_positions, sample_traffic

W4, W8 = parse_scheme("w4a16"), parse_scheme("w8a8")


def gpu(**changes) -> Profile:
    tiles = {W4: np.array([[16, 1.0, 0.1], [64, 2.0, 0.2]]), W8: np.array([[16, 1.0, 0.05]])}
    given = {"sms": 4, "bandwidth_gbs": 100.0, "activation_gbs": 80.0, "launch_us": 5.0, "loop_launch_us": 0.5,
             "loop_tile_us": 0.25, "tail": 0.75, "exposed": 0.125, "estimate": True, "device": "toy",
             **changes}  # fmt: skip
    by_scheme = given.pop("tiles", tiles)
    return Profile(tiles={(phase, s): cells for phase in PHASES for s, cells in by_scheme.items()}, **given)


def layer_of_two_experts() -> Blocks:
    """Experts 0 and 1 and a shared expert; hidden 256, width 128 (shared 256)."""
    layer, expert, kind, out, inner = [], [], [], [], []
    for name, width in ((-1, 256), (0, 128), (1, 128)):
        for k in range(3):
            layer.append(0)
            expert.append(name)
            kind.append(k)
            out.append(256 if k == 2 else width)
            inner.append(width if k == 2 else 256)
    return Blocks(*(np.array(part) for part in (layer, expert, kind, out, inner)))


def test_times_by_hand():
    blocks = layer_of_two_experts()
    rows = np.array([[[70, 0], [20, 20]]])  # two steps
    traffic = Traffic((0,), 40, rows, np.full(rows.shape, 0.5))
    times = block_times(blocks, [W4, W8], traffic, gpu())
    assert times.sides[0] is times.sides[1]
    assert [times.loops(0, np.array(carried)) for carried in ([True, False], [False, True], [True, True])] == [2, 1, 3]
    sides = times.sides[1]
    # Expert 0, gate [128, 256], w4: 70 rows are a 64-tile of 2 + 2 x 0.2 and a 16-tile of 1 + 2 x 0.1; 20 rows are one
    # 64-tile. Every loop of another scheme adds 0.25 to a tile.
    gate = 3
    assert sides.compute[gate, 0] == pytest.approx(((2.4 + 1.2) + 2.4) / 2 / 4)
    assert sides.more_compute[gate, 0] == pytest.approx((0.5 + 0.25) / 2 / 4)
    assert sides.longest[gate, 0] == pytest.approx(0.75 * 2.4)
    assert sides.more_longest[gate, 0] == pytest.approx(0.75 * 0.25)
    # Expert 1: idle in step one; its bytes count half.
    weights = 128 * 256 * 4.25 / 8
    moved = 0.5 * weights / 1e5 + 10 * (256 * 2 + 128 * 2) / 8e4
    assert sides.memory[6, 0] == pytest.approx(moved + 0.125 * sides.compute[6, 0])
    assert sides.more_memory[6, 0] == pytest.approx(0.125 * sides.more_compute[6, 0])
    # The shared expert sees all 40 tokens: three 16-tiles. Its width is two experts: gate and up are two pieces of
    # [128, 256], down two of [256, 128] with two strips of 128 rows each.
    assert sides.compute[0, 1] == pytest.approx(3 * 2 * (1 + 2 * 0.05) / 4)
    assert sides.compute[2, 1] == pytest.approx(3 * 2 * 2 * (1 + 0.05) / 4)
    # SwiGLU of its 40 tokens reads gate and up of 256 features and writes 2 bytes or 1; quantizing reads and writes 3.
    assert times.swiglu_us[2].tolist() == [pytest.approx(40 * 256 * each / 1e5) for each in (6, 5)]
    assert times.quantize_us[2].tolist() == [0.0, pytest.approx(40 * 256 * 3 / 1e5)]
    assert not times.swiglu_us[[0, 1]].any()


@pytest.mark.parametrize("choice", list(itertools.product((0, 1), repeat=6)))
def test_a_launch_runs_the_kernel_of_what_it_carries(choice):
    """Gate and up of the shared expert vary, and gate, up and down of another; the third takes w4."""
    blocks, rows = layer_of_two_experts(), np.array([[[70, 0], [20, 20]]])
    times = block_times(blocks, [W4, W8], Traffic((0,), 40, rows, np.full(rows.shape, 0.5)), gpu())
    taken = np.array([*choice, 0, 0, 0])
    total = 0.0
    for members in ([0, 1, 3, 4, 6, 7], [2, 5, 8]):
        carried = set(taken[members].tolist())
        loops = sum({0: 2, 1: 1}[scheme] for scheme in carried)
        sides, compute, longest, memory = times.sides[0], 0.0, 0.0, 0.0
        for member in members:
            at = (member, taken[member])
            more = loops - {0: 2, 1: 1}[taken[member]]
            compute += sides.compute[at] + more * sides.more_compute[at]
            longest = max(longest, sides.longest[at] + more * sides.more_longest[at])
            memory += sides.memory[at] + more * sides.more_memory[at]
        total += 5 + 0.5 * loops + max(compute + longest, memory)
    if choice[0] != choice[1] or choice[3] != choice[4]:
        total += 5 + sum(times.swiglu_us[down, taken[down]] for down in (2, 5, 8))
    elif choice[2] or choice[5]:
        total += 5 + sum(times.quantize_us[down, taken[down]] for down in (2, 5))
    assert layer_times(blocks, times, taken) == {0: pytest.approx(total)}


def test_experts_that_are_no_swiglu_have_their_launch_however_gate_and_up_are_tied():
    """40 + 40 expected rows of 128 features, and two slices of 40 tokens."""
    blocks = layer_of_two_experts()
    rows = np.array([[[60, 20], [20, 60]]])
    traffic = Traffic((0,), 40, rows, np.full(rows.shape, 0.5))
    features = (40 + 40 + 2 * 40) * 128
    plain = block_times(blocks, [W4, W8], traffic, gpu())
    for gating, sums in ((Gating("gelu"), 4), (Gating("relu2", gated=False), 2)):
        times = block_times(blocks, [W4, W8], replace(traffic, gating=gating), gpu())
        for scheme, product in ((0, 2), (1, 1)):
            choice = np.full(len(blocks), scheme)
            between = 5.0 + features * (sums + product) / 1e5
            tied = 0.0 if scheme == 0 else 5.0 + features * (2 + product) / 1e5
            found, other = layer_times(blocks, times, choice), layer_times(blocks, plain, choice)
            assert found[0] - other[0] == pytest.approx(between - tied)
            if gating.gated:
                continue
            of = blocks.kind > 0  # no gate blocks
            assert layer_times(blocks[of], times.of(of), choice[of])[0] > between


def test_widths_that_kernels_fill_up_are_timed_so():
    blocks = layer_of_two_experts()
    odd, filled = (
        replace(
            blocks,
            out_features=np.where((blocks.kind < 2) & (blocks.expert != SHARED), width, 256),
            in_features=np.where((blocks.kind == 2) & (blocks.expert != SHARED), width, 256),
        )
        for width in (352, 384)
    )
    traffic = Traffic((0,), 40, np.array([[[60, 20]]]), np.ones((1, 1, 2)))
    one, other = (block_times(each, [W4], traffic, gpu()) for each in (odd, filled))
    for side, same in zip(one.sides, other.sides, strict=True):
        assert (side.compute == same.compute).all()
        assert (side.memory == same.memory).all()


def test_gate_up_and_down_may_run_kernels_of_different_phases():
    blocks = layer_of_two_experts()
    rows = np.array([[[1, 1]]])
    traffic = Traffic((0,), 1, rows, np.ones(rows.shape))
    # Experts 0 and 1 and two slices: gate+up are 4 x 4 strips of 64 rows on 11 multiprocessors, down 4 x 4 as well
    assert step_phases(blocks, traffic, [W8], 11, DEFAULT) == ("decode", "decode")
    assert step_phases(blocks, traffic, [W8], 16, DEFAULT) == ("latency", "latency")
    one = block_times(blocks, [W4, W8], traffic, replace(gpu(), sms=11))  # by warp there is no second round
    assert one.sides[0] is not one.sides[1]
    assert [one.phase(np.array(carried)) for carried in ([True, False], [False, True], [True, True])] == [0, 1, 1]
    wide = replace(blocks, out_features=np.where(blocks.kind < 2, blocks.out_features, 512))
    assert step_phases(wide, traffic, [W8], 16, DEFAULT) == ("latency", "latency")  # down: 32 strips are two rounds
    assert step_phases(wide, traffic, [W8], 22, DEFAULT) == ("latency", "decode")
    one_tile = {
        (phase, W8): np.array([[8.0, us, 0.0]]) for phase, us in (("latency", 1), ("decode", 3), ("prefill", 9))
    }
    profile = replace(gpu(), sms=22, tiles=one_tile)
    times = block_times(wide, [W8], traffic, profile)
    assert times.sides[1].compute[3:6, 0].tolist() == [pytest.approx(each) for each in (2 / 22, 2 / 22, 4 * 3 / 22)]
    assert profile.common_tiles(("latency", "decode"), [W8]) == [8]
    with pytest.raises(UserError, match="latency and decode kernels of these schemes have no token tile in common"):
        replace(profile, tiles=one_tile | {("decode", W8): np.array([[16, 1, 1]])}).common_tiles(
            ("latency", "decode"), [W8]
        )


@pytest.mark.parametrize("rows", range(0, 700, 7))
def test_rows_are_cut_as_the_kernels_cut_them(rows):
    sizes = np.array([16.0, 32, 48, 64, 128])
    left, expected = rows, [0] * 5
    while left > 0:
        size = next((i for i, size in enumerate(sizes) if size >= left), 4)
        expected[size] += 1
        left -= int(sizes[size])
    assert tile_counts(np.array([[rows]]), sizes)[0, 0].tolist() == expected


def test_a_prediction_counts_the_kernel_that_the_allocation_names():
    blocks, rows = layer_of_two_experts(), np.array([[[40, 0], [20, 20]]])
    traffic = Traffic((0,), 40, rows, np.full(rows.shape, 0.5))

    def predicted(scheme: str, timed_as: dict[str, str]) -> float:
        assignment = [[0, expert, *[scheme] * 3] for expert in (-1, 0, 1)]
        return mean_layer_us({"assignment": assignment, "timed_as": timed_as}, blocks, traffic, gpu())

    assert predicted("w4a4", {"w4a4": "w8a8"}) == predicted("w8a8", {})
    with pytest.raises(UserError, match="w4a4"):
        predicted("w4a4", {})


def test_narrow_memory_is_the_floor():
    blocks = layer_of_two_experts()
    rows = np.full((1, 1, 2), 20)
    traffic = Traffic((0,), 20, rows, np.ones(rows.shape))
    times = block_times(blocks, [W4], traffic, gpu(bandwidth_gbs=1e-3))
    choice = np.zeros(9, int)
    assert layer_times(blocks, times, choice)[0] == pytest.approx(12 + times.sides[0].memory.sum())


def test_one_bit_runs_as_two_bit_and_unknown_kernels_are_refused():
    one, two = parse_scheme("w1a16"), parse_scheme("w2a16")
    profile = gpu(tiles={two: np.array([[16, 1.0, 0.1]])})
    assert timing_schemes((one, two), profile, {}) == [two, two]
    with pytest.raises(UserError, match="--time-as"):
        timing_schemes((parse_scheme("w4a4"),), profile, {})
    assert timing_schemes((parse_scheme("w4a4"),), profile, {parse_scheme("w4a4"): two}) == [two]


def test_decode_takes_single_tokens_and_prefill_windows():
    generator = np.random.default_rng(0)
    decode = sample_positions("decode", 10, 8, 32, generator)
    assert len(set(decode.tolist())) == 10
    prefill = sample_positions("prefill", 80, 8, 32, generator)
    assert len(prefill) == 80
    windows = np.split(prefill, [32, 64])
    assert all((np.diff(window) == 1).all() for window in windows)
    assert len(sample_positions("decode", 1000, 8, 32, generator)) == 1000  # longer than the trace
    assert len(sample_positions("prefill", 1000, 8, 32, generator)) == 1000


def test_sampled_traffic(tmp_path):
    folder = write_trace(tmp_path / "trace", layers=2, experts=32, top_k=2, texts=("prose", "code"))
    traffic = sample_traffic(folder, [], 16, steps=4)
    again = sample_traffic(folder, [], 16, steps=4)
    assert (traffic.rows == again.rows).all()
    expected = (traffic.rows * traffic.weight).sum((1, 2))
    assert (expected >= 16 * 2).all()
    assert (expected <= 16 * 2 + 32 * 0.25).all()  # unreached experts add less than one row per step
    assert ((traffic.rows * traffic.weight).sum(1) > 0).all()  # no expert is free
    assert sample_traffic(folder, ["code"], 16, steps=4).rows.sum() > 0
    with pytest.raises(UserError, match="it has code, prose"):
        sample_traffic(folder, ["poems"], 16)
    with pytest.raises(UserError, match="at least 1"):
        sample_traffic(folder, [], 0)


def test_other_models_are_refused(tmp_path):
    blocks = layer_of_two_experts()
    rows = np.ones((1, 1, 1), int)
    with pytest.raises(UserError, match="different models"):
        block_times(blocks, [W4], Traffic((0,), 4, rows, rows / 1), gpu())
    with pytest.raises(UserError, match="no layer 0"):
        block_times(blocks, [W4], Traffic((3,), 4, rows, rows / 1), gpu())


def test_schemes_and_formats_agree_on_how_split_tiles_multiply() -> None:
    formats = [format_ for format_ in FORMATS if format_.operand in DEFAULT.operands]
    for one in formats:
        for other in formats:
            assert by_warp(parse_scheme(each.name) for each in (one, other)) == DEFAULT.by_warp((one, other))


@pytest.mark.parametrize("shape", MODELS, ids=[one.model for one in MODELS])
@pytest.mark.parametrize("scheme", [W4, W8])
def test_launches_are_those_that_a_layer_plans(shape, scheme) -> None:
    wide = shape.slices * shape.intermediate
    experts = [*([SHARED] if shape.slices else []), *range(shape.experts)]
    plan = plan_layer(dict.fromkeys(experts, (scheme,) * 3), shape.hidden, shape.intermediate, wide)
    assert plan.slices == shape.slices
    expert, kind = (each.ravel() for each in np.meshgrid(experts, np.arange(3), indexing="ij"))
    width = np.where(expert == SHARED, wide, shape.intermediate)
    out, inner = np.where(kind == 2, shape.hidden, width), np.where(kind == 2, width, shape.hidden)
    blocks = Blocks(np.zeros(len(expert), np.int64), expert, kind, out, inner)
    slices, *size = cut_shared(blocks)
    assert slices.tolist() == np.where(expert == SHARED, max(shape.slices, 1), 1).tolist()
    assert {tuple(one) for one in np.stack(size, 1)[kind < 2].tolist()} == {shape.size("gate_up")}
    for tokens in (1, 4, 16, 100, 8192):
        routed = np.zeros((1, 1, shape.experts), np.int64)
        routed[0, 0, 0] = tokens * shape.top_k
        traffic = Traffic((0,), tokens, routed, np.ones(routed.shape))
        rows = tokens * shape.top_k
        for of in BUILT:
            planned = [
                of.phase_for(rows, plan.experts, plan.slices, one.strips, 132, of.by_warp(one.formats))
                for one in (plan.gate_up, plan.down)
            ]
            shaped = [shape.launch(b).phase(rows, 132, [scheme], of) for b in ("gate_up", "down")]
            assert planned == shaped == [*step_phases(blocks, traffic, [scheme], 132, of)]
