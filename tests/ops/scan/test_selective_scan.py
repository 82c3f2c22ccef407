"""The scan against its oracle: the literal recurrence in float64, differentiated by autograd."""

import math

import pytest
import torch
from comparison import assert_all_finite, assert_compiles, gradients, relative_error
from scan_cases import NAMES, make_inputs, oracle

from vim2.ops import BIDIRECTIONAL, CROSS_SCAN, FORWARD, selective_scan
from vim2.ops.scan import reference
from vim2.ops.scan.orders import scan_positions
from vim2.ops.scan.reference import chunk_positions

MAPS = [(1, 1), (1, 7), (7, 1), (7, 13), (2, 67), (1, 131), (11, 11)]


def assert_matches_oracle(inputs, orders, tolerance, softplus=True):
    actual = selective_scan(*inputs, delta_softplus=softplus, orders=orders, backend="torch")
    expected = oracle(inputs, orders, softplus)
    assert actual.dtype == inputs[0].dtype
    assert relative_error(actual, expected) < tolerance
    for name, a, e in zip(NAMES, gradients(actual, inputs), gradients(expected, inputs)):
        assert a.isfinite().all(), name
        assert relative_error(a, e) < tolerance, name


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("orders", [FORWARD, BIDIRECTIONAL, CROSS_SCAN, ("columns", "columns")], ids="-".join)
@pytest.mark.parametrize("spatial", MAPS, ids=str)
def test_map_matches_recurrence(spatial, orders, separate):
    assert_matches_oracle(make_inputs(spatial, orders, separate=separate), orders, 1e-12)


@pytest.mark.parametrize("length", [1, 64, 65, 257])
def test_sequence_matches_recurrence(length):
    inputs = make_inputs((length,), BIDIRECTIONAL)
    inputs[1], inputs[6] = (t.detach().abs().requires_grad_() for t in (inputs[1], inputs[6]))
    assert_matches_oracle(inputs, BIDIRECTIONAL, 1e-12, softplus=False)


@pytest.mark.parametrize("n", [1, 2, 16, 64])
def test_state_sizes(n):
    assert_matches_oracle(make_inputs((5, 14), CROSS_SCAN, n=n), CROSS_SCAN, 1e-12)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)], ids=str
)
def test_dtypes(dtype, tolerance):
    """Half-precision inputs lose what rounding the outputs loses; states and decays stay in float32."""
    inputs = make_inputs((7, 13), CROSS_SCAN, dtype=dtype)
    inputs[2], inputs[5], inputs[6] = (t.detach().float().requires_grad_() for t in (inputs[2], inputs[5], inputs[6]))
    assert_matches_oracle(inputs, CROSS_SCAN, tolerance)


