"""What operators cannot do ends in one clear error, not in a wrong result."""

import pytest
import torch
from devices import DEVICE, needs_triton
from torch.autograd import forward_ad

from vim2.mixers import MixerLayer, SelectiveTokenMixer
from vim2.ops import backend, selective_scan, selective_scan_jit_flops

DELTA, B, A = torch.randn(1, 9, 1, 3), torch.randn(1, 9, 1, 2), -torch.rand(1, 3, 2)
MIXER = SelectiveTokenMixer(3, d_state=2)


def scan(u: torch.Tensor) -> torch.Tensor:
    return selective_scan(u, DELTA, A, B, B)


def mix(u: torch.Tensor) -> torch.Tensor:
    return MIXER(u.view(1, 3, 3, 3))


functions = pytest.mark.parametrize("function", [scan, mix])


@functions
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "jacrev"])
def test_transforms_are_refused(transform, function):
    u = torch.randn(1, 9, 3)
    calls = {
        "vmap": lambda: torch.func.vmap(lambda u: function(u[None]))(u),
        "grad": lambda: torch.func.grad(lambda u: function(u).sum())(u),
        "jvp": lambda: torch.func.jvp(function, (u,), (u,)),
        "jacrev": lambda: torch.func.jacrev(function)(u),
    }
    with pytest.raises(RuntimeError, match=r"know no torch\.func transforms"):
        calls[transform]()


@needs_triton
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "jacrev", "forward mode"])
def test_kernels_before_a_scan_refuse_them_as_well(transform, monkeypatch):
    monkeypatch.setattr(backend, "DEFAULT_BACKEND", "triton")
    layer = MixerLayer(3, SelectiveTokenMixer(3, d_state=2), 1).to(DEVICE)
    u = torch.randn(1, 3, 3, 3, device=DEVICE)

    def function(u):
        return layer([u])

    def forward_mode():
        with forward_ad.dual_level():
            function(forward_ad.make_dual(u, u))

    calls = {
        "vmap": lambda: torch.func.vmap(lambda u: function(u[None]))(u),
        "grad": lambda: torch.func.grad(lambda u: function(u).sum())(u),
        "jvp": lambda: torch.func.jvp(function, (u,), (u,)),
        "jacrev": lambda: torch.func.jacrev(function)(u),
        "forward mode": forward_mode,
    }
    with pytest.raises(RuntimeError, match=r"vim2's operators (know|have) no"):
        calls[transform]()


@functions
def test_forward_mode_is_refused(function):
    u = torch.randn(1, 9, 3)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        function(forward_ad.make_dual(u, u))


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_counters_that_trace_can_count_the_scan():
    (node,) = torch.jit.trace(scan, (torch.randn(1, 9, 3),)).graph.findAllNodes("vim2::selective_scan")
    inputs, outputs = list(node.inputs()), list(node.outputs())
    assert selective_scan_jit_flops(inputs, outputs) == 9 * 3 * (9 * 2 + 2)  # steps, channels, operations of 2 states


@functions
def test_second_derivatives_are_refused(function):
    u = torch.randn(1, 9, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="leave out create_graph=True"):
        torch.autograd.grad(function(u).sum(), u, create_graph=True)
