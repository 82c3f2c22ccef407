"""The scan with projections that the backward pass computes again, against autograd through all of it."""

import pytest
import torch
from comparison import assert_compiles, gradients, relative_error
from devices import DEVICE, needs_triton

from vim2.ops import BIDIRECTIONAL, CROSS_SCAN, projected_scan, selective_scan
from vim2.ops.scan.orders import ORDERS
from vim2.ops.scan.projected_scan import project, scan_parameters

N, R = 3, 2


def make_inputs(orders, separate, features=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    directions = len(orders)
    shapes = (
        (2, 3, 5, *((directions,) if separate else ()), features),
        (directions, R + 2 * N, features),
        (directions, features, N),
        (directions, features),
        (directions, features),
        (directions, features, R),
    )
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [t.requires_grad_() for t in tensors]


def kept_through_autograd(inputs, orders, separate):
    u, weight, A_log, D, bias, delta_weight = inputs
    weight, A = scan_parameters(weight, A_log, separate)
    projected = project(u.flatten(1, 2), weight, len(orders)).unflatten(1, u.shape[1:3])
    B, C, delta = projected.split((N, N, R), dim=-1)
    return selective_scan(u, delta, A, B, C, D, bias, orders=orders, delta_weight=delta_weight)


@pytest.mark.parametrize(("orders", "separate"), [(CROSS_SCAN, False), (BIDIRECTIONAL, True)])
def test_output_and_gradients(orders, separate):
    inputs = make_inputs(orders, separate)
    y = projected_scan(*inputs, orders, separate)
    expected = kept_through_autograd(inputs, orders, separate)
    torch.testing.assert_close(y, expected)
    for a, e in zip(gradients(y, inputs), gradients(expected, inputs)):
        torch.testing.assert_close(a, e)


@needs_triton
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("orders", "separate"), [(CROSS_SCAN, False), (BIDIRECTIONAL, True)])
def test_output_and_gradients_in_triton(orders, separate, monkeypatch):
    """Of a width that the kernels pad, with several tiles of rows a program."""
    from vim2.ops.scan.triton import step_size

    monkeypatch.setattr(step_size, "MIN_PROGRAMS", 1)
    monkeypatch.setattr(step_size, "column_block", lambda features: 128)  # and with it tiles of 16 rows
    inputs = [t.detach().to(DEVICE).requires_grad_() for t in make_inputs(orders, separate, 20, torch.float32)]
    y = projected_scan(*inputs, orders, separate, backend="triton")
    doubles = [t.detach().cpu().double().requires_grad_() for t in inputs]
    expected = kept_through_autograd(doubles, orders, separate)
    assert relative_error(y.cpu(), expected) < 2e-6
    for a, e in zip(gradients(y, inputs), gradients(expected, doubles, y.dtype)):
        assert relative_error(a.cpu(), e) < 5e-6


@needs_triton
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("length", [6, 41])  # steps that fill no group; more than one chunk of them
def test_the_gradient_of_one_number_a_step_is_made_with_those_of_the_states_weights(length, monkeypatch):
    """As in channel mixers, where all that a step reads and writes are whole pieces of 16 bytes."""
    from vim2.ops.scan.triton import backward, schedule

    monkeypatch.setattr(schedule, "programs_to_fill", lambda device: 0)
    monkeypatch.setattr(schedule, "tiles_a_program", lambda programs, device: 2)  # sequences; the last has one
    plan, plans = backward._plan, []
    monkeypatch.setattr(backward, "_plan", lambda *sizes: plans.append(plan(*sizes)) or plans[-1])
    generator = torch.Generator().manual_seed(0)
    shapes = (3, length, 2, 16), (2, 33, 16), (2, 16, 16), (2, 16), (2, 16), (2, 16, 1)
    inputs = [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes]
    doubles = [t.double().requires_grad_() for t in inputs]
    u, *parameters = (t.to(DEVICE) for t in inputs)
    inputs = [u.requires_grad_(), *(t.float().requires_grad_() for t in parameters)]
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        y = projected_scan(*inputs, BIDIRECTIONAL, True, backend="triton")
    expected = projected_scan(*doubles, BIDIRECTIONAL, True)
    assert plans == [] and relative_error(y.cpu(), expected) < 1e-2
    for a, e in zip(gradients(y, inputs), gradients(expected, doubles, y.dtype)):
        assert relative_error(a.cpu(), e) < 2e-2
    assert [plan.factor for plan in plans] == [True]


@needs_triton
def test_a_factor_is_padded_where_seven_more_numbers_of_its_memory_stand_behind_the_last():
    from vim2.ops.scan.triton.backward import _is_padded

    memory = torch.zeros(5 + 3 * 16 + 8)
    for numbers, room in ((memory[5:], True), (memory[5:-1].clone(), False)):
        assert _is_padded(numbers.as_strided((3, 1, 1, 1), (16, 16, 16, 1))) is True
        assert _is_padded(numbers.as_strided((4, 1, 1, 1), (16, 16, 16, 1))) is room


def test_autocast_computes_the_projections_again_in_the_same_type():
    inputs = make_inputs(CROSS_SCAN, False, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = projected_scan(*inputs, CROSS_SCAN)
        expected = kept_through_autograd(inputs, CROSS_SCAN, False)
    torch.testing.assert_close(y, expected)
    for a, e in zip(gradients(y, inputs), gradients(expected, inputs)):
        torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-2 * e.abs().max().item())