@pytest.mark.parametrize("step", [1e-8, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_steps(step, dtype):
    inputs = make_inputs((9, 12), CROSS_SCAN, dtype=dtype)
    inputs[1] = torch.full_like(inputs[1], step).requires_grad_()
    inputs[6] = torch.zeros_like(inputs[6]).requires_grad_()
    y = selective_scan(*inputs, delta_softplus=False, orders=CROSS_SCAN, backend="torch")
    expected = oracle(inputs, CROSS_SCAN, softplus=False)
    assert relative_error(y, expected) < (1e-5 if dtype == torch.float32 else 1e-2)
    for name, g in zip(NAMES, gradients(y, inputs)):
        assert g.isfinite().all(), name


@pytest.mark.parametrize("delta", [-1e4, 1e4])
def test_extreme_softplus_arguments(delta):
    inputs = make_inputs((3, 30), CROSS_SCAN, dtype=torch.float32)
    inputs[1] = torch.full_like(inputs[1], delta).requires_grad_()
    y = selective_scan(*inputs, orders=CROSS_SCAN, backend="torch")
    for t in (y, *gradients(y, inputs)):
        assert t.isfinite().all()


def test_zero_and_huge_inputs():
    for scale in (0.0, 1e18):
        inputs = make_inputs((3, 30), CROSS_SCAN, dtype=torch.float32)
        inputs[0] = (inputs[0].detach() * scale).requires_grad_()
        y = selective_scan(*inputs, orders=CROSS_SCAN, backend="torch")
        assert y.isfinite().all()
        assert relative_error(y, oracle(inputs, CROSS_SCAN)) < 1e-5
        for t in gradients(y, inputs):
            assert t.isfinite().all()


def test_every_output_is_written(poison):
    inputs = make_inputs((7, 13), CROSS_SCAN)
    assert_all_finite(selective_scan(*inputs, orders=CROSS_SCAN, backend="torch"), inputs)


def test_batch_slices_change_nothing(monkeypatch):
    inputs = make_inputs((7, 13), CROSS_SCAN, batch=5)
    whole = selective_scan(*inputs, orders=CROSS_SCAN, backend="torch")
    whole_grads = gradients(whole, inputs)
    monkeypatch.setattr(reference, "MAX_STATE_ELEMENTS", 2 * 91 * 4 * 3 * 5)  # two images at a time
    sliced = selective_scan(*inputs, orders=CROSS_SCAN, backend="torch")
    torch.testing.assert_close(sliced, whole)
    for a, b in zip(gradients(sliced, inputs), whole_grads):
        torch.testing.assert_close(a, b)


def test_orders_are_walks_over_the_map():
    assert scan_positions("forward", 2, 3).tolist() == [0, 1, 2, 3, 4, 5]
    assert scan_positions("columns", 2, 3).tolist() == [0, 3, 1, 4, 2, 5]
    assert scan_positions("backward", 2, 3).tolist() == [5, 4, 3, 2, 1, 0]
    assert scan_positions("columns_backward", 2, 3).tolist() == [5, 2, 4, 1, 3, 0]


@pytest.mark.parametrize("order", CROSS_SCAN)
def test_a_direction_sees_only_what_lies_behind_it(order):
    inputs = [t.detach() for t in make_inputs((6, 13), (order,), batch=1)]
    y = selective_scan(*inputs, orders=(order,), backend="torch")
    walk = scan_positions(order, 6, 13)
    changed = inputs[0].clone()
    changed.view(1, 78, -1)[:, walk[40]] += 1.0
    difference = (selective_scan(changed, *inputs[1:], orders=(order,), backend="torch") - y).abs().sum(-1).flatten()
    assert difference[walk[:40]].max() == 0
    assert difference[walk[40]] > 0 and difference[walk[41]] > 0


@pytest.mark.parametrize("length", [64, 65, 1000, 3136, 65536])
def test_steps_grow_with_the_root_of_the_length(length):
    positions, last = chunk_positions(FORWARD, 1, length)
    _, chunks, steps = positions.shape
    assert (chunks - 1) * steps + last == length
    assert max(chunks, steps) <= max(64, math.isqrt(length) + 1)


def test_operator_is_registered_correctly():
    inputs = make_inputs((3, 5), CROSS_SCAN)
    u, delta, A, B, C, D, bias = (t.detach() for t in inputs)
    flat = [u.flatten(1, 2), delta.flatten(1, 2), A, B.flatten(1, 2), C.flatten(1, 2), D, bias]
    flat = [t.requires_grad_() for t in [*flat, torch.empty(0, dtype=u.dtype)]]
    torch.library.opcheck(torch.ops.vim2.selective_scan, (*flat, True, [0, 1, 2, 3], 3, 5, True, True, 15, "torch"))


def test_compiles_without_graph_breaks():
    inputs = make_inputs((3, 5), CROSS_SCAN)

    assert_compiles(lambda *inputs: selective_scan(*inputs, orders=CROSS_SCAN, backend="torch"), inputs)


def test_autocast_keeps_states_in_float32():
    inputs = make_inputs((7, 13), CROSS_SCAN, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = selective_scan(*inputs, orders=CROSS_SCAN, backend="torch")
    assert relative_error(y, oracle(inputs, CROSS_SCAN)) < 2e-6


BAD_INPUTS = {
    "unknown order": (dict(orders=("sideways",)), "orders must name"),
    "no order": (dict(orders=()), "orders must name"),
    "too few orders": (dict(orders=("forward",)), "4 directions"),
    "u": (dict(u=torch.zeros(2, 3, 4, 7)), "u must be"),
    "delta": (dict(delta=torch.zeros(2, 3, 4)), "delta must be"),
    "A": (dict(A=torch.zeros(4, 5)), "A must be"),
    "B": (dict(B=torch.zeros(2, 3, 4, 4, 6)), "B must be"),
    "C": (dict(C=torch.zeros(2, 3, 4, 5)), "C must be"),
    "D": (dict(D=torch.zeros(3)), "D must be"),
    "bias": (dict(delta_bias=torch.zeros(3)), "delta_bias must be"),
    "no state": (dict(A=torch.zeros(4, 3, 0)), "a state or more"),
    "complex B": (dict(B=torch.zeros(2, 3, 4, 4, 5, dtype=torch.complex64)), "got torch.complex64"),
    "integer u": (dict(u=torch.zeros(2, 3, 4, 3, dtype=torch.int64)), "got torch.int64"),
    "bool delta": (dict(delta=torch.zeros(2, 3, 4, 4, 3, dtype=torch.bool)), "got torch.bool"),
    "another device": (dict(A=torch.zeros(4, 3, 5, device="meta")), "on one device, got cpu and meta"),
}


@pytest.mark.parametrize("change, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(change, message):
    arguments = dict(zip(NAMES, make_inputs((3, 4), CROSS_SCAN)), orders=CROSS_SCAN, backend="torch")
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**arguments, **change})


def test_empty_input():
    with pytest.raises(ValueError, match="nothing to scan"):
        selective_scan(*make_inputs((3, 4), CROSS_SCAN, batch=0), orders=CROSS_SCAN, backend="torch")
