"""The Triton scan against the float64 oracle: on the GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from comparison import gradients, relative_error
from devices import DEVICE
from scan_cases import (
    BOUNDS,
    CASES,
    EXTREME_STEPS,
    SOFTPLUS_ARGUMENTS,
    assert_finite_at_step,
    assert_last_state_matches_torch,
    assert_matches_oracle,
    assert_softplus_is_right,
    make_inputs,
    oracle,
)

from vim2.ops import BIDIRECTIONAL, CROSS_SCAN, FORWARD, selective_scan, selective_scan_fn

pytest.importorskip("triton")
from vim2.ops.scan.chunks import TRITON_CHUNK
from vim2.ops.scan.triton import backward, forward, forward_relay, schedule
from vim2.ops.triton_launch import layout

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(params=["whole", "split", "relay"])
def form(request, monkeypatch):
    """Whether a program scans whole sequences, or chunks that run side by side, as where little else fills the GPU, or
    slices by warps that take turns, as where sequences are long."""
    monkeypatch.setattr(schedule, "programs_to_fill", lambda device: 10**9 if request.param == "split" else 0)
    monkeypatch.setattr(schedule, "MAX_WHOLE", 0)
    if request.param == "relay":
        take_turns(monkeypatch, 1, 1)
    return request.param


def take_turns(monkeypatch, groups, rounds):
    """In slices of so many rounds of the four warps."""
    monkeypatch.setattr(forward_relay, "relay_plan", lambda *sizes: (groups, 16 * groups * rounds))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_recurrence(case, form):
    if form == "relay" and (case[2] <= 8 or case[3] > 16):
        pytest.skip("the relay is for more than 8 channels, and at most 16 states")
    assert_matches_oracle(case, "triton", DEVICE)


def test_programs_that_take_several_sequences(monkeypatch):
    monkeypatch.setattr(schedule, "tiles_a_program", lambda programs, device: 2)
    assert_matches_oracle(((1, 6), BIDIRECTIONAL, 3, 4, 37, True), "triton", DEVICE)


def test_offsets_of_64_bits(monkeypatch, form):
    monkeypatch.setattr(schedule, "is_large", lambda sequences, *tensors: True)
    assert_matches_oracle(((1, 43), BIDIRECTIONAL, 3, 4, 5, True), "triton", DEVICE)


def test_strides_that_need_64_bits():
    sequences = layout(torch.empty_strided((32, 5, 4), (2**27, 4, 1), device="meta"))
    assert schedule.is_large(32, sequences) and not schedule.is_large(8, sequences)
    steps = torch.empty_strided((2, 2**15, 4), (4, 2**16, 1), device="meta")
    assert schedule.is_large(2, layout(steps)) and not schedule.is_large(2, layout(steps[:, :5]))


def test_inference_splits_no_finer_than_it_must(monkeypatch):
    monkeypatch.setattr(schedule, "programs_to_fill", lambda device: 2)  # chunks of twice the length kept otherwise
    inputs = [t.detach().to(DEVICE) for t in make_inputs((1, 800), FORWARD, dtype=torch.float32)]
    y, expected = (selective_scan(*inputs, orders=FORWARD, backend=backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_parts_are_as_few_as_a_grid_has_room_for(monkeypatch):
    """The forward scan then takes whole sequences, the backward scan parts of several chunks."""
    monkeypatch.setattr(schedule, "programs_to_fill", lambda device: 10**9)
    monkeypatch.setattr(schedule, "MAX_WHOLE", 0)
    monkeypatch.setattr(schedule, "MAX_CHUNKS", 2)
    schedule.forward_plan.cache_clear()
    monkeypatch.setattr(forward, "combine", None)
    plan, plans = backward._plan, []
    monkeypatch.setattr(backward, "_plan", lambda *sizes: plans.append(plan(*sizes)) or plans[-1])
    assert_matches_oracle(((1, 80), FORWARD, 3, 4, 1, True), "triton", DEVICE)
    assert plans and all(plan.parts == 2 for plan in plans)


def test_parts_of_a_sequence_make_three_rounds_of_programs():
    assert schedule.chunks_a_part(88, programs=1056, fill=1056) == 88  # whole sequences, where they are many
    assert schedule.chunks_a_part(88, programs=24, fill=1056) == 1
    span = schedule.chunks_a_part(1867, programs=96, fill=1056)
    assert span == 57 and -(-1867 // span) * 96 >= 3 * 1056
    assert -(-(10**6) // schedule.chunks_a_part(10**6, programs=1, fill=10**9)) <= schedule.MAX_CHUNKS


def test_short_sequences_are_not_split_however_few_they_are():
    sizes = dict(directions=4, features=192, n=16, fill=8 * 132)
    for length in (49, 196, schedule.MAX_WHOLE):
        for chunk in (length, TRITON_CHUNK):
            assert not schedule.forward_plan(1, length, chunk=chunk, **sizes).split
    assert schedule.forward_plan(1, 3136, chunk=3136, **sizes).split


def test_steps_of_one_state_are_loaded_some_at_a_time(form):
    assert_matches_oracle(((1, 41), BIDIRECTIONAL, 3, 1, 2, True), "triton", DEVICE)


@pytest.mark.parametrize(
    ("n", "spatial", "dtype"),
    [
        (1, (1, 1), torch.float32),
        (1, (3, 3), torch.bfloat16),
        (2, (5, 1), torch.float16),
        (4, (1, 7), torch.bfloat16),
        (8, (1, 9), torch.float32),
    ],
    ids=str,
)
def test_groups_of_steps_that_sequences_do_not_fill(n, spatial, dtype):
    inputs = [t.detach().to(DEVICE) for t in make_inputs(spatial, CROSS_SCAN, 8, n, dtype=dtype)]
    y, expected = (selective_scan(*inputs, orders=CROSS_SCAN, backend=backend) for backend in ("triton", "torch"))
    assert relative_error(y, expected) < BOUNDS[dtype]


@pytest.mark.parametrize("fill", [0, 10**9])
def test_chunks_are_whole_groups_of_steps(fill):
    """Steps of a group that reached into the next chunk would be walked twice."""
    for n in (1, 2, 4, 8, 16, 64):
        for features in (3, 16, 192, 384):
            for chunk in (TRITON_CHUNK, 3136):
                tile, split, steps = schedule.forward_plan(128, 3136, 4, features, n, chunk, fill)
                assert steps % (tile["GROUPS"] * tile["NL"]) == 0 or (not split and chunk == 3136)


def test_a_thread_has_all_four_states_of_its_channels(monkeypatch):
    tile = schedule.forward_plan(1, 21, 4, 64, 4, 21, 4).tile
    assert (tile["NR"], tile["NL"]) == (4, 1) and schedule.forward_plan(1, 21, 4, 64, 4, 21, 5).tile["NL"] == 4
    monkeypatch.setattr(schedule, "programs_to_fill", lambda device: 4)
    inputs = [t.detach().to(DEVICE) for t in make_inputs((3, 7), CROSS_SCAN, 64, 4, batch=1, dtype=torch.bfloat16)]
    y, expected = (selective_scan(*inputs, orders=CROSS_SCAN, backend=backend) for backend in ("triton", "torch"))
    assert relative_error(y, expected) < BOUNDS[torch.bfloat16]


def test_too_many_states():
    inputs = [t.detach().to(DEVICE) for t in make_inputs((1, 4), FORWARD, n=129, dtype=torch.float32)]
    with pytest.raises(ValueError, match="at most 128 states, got 129"):
        selective_scan(*inputs, orders=FORWARD, backend="triton")


@pytest.mark.parametrize("features", [22, 24])
@pytest.mark.parametrize(("channels", "programs"), [(4, 6), (2, 12), (1, 18)])
def test_fewer_channels_a_thread_where_programs_are_few(channels, programs, features, monkeypatch):
    monkeypatch.setattr(schedule, "programs_to_fill", lambda device: programs)
    tile, split, _ = schedule.forward_plan(3, 15, 2, features, 16, 15, programs)
    assert (tile["CR"], split) == (channels, False)
    inputs = make_inputs((3, 5), BIDIRECTIONAL, features, 16, batch=3, dtype=torch.bfloat16)
    inputs = [t.detach().to(DEVICE) for t in inputs]
    y, expected = (selective_scan(*inputs, orders=BIDIRECTIONAL, backend=backend) for backend in ("triton", "torch"))
    assert relative_error(y, expected) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize(("groups", "rounds"), [(1, 3), (2, 2)])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (((131,), FORWARD, 9, 16, 1, False), torch.float32),
        (((8, 9), BIDIRECTIONAL, 18, 11, 1, True), torch.float16),
        (((7, 11), ("columns", "columns_backward"), 24, 16, 1, False), torch.bfloat16),
    ],
    ids=str,
)
def test_warps_that_take_turns(case, dtype, groups, rounds, monkeypatch):
    take_turns(monkeypatch, groups, rounds)
    assert_matches_oracle(case, "triton", DEVICE, dtype)


@pytest.mark.parametrize("dtype_of_B", [torch.float32, torch.bfloat16], ids=str)
def test_warps_that_take_turns_with_mixed_dtypes(dtype_of_B, monkeypatch):
    take_turns(monkeypatch, 1, 2)
    inputs = [t.detach().to(DEVICE) for t in make_inputs((9, 5), BIDIRECTIONAL, 16, 16, 1, dtype=torch.float32)]
    inputs[0], inputs[3] = inputs[0].bfloat16(), inputs[3].to(dtype_of_B)  # u and B; C is float32
    y, expected = (selective_scan(*inputs, orders=BIDIRECTIONAL, backend=backend) for backend in ("triton", "torch"))
    assert relative_error(y, expected) < BOUNDS[torch.bfloat16]


def test_warps_take_turns_where_sequences_are_long_and_few():
    fill = 8 * 132
    for features, side in ((192, 256), (384, 128), (768, 64)):  # vim2_tiny at 1024²
        groups, steps = forward_relay.relay_plan(6, side**2, 4, features, 16, fill)
        assert steps % (16 * groups) == 0 and steps < side**2
        assert forward_relay.relay_plan(1, side**2, 4, features, 16, fill) is None
    assert forward_relay.relay_plan(128, 56**2, 4, 192, 16, fill) is None
    assert forward_relay.relay_plan(6, 256**2, 4, 192, 32, fill) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [((3, 23), CROSS_SCAN, 3, 5, 2, False), ((3, 5), BIDIRECTIONAL, 20, 16, 3, True)])
def test_half_precision(case, dtype):
    assert_matches_oracle(case, "triton", DEVICE, dtype)


@pytest.mark.parametrize(
    "case", [((2, 3), CROSS_SCAN, 32, n, 2, True) for n in (1, 2)] + [((7,), FORWARD, 64, 4, 1, True)]
)
def test_channels_travel_as_words(case, monkeypatch):
    """Where all lanes of a tile have channels, two or four of 16 bits are loaded and stored as one."""
    n, features, batch = case[3], case[2], case[4]
    tile = schedule.backward_tile(n, features, batch, len(case[1]), fill=10**9)
    assert features % (tile["CE"] * tile["CR"]) == 0 and batch % tile["S"] == 0 and tile["CR"] == 2
    monkeypatch.setattr(schedule, "programs_to_fill", lambda device: 10**9)
    assert_matches_oracle(case, "triton", DEVICE, torch.bfloat16)


LONG = ((1, 38), BIDIRECTIONAL[1:], 32, 16, 1, True)


@pytest.mark.parametrize(
    "case, fill",
    [
        (LONG, 0),
        (LONG, 10**9),
        (((3, 2), ("columns_backward",), 64, 8, 2, False), 0),
        (((1, 6), BIDIRECTIONAL, 16, 16, 3, True), 0),  # as in channel mixers
        (((1, 5), FORWARD, 64, 8, 2, True), 0),  # pieces of rows that 32 lanes do not come out even with
        (((1, 5), FORWARD, 16, 32, 1, True), 0),
        (((1, 5), FORWARD, 16, 64, 1, True), 0),  # fewer channels across lanes than states in each
    ],
)
def test_operands_of_a_chunk_are_fetched_at_once(case, fill, monkeypatch):
    """And its results sent back, where rows of bfloat16 are whole pieces of 16 bytes."""
    monkeypatch.setattr(schedule, "programs_to_fill", lambda device: fill)
    plan, plans = backward._plan, []
    monkeypatch.setattr(backward, "_plan", lambda *sizes: plans.append(plan(*sizes)) or plans[-1])
    assert_matches_oracle(case, "triton", DEVICE, torch.bfloat16)
    assert plans and all(plan.scan_all.options["STAGED"] for plan in plans)


def test_a_part_of_several_chunks_fetches_each_while_it_walks_another(monkeypatch):
    monkeypatch.setattr(schedule, "programs_to_fill", lambda device: 10**9)
    monkeypatch.setattr(schedule, "chunks_a_part", lambda chunks, programs, fill: 2)
    plan, plans = backward._plan, []
    monkeypatch.setattr(backward, "_plan", lambda *sizes: plans.append(plan(*sizes)) or plans[-1])
    assert_matches_oracle(((2, 55), ("columns_backward",), 32, 16, 1, True), "triton", DEVICE, torch.bfloat16)
    assert plans and all(plan.scan_all.options["STAGED"] and plan.parts == 2 for plan in plans)


def test_steps_beyond_the_end_leave_the_bias_alone():
    """Those that fill the last group of a sequence, where softplus does not take their gradient away."""
    generator = torch.Generator().manual_seed(0)
    shapes = dict(u=(1, 3, 4), delta=(1, 3, 4), A=(3, 2), B=(1, 2, 4), C=(1, 2, 4), delta_bias=(3,))
    arguments = {k: torch.rand(s, generator=generator).to(DEVICE).requires_grad_() for k, s in shapes.items()}
    grads = []
    for backend in ("triton", "torch"):
        y, last = selective_scan_fn(**{**arguments, "A": -arguments["A"]}, return_last_state=True, backend=backend)
        grads += torch.autograd.grad(y.sum() + last.sum(), arguments["delta_bias"])
    torch.testing.assert_close(*grads)


def test_threads_take_more_channels_of_the_backward_pass_where_there_are_many():
    fill = 8 * 132
    channels = [schedule.backward_tile(1, features, 128, 4, fill)["CR"] for features in (192, 384, 768, 1536)]
    assert channels == [2, 2, 4, 4] and schedule.backward_tile(16, 192, 1, 4, fill)["CR"] == 4


@pytest.mark.parametrize("batch, sequences", [(2, 2), (3, 1)])
def test_a_second_sequence_takes_lanes_without_channels(batch, sequences, monkeypatch):
    tile = schedule.backward_tile(1, 96, batch, 2, fill=10**9)
    assert tile["S"] == sequences and tile["CE"] * tile["S"] == 32
    monkeypatch.setattr(schedule, "programs_to_fill", lambda device: 10**9)
    assert_matches_oracle(((2, 3), BIDIRECTIONAL, 96, 1, batch, True), "triton", DEVICE)


@pytest.mark.parametrize("step", EXTREME_STEPS)
def test_extreme_steps(step):
    assert_finite_at_step(step, "triton", DEVICE)


@pytest.mark.parametrize("step", EXTREME_STEPS)
def test_extreme_steps_where_warps_take_turns(step, monkeypatch):
    take_turns(monkeypatch, 1, 2)
    assert_finite_at_step(step, "triton", DEVICE)


@pytest.mark.parametrize("x", SOFTPLUS_ARGUMENTS)
def test_softplus_over_its_whole_range(x):
    assert_softplus_is_right(x, "triton", DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_that_is_not_a_number_is_not_hidden(dtype):
    inputs = [t.detach().to(DEVICE) for t in make_inputs((1, 5), FORWARD, dtype=dtype)]
    inputs[1][:, :, 2] = torch.nan
    y, expected = (selective_scan(*inputs, orders=FORWARD, backend=backend) for backend in ("triton", "torch"))
    assert torch.equal(y.isnan(), expected.isnan()) and expected.isnan().any()


on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter multiplies bfloat16's bits as integers")


def assert_low_rank_agrees(rank, orders, dtype, sizes=(6, 5), softplus=True, batch=2):
    """Steps from a factor of this rank against the oracle with full ones, and every gradient."""
    features, n = sizes
    u, _, A, B, C, D, bias = make_inputs((3, 5), orders, features, n, batch, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    k = len(orders)
    factor = torch.randn(batch, 3, 5, k, rank, generator=generator).to(dtype)
    weight = torch.randn(k, features, rank, generator=generator).to(dtype)  # as the kernel multiplies, kept in float32
    if not softplus:  # steps must be positive still
        factor, weight, bias = factor.abs(), weight.abs(), bias.abs()
    variables = (u, factor, B, C, *(t.float() for t in (A, D, bias, weight)))
    variables = [t.detach().to(DEVICE).requires_grad_() for t in variables]
    u, factor, B, C, A, D, bias, weight = variables
    options = dict(orders=orders, delta_weight=weight, delta_softplus=softplus, backend="triton")
    low = selective_scan(u, factor, A, B, C, D, bias, **options)
    exact = [t.detach().cpu().double().requires_grad_() for t in variables]
    u, factor, B, C, A, D, bias, weight = exact
    full = oracle((u, torch.einsum("bhwkr,ker->bhwke", factor, weight), A, B, C, D, bias), orders, softplus)
    actual, expected = [low, *gradients(low, variables)], [full, *gradients(full, exact, low.dtype)]
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a.cpu(), e) < BOUNDS[dtype]


@pytest.mark.parametrize("rank", [2, 16, 17, 64, 65, 128])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_gradients_of_factors_of_any_rank_fit_into_shared_memory(rank, itemsize):
    """Weights and two stages of the rows that are multiplied, of which GPUs for desktops have 99 KiB."""
    from vim2.ops.scan.triton import step_size

    plan = step_size._backward(4096, 4, 2048, rank, rank, rank, 4 * rank, rank, itemsize, None)
    options = plan.launch.options
    channels, rows, room = options["BLOCK"] * options["BLOCKS"], options["ROWS"], options["R"]
    assert (channels * room + 2 * rows * (room + options["BLOCK"])) * itemsize <= 99 * 1024
    assert plan.launch.grid[0] * channels >= 2048


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=on_gpu), torch.float16], ids=str)
def test_low_rank_steps_agree_with_full_ones(dtype):
    assert_low_rank_agrees(2, CROSS_SCAN, dtype)


@pytest.mark.parametrize(
    ("sizes", "dtype"), [((16, 1), torch.bfloat16), ((6, 4), torch.float16), ((3, 1), torch.float32)], ids=str
)
def test_steps_from_one_number_agree_with_full_ones(sizes, dtype):
    """Which the scan makes of it by itself."""
    assert_low_rank_agrees(1, BIDIRECTIONAL, dtype, sizes)


def test_steps_from_one_number_in_every_form(form):
    assert_low_rank_agrees(1, ("columns_backward",), torch.float32, (9, 2), batch=1)


def test_steps_from_one_number_without_softplus():
    assert_low_rank_agrees(1, FORWARD, torch.float32, softplus=False)


def test_mamba_signature_with_last_state(form):
    assert_last_state_matches_torch("triton", DEVICE)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program after the other")
def test_two_runs_give_the_same_bits(form):
    inputs = [t.to(DEVICE).detach().requires_grad_() for t in make_inputs((3, 43), CROSS_SCAN, 20, dtype=torch.float32)]
    runs = []
    for _ in range(2):
        y = selective_scan(*inputs, orders=CROSS_SCAN, backend="triton")
        runs.append([y, *gradients(y, inputs)])
    for a, b in zip(*runs):
        assert torch.equal(a, b)


def test_without_gradients_the_result_is_the_same():
    inputs = [t.to(DEVICE) for t in make_inputs((3, 43), CROSS_SCAN, dtype=torch.float32)]
    with_gradients = selective_scan(*inputs, orders=CROSS_SCAN, backend="triton")
    with torch.no_grad():
        assert torch.equal(selective_scan(*inputs, orders=CROSS_SCAN, backend="triton"), with_gradients)


def test_operator_is_registered_correctly():
    u, delta, A, B, C, D, bias = (
        t.detach().to(DEVICE) for t in make_inputs((2, 3), BIDIRECTIONAL, dtype=torch.float32)
    )
    flat = [u.flatten(1, 2), delta.flatten(1, 2), A, B.flatten(1, 2), C.flatten(1, 2), D, bias, A.new_zeros(0)]
    options = (True, [0, 2], 2, 3, True, True, TRITON_CHUNK, "triton")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.vim2.selective_scan, (*(t.requires_grad_() for t in flat), *options), test_utils=tests
    )


def test_too_many_different_directions():
    inputs = make_inputs((2, 2), CROSS_SCAN * 5, dtype=torch.float32)
    with pytest.raises(ValueError, match="at most 15"):
        selective_scan(*(t.to(DEVICE) for t in inputs), orders=CROSS_SCAN * 5, backend="triton")


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of auto, triton, numba, mamba_ssm, torch, got 'cuda'"):
        selective_scan(*make_inputs((2, 2), FORWARD), backend="cuda")