def test_projections_are_not_kept():
    inputs = make_inputs(BIDIRECTIONAL, True, features=2)

    def kept(scan):
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            y = scan(inputs, BIDIRECTIONAL, True)
        assert y.requires_grad
        return sum(t.untyped_storage().nbytes() for t in storages.values())

    projections = 2 * 3 * 5 * 2 * (R + 2 * N) * 8  # bytes
    assert kept(kept_through_autograd) - kept(lambda inputs, *options: projected_scan(*inputs, *options)) >= projections


@pytest.mark.parametrize(("orders", "separate"), [(CROSS_SCAN, False), (BIDIRECTIONAL, True)])
def test_compiled_training_is_one_operator_with_the_same_gradients(orders, separate):
    inputs = make_inputs(orders, separate, dtype=torch.float32)
    assert_compiles(lambda *inputs: projected_scan(*inputs, orders, separate), inputs)
    u, weight, A_log, *others = (t.detach() for t in inputs)
    matrix, A = (t.requires_grad_() for t in scan_parameters(weight, A_log, separate))
    options = (torch.bfloat16, False, [ORDERS.index(order) for order in orders], [3, 5], "torch")
    torch.library.opcheck(torch.ops.vim2.projected_scan, (u.flatten(1, 2), matrix, A, *others, *options))
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(projected_scan, fullgraph=True, backend="aot_eager")(*inputs, orders, separate)
        expected = projected_scan(*inputs, orders, separate)
    for a, e in zip(gradients(compiled, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a, e)


@needs_triton
@pytest.mark.parametrize(("orders", "separate"), [(CROSS_SCAN, False), (BIDIRECTIONAL, True)])
def test_the_operator_of_compiled_training_gives_the_same_bits_when_replayed(orders, separate):
    from vim2.ops.replay import PATIENCE

    inputs = [t.detach().to(DEVICE) for t in make_inputs(orders, separate, dtype=torch.float32)]
    u, weight, A_log, *others = inputs
    order_ids = [ORDERS.index(order) for order in orders]
    runs = []
    for scale in (*[1] * (PATIENCE + 1), 2, 1):  # noted once with other numbers, then replayed
        matrix, A = scan_parameters(weight * scale, A_log, separate, "triton")
        leaves = [t.detach().clone().requires_grad_() for t in (u.flatten(1, 2) * scale, matrix, A, *others)]
        y, _ = torch.ops.vim2.projected_scan(*leaves, None, False, order_ids, [3, 5], "triton")
        runs.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(map(torch.equal, runs[0], runs[-1]))
    assert not any(map(torch.equal, runs[0], runs[-2]))


def test_frozen_parameters_and_input():
    inputs = [t.detach() for t in make_inputs(CROSS_SCAN, False)]
    inputs[1].requires_grad_()
    (gradient,) = torch.autograd.grad(projected_scan(*inputs, CROSS_SCAN).square().sum(), inputs[1])
    assert gradient.abs().sum() > 0


@needs_triton
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("rank", [R, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("directions", "separate"), [(4, False), (1, True), (2, True)])
def test_parameters_in_triton(directions, separate, dtype, rank):
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(2, 5, *((directions,) if separate else ()), 6, generator=generator).to(DEVICE, dtype)
    shapes = ((directions, rank + 2 * N, 6), (directions, 6, N))
    inputs = [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]
    outputs = []
    for backend in ("triton", "torch"):
        weight, A = scan_parameters(*inputs, separate, backend)
        projected = project(u, weight, directions)
        assert backend == "torch" or projected.shape[-1] % 8 == 0
        assert not projected[..., rank + 2 * N :].any()
        projected = projected[..., : rank + 2 * N]
        loss = projected.square().sum() + A.square().sum()
        outputs.append((projected, A, *torch.autograd.grad(loss, inputs)))
    for actual, expected in zip(*outputs):
        assert actual.dtype == dtype
        tolerances = dict(rtol=3e-2, atol=3e-2) if dtype == torch.bfloat16 else {}  # gradients are rounded twice
        torch.testing.assert_close(actual, expected, **tolerances)


@needs_triton
@pytest.mark.usefixtures("poison")
def test_parameters_of_which_one_is_used():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, R + 2 * N, 6), (2, 6, N))
    inputs = [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_() for shape in shapes]
    for used in (0, 1):
        losses = [scan_parameters(*inputs, False, backend)[used].square().sum() for backend in ("triton", "torch")]
        actual, expected = (torch.autograd.grad(loss, inputs, allow_unused=True) for loss in losses)
        assert actual[1 - used] is None and expected[1 - used] is None
        torch.testing.assert_close(actual[used], expected[used])


@needs_triton
@pytest.mark.parametrize("separate", [False, True])
def test_parameters_are_a_sound_operator(separate):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, R + 2 * N, 6), (2, 6, N))
    inputs = [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_() for shape in shapes]
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.vim2.scan_parameters, (*inputs, separate, dtype))


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (2, 6), "u must be"),
        (1, (4, 5, 6), "weight must be"),
        (2, (4, 3, 6), "weight|A_log"),
        (3, (6,), "D must be"),
    ],
)
def test_bad_shapes(position, shape, message):
    inputs = make_inputs(CROSS_SCAN, False)
    inputs[position] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        projected_scan(*inputs, CROSS_SCAN)
