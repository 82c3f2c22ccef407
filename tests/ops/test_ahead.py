"""Kernels that a model will launch are compiled before it launches any, and nothing else comes of that."""

import contextlib

import pytest
import timm
import torch
from devices import DEVICE, needs_triton
from torch.utils.module_tracker import ModuleTracker

from vim2.ops import modules, norm_gate
from vim2.ops.ahead import compile_ahead

pytestmark = needs_triton


@pytest.fixture
def compiled(monkeypatch):
    """The names of the kernels that are compiled; none may be launched."""
    from vim2.ops import triton_launch
    from vim2.ops.norm.triton import norm_gate as kernels

    launches = kernels._forward, kernels._backward
    names = []

    class Kernel:
        def __init__(self, kernel):
            self.kernel = kernel

        def run(self, *arguments, grid, warmup, **options):
            assert warmup
            names.append(self.kernel.fn.__name__)

    def refuse(self, *tensors):
        raise AssertionError("launched")

    def make(self, kernel, *arguments, real=triton_launch.Launch.__init__, **options):
        real(self, kernel, *arguments, **options)
        self.kernel = Kernel(kernel)

    for remembered in launches:
        remembered.cache_clear()
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    monkeypatch.setattr(triton_launch.Launch, "__init__", make)
    monkeypatch.setattr(triton_launch.Launch, "launch", refuse)
    yield names
    for remembered in launches:
        remembered.cache_clear()


def gate(y, scale, width):
    y = torch.nn.functional.dropout(y * scale, 0.5)
    return norm_gate(y, y, torch.ones(width, device=DEVICE), torch.zeros(width, device=DEVICE), backend="triton")


def test_kernels_of_both_passes_and_nothing_else(compiled):
    y, scale = torch.randn(5, 19, device=DEVICE), torch.nn.Parameter(torch.ones(19, device=DEVICE))
    torch.manual_seed(3)
    compile_ahead(lambda y, scale: gate(y, scale, 19), (y, scale))
    assert compiled == ["_norm_gate_kernel", "_norm_gate_backward_kernel", "_sums_kernel"]
    assert scale.grad is None and not scale._backward_hooks
    drawn = torch.rand(3, device=DEVICE)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3, device=DEVICE))


def test_without_gradients(compiled):
    with torch.no_grad():
        compile_ahead(lambda y: gate(y, 1.0, 23), (torch.randn(5, 23, device=DEVICE, requires_grad=True),))
    assert compiled == ["_norm_gate_kernel"]


def test_what_fails_is_left_to_fail_by_itself(compiled):
    def fail(y):
        raise ValueError("no")

    compile_ahead(fail, (torch.randn(3, device=DEVICE),))
    assert compiled == []


def test_a_model_asks_once_for_training_and_once_for_inference(monkeypatch):
    asked = []
    monkeypatch.setattr(modules, "compile_ahead", lambda function, tensors: asked.append(len(tensors)))
    monkeypatch.setattr(modules, "resolve_backend", lambda *tensors, **options: "triton")
    monkeypatch.setattr(modules, "_is_replayable", lambda features: False)
    model = timm.create_model("test_vim2")
    for _ in range(2):
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                model.forward_stem(torch.zeros(1, 3, 32, 32))
    assert asked == [1 + len(list(model.parameters()))] * 2


@pytest.mark.parametrize("what", ["a hook", "a batch norm's statistics", "a tracker of all modules"])
def test_a_model_that_would_notice_is_not_called_more_often(what, monkeypatch):
    monkeypatch.setattr(modules, "compile_ahead", lambda *arguments: pytest.fail("asked"))
    monkeypatch.setattr(modules, "resolve_backend", lambda *tensors, **options: "triton")
    model = timm.create_model("test_vim2")
    if what == "a hook":
        model.patch_embed.register_forward_hook(lambda *arguments: None)
    elif what == "a batch norm's statistics":
        model.head.norm = torch.nn.BatchNorm1d(8)
    with contextlib.ExitStack() as stack:
        if what == "a tracker of all modules":  # which mixers pass over here
            stack.enter_context(torch.autograd.graph.save_on_cpu())
            stack.enter_context(ModuleTracker())
        model.forward_stem(torch.zeros(1, 3, 32, 32))


def test_older_triton_compiles_where_it_launches(compiled, monkeypatch):
    monkeypatch.delattr("triton.AsyncCompileMode")
    y, scale = torch.randn(5, 19, device=DEVICE), torch.nn.Parameter(torch.ones(19, device=DEVICE))
    compile_ahead(lambda y, scale: gate(y, scale, 19), (y, scale))
    assert compiled == []
