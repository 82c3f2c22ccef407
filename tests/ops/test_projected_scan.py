"""The scan with projections that the backward pass computes again, against autograd through all of it."""

import pytest
import torch
from comparison import gradients

from vim2.ops import BIDIRECTIONAL, CROSS_SCAN, projected_scan, selective_scan
from vim2.ops.projected_scan import project, scan_parameters

N, R = 3, 2


def make_inputs(orders, separate, features=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    lanes = len(orders)
    shapes = (
        (2, 3, 5, *((lanes,) if separate else ()), features),
        (lanes, R + 2 * N, features),
        (lanes, features, N),
        (lanes, features),
        (lanes, features),
        (lanes, features, R),
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


def test_frozen_parameters_and_input():
    inputs = [t.detach() for t in make_inputs(CROSS_SCAN, False)]
    inputs[1].requires_grad_()
    (gradient,) = torch.autograd.grad(projected_scan(*inputs, CROSS_SCAN).square().sum(), inputs[1])
    assert gradient.abs().sum() > 0
