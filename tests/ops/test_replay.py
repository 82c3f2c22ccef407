"""Replays do again what was noted, with other values; what cannot be noted goes on as it was."""

import gc
import importlib.util
import inspect
import sys

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICE, needs_triton
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from vim2.ops import layer_norm, norm_gate, notebook, weighted_average_norm
from vim2.ops import replay as module
from vim2.ops.conv.depthwise import _convolve
from vim2.ops.conv.directional import _convolve as _convolve_both_ways
from vim2.ops.norm.layer_norm import _layer_norm, _layer_norm_backward
from vim2.ops.norm.norm_gate import _norm_gate, _norm_gate_backward
from vim2.ops.norm.weighted_average import _weighted_average, _weighted_average_backward
from vim2.ops.replay import MAX_REPLAYS, replay
from vim2.ops.scan.projected_scan import _scan_parameters, _scan_parameters_backward

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Noted the second time that such tensors come."""
    monkeypatch.setattr(module, "PATIENCE", 1)


class Trainee:
    """The owner of the replays of a function whose calls are counted."""

    def __init__(self, function):
        self.function = function
        self.calls = 0

    def __call__(self, *tensors, settings=None):
        def function(*tensors):
            self.calls += 1
            return self.function(*tensors)

        return replay(self, settings, function, tensors)


class Owner(Trainee):
    """The same, of which no gradient is asked."""

    def __call__(self, *tensors, settings=None):
        with torch.no_grad():
            return super().__call__(*tensors, settings=settings)


def gated(x, weight, bias):
    """A linear layer whose halves gate each other: a product, views, allocations and a kernel."""
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return norm_gate(value.unflatten(-1, (4, 1, -1)), gate, backend="triton").flatten(1)


def gated_inputs(seed, rows=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, 5, 8), (32, 8), (32,)
    return [torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_replays_give_the_same_bits_for_other_values(mode, autocast):
    owner = Owner(gated)
    with mode(), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        for seed in range(4):
            inputs = gated_inputs(seed)
            inputs[1] = torch.nn.Parameter(inputs[1])
            assert torch.equal(owner(*inputs), gated(*inputs))
    assert owner.calls == 2  # as it is, and noted


def test_what_is_written_to_a_weight_is_read():
    owner = Owner(gated)
    x, weight, bias = gated_inputs(0)
    weight = torch.nn.Parameter(weight)
    for _ in range(3):
        before = owner(x, weight, bias)
    weight.data.mul_(2)  # which no counter of changes tells
    assert torch.equal(owner(x, weight, bias), gated(x, weight, bias)) and owner.calls == 2
    weight.data = gated_inputs(1)[1]
    after = owner(x, weight, bias)
    assert torch.equal(after, gated(x, weight, bias)) and owner.calls == 2
    assert not torch.equal(before, after)


def test_tensors_that_lie_otherwise_are_noted_for_themselves():
    owner = Owner(gated)
    x, weight, bias = gated_inputs(0)
    slow = weight.t().contiguous().t()
    shifted = torch.cat((bias[:1], bias))[1:]
    others = [(x, weight, bias), (x[:2], weight, bias), (x, slow, bias), (x, weight, shifted)]
    others.append([t.bfloat16() for t in (x, weight, bias)])
    for _ in range(3):
        for tensors in others:
            assert torch.equal(owner(*tensors), gated(*tensors))
    assert owner.calls == 2 * len(others)


def test_options_of_zero_are_options():
    owner = Owner(lambda x: x.var(0, correction=0))
    for _ in range(3):
        x = gated_inputs(0)[0]
        assert torch.equal(owner(x), x.var(0, correction=0))
    assert owner.calls == 2


def test_options_of_false_are_options_where_they_say_something():
    """For which there is no default, or another."""

    def solve(x, y):
        return torch.linalg.solve_triangular(x, y, upper=False, left=False)

    owner = Owner(solve)
    for seed in range(3):
        x, y = gated_inputs(seed)[1].view(-1, 4, 4)[:2] + 4 * torch.eye(4, device=DEVICE)
        assert torch.equal(owner(x.clone(), y.clone()), solve(x, y))
    assert owner.calls == 2


def test_settings_are_told_apart():
    for owner in (Owner(gated), Owner(gated)):
        for settings in (1, 2, 1, 2, 1):
            owner(*gated_inputs(0), settings=settings)
        assert owner.calls == 4


def test_views_of_what_is_given_move_with_it():
    owner = Owner(lambda x, y: torch.mm(x[1:, :2], y[:, 1:]))
    storage = torch.arange(64.0, device=DEVICE)
    x, y = torch.randn(2, 3, 4, device=DEVICE)[0], torch.ones(2, 4, device=DEVICE)
    for start in (0, 16, 32):
        x = storage[start : start + 12].view(3, 4)
        assert torch.equal(owner(x, y), torch.mm(x[1:, :2], y[:, 1:]))
    assert owner.calls == 2


def test_a_part_of_what_is_given_may_be_returned():
    owner = Owner(lambda x: x[1:])
    for seed in range(3):
        x = gated_inputs(seed)[0]
        assert torch.equal(owner(x), x[1:]) and owner(x).data_ptr() == x[1:].data_ptr()


ELSEWHERE = torch.ones(3, device=DEVICE)
NOT_REPLAYABLE = {
    "changes what it is given": lambda x, y: x.add_(y),
    "changes a part of what it is given": lambda x, y: x[1:].add_(y[1:]),
    "reads a value": lambda x, y: x * y.sum().item(),
    "takes another way for other values": lambda x, y: x if bool((y > 0).all()) else y,
    "reads what it was not given": lambda x, y: x + ELSEWHERE,
    "makes several tensors at once": lambda x, y: torch.sort(x + y).values,
    "makes a tensor of a number's": lambda x, y: x + torch.tensor(2.0, device=x.device) * y,
    "views another dtype": lambda x, y: (x + y).view(torch.int32) + 1,
}


@pytest.mark.parametrize("name", NOT_REPLAYABLE)
def test_what_cannot_be_noted_is_done_as_ever(name):
    function = NOT_REPLAYABLE[name]
    owner = Owner(function)
    for i in range(4):
        x, y = torch.arange(3.0, device=DEVICE) + i, torch.tensor([1.0, -1.0, 2.0], device=DEVICE) * (i - 1)
        expected = function(x.clone(), y.clone())
        assert torch.equal(owner(x, y), expected)
    assert owner.calls == 4


def test_tensors_that_share_memory_are_not_told_apart():
    owner = Owner(lambda x, y: x + y[:1])
    for i in range(4):
        x = torch.arange(6.0, device=DEVICE) + i
        assert torch.equal(owner(x[:3], x[3:]), x[:3] + x[3])
    assert owner.calls == 4


@pytest.mark.parametrize("kind", [Owner, Trainee])
def test_tensors_that_shared_memory_at_first_are_noted_when_they_do_not(kind):
    owner = kind(lambda x, y: x * y)
    apart = [torch.arange(4.0, device=DEVICE) + i for i in range(2)]
    for together in (True, True, True, False, False, False):
        x, y = (torch.arange(8.0, device=DEVICE).view(2, 4) if together else apart)[:2]
        x, y = x.requires_grad_(kind is Trainee), y.requires_grad_(kind is Trainee)
        result = owner(x, y)
        assert torch.equal(result, x * y)
        if kind is Trainee:
            assert torch.equal(torch.autograd.grad(result.sum(), x)[0], y)
    assert owner.calls <= 5


def test_what_is_not_needed_any_more_is_freed(monkeypatch):
    """As in a plain call: else peaks of memory would be higher."""
    alive = []

    def function(x):
        for _ in range(5):
            x = torch.mm(x, x)
        return x

    owner = Owner(function)
    x = torch.eye(4, device=DEVICE)
    owner(x), owner(x)
    multiply = torch.mm

    def counted(*tensors):
        alive.append(sum(type(t) is torch.Tensor and t.shape == (4, 4) for t in gc.get_objects()))
        return multiply(*tensors)

    (known,) = (entries for each, entries in module._replays.items() if each is owner)
    (replayed,) = known.values()
    scope = replayed.__globals__
    name = next(name for name, value in scope.items() if value is multiply)
    monkeypatch.setitem(scope, name, counted)
    owner(x)
    assert len(alive) == 5 and alive[-1] <= alive[1]


@pytest.mark.parametrize("kept", [False, True], ids=["", "of a graph that is kept"])
def test_a_backward_pass_frees_what_was_saved_as_soon_as_it_has_used_it(kept, monkeypatch):
    def function(x, weight):
        for _ in range(5):
            x = torch.mm(torch.sin(x), weight)
        return x

    owner = Trainee(function)
    inputs = [torch.eye(4, device=DEVICE).requires_grad_() for _ in range(2)]
    owner(*inputs), owner(*inputs)
    (known,) = (entries for each, entries in module._replays.items() if each is owner)
    (both,) = known.values()
    scope = inspect.getclosurevars(both.backward).nonlocals["function"].__globals__
    name = next(name for name, value in scope.items() if value is torch.mm)
    saved, alive = [], []

    def counted(*tensors):
        alive.append(sum(not memory.expired() for memory in saved))
        return torch.mm(*tensors)

    monkeypatch.setitem(scope, name, counted)
    y = owner(*inputs)
    saved += {notebook.memory_of(t) for t in y.grad_fn.saved_tensors} - set(map(notebook.memory_of, inputs))
    y.sum().backward(retain_graph=kept)
    assert len(saved) == 9  # what is multiplied, and what the sine is of
    assert len(alive) == 10
    assert all(now == len(saved) if kept else now <= len(saved) - i + 1 for i, now in enumerate(alive))


def test_replays_go_with_their_owner_and_are_bounded():
    before = len(module._replays)
    owner = Owner(lambda x: x * 2)
    for rows in range(1, 2 * MAX_REPLAYS + 2):
        owner(torch.ones(rows, device=DEVICE))
        assert len(module._replays) == before + 1 and len(module._replays[owner]) <= MAX_REPLAYS
    del owner
    assert len(module._replays) == before


def cast_by_parts(x, weight):
    return torch.einsum("ij,kj->ik", x, weight)


def partly_not_cast(x, weight):
    with torch.autocast(DEVICE, enabled=False):
        return torch.mm(x, weight)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("function", [cast_by_parts, partly_not_cast])
def test_casts_are_those_of_a_plain_call(function, mode):
    owner = Owner(function)
    with mode(), torch.autocast(DEVICE, torch.bfloat16):
        for seed in range(4):
            x, weight = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
            expected = function(x, weight)
            actual = owner(x, weight)
            assert actual.dtype == expected.dtype and torch.equal(actual, expected)


def test_what_is_noted_may_replay_others():
    inner = Owner(gated)
    outer = Owner(lambda x, weight, bias: inner(x, weight, bias) * 2)
    for seed in range(5):
        inputs = gated_inputs(seed)
        assert torch.equal(outer(*inputs), gated(*inputs) * 2)
    assert outer.calls == 2


def test_what_is_replayed_already_is_noted_as_part_of_more():
    inner = Owner(gated)
    for _ in range(3):
        inner(*gated_inputs(0))
    outer = Owner(lambda x, weight, bias: inner(x, weight, bias) * 2)
    for seed in range(4):
        inputs = gated_inputs(seed)
        assert torch.equal(outer(*inputs), gated(*inputs) * 2)
    assert outer.calls == 2 and inner.calls == 3


def test_nothing_is_noted_where_sizes_hardly_come_again(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 3)
    owner = Owner(lambda x: x * 2)
    for _ in range(3):
        for rows in range(1, MAX_REPLAYS + 2):
            owner(torch.ones(rows, device=DEVICE))
    assert owner.calls == 3 * (MAX_REPLAYS + 1)
    for _ in range(6):
        owner(torch.ones(1, device=DEVICE))
    assert owner.calls <= 3 * (MAX_REPLAYS + 1) + 4


def test_memory_that_ran_out_while_noting_is_tried_for_again(monkeypatch):
    def both_products(x, weight, bias):
        if notebook.ours.modes and not spare:
            raise torch.OutOfMemoryError("noted and plain calls do not fit together")
        return gated(x, weight, bias)

    spare = []
    owner = Trainee(both_products)
    for seed in range(5):
        inputs = [t.requires_grad_() for t in gated_inputs(seed)]
        assert_same_bits(both_passes(owner, inputs, 0), both_passes(gated, inputs, 0))
        spare += [True] * (seed == 2)
    assert owner.calls == 3 + 2 + 1  # plain ones, failed ones, noted


@pytest.mark.parametrize("kind", [Owner, Trainee])
def test_nothing_is_noted_while_it_is_captured(kind, monkeypatch):
    captured = [True]
    monkeypatch.setattr(module, "is_captured", lambda tensors: captured[0])
    owner = kind(gated)
    inputs = [t.requires_grad_() for t in gated_inputs(0)]
    for _ in range(4):
        assert torch.equal(owner(*inputs), gated(*inputs))
    assert owner.calls == 4
    captured[0] = False
    for _ in range(3):
        owner(*inputs)
    assert owner.calls == 5


@pytest.mark.skipif(DEVICE != "cuda", reason="there are no CUDA graphs")
def test_a_graph_of_what_would_be_noted_next():
    """Two weights are cast, which replays do in one launch of its own memory."""

    def function(x, weight, other):
        return F.linear(torch.sin(F.linear(x, weight)), other)

    owner = Owner(function)
    x, weight, other = torch.randn(3, 8, 8, device=DEVICE)
    x, weight, other = x.clone(), weight.clone(), other.clone()
    with torch.autocast(DEVICE, torch.bfloat16):
        owner(x, weight, other)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = owner(x, weight, other)
        x.mul_(2)
        graph.replay()
        assert torch.equal(y, function(x, weight, other))
        for _ in range(2):
            assert torch.equal(owner(x, weight, other), y)
    assert owner.calls == 3


def test_errors_are_those_of_a_plain_call():
    owner = Owner(torch.mm)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            owner(torch.ones(2, 3, device=DEVICE), torch.ones(2, 3, device=DEVICE))


def drop_and_gate(x, weight, bias):
    """`gated` of a tensor of which rows are dropped by chance, as stochastic depth does it."""
    kept = x.new_empty(x.shape[0], 1, 1).bernoulli_(0.5).div_(0.5)
    return gated(x * kept, weight, bias)


def both_passes(function, inputs, seed, grad=None, autocast=False):
    """What a function and its gradients are, and what chance gives after both passes."""
    torch.manual_seed(seed)
    inputs = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        y = function(*inputs)
    torch.autograd.backward(y, torch.cos(y.detach()) if grad is None else grad)
    return y.detach(), *(t.grad for t in inputs), torch.rand(2, device=DEVICE)


def assert_same_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (True, False, False)])
def test_replayed_training_gives_the_same_bits(wanted, autocast):
    owner = Trainee(drop_and_gate)
    for seed in range(4):
        inputs = [t.requires_grad_(wants) for t, wants in zip(gated_inputs(seed), wanted)]
        expected = both_passes(drop_and_gate, inputs, seed, autocast=autocast)
        assert_same_bits(both_passes(owner, inputs, seed, autocast=autocast), expected)
    assert owner.calls == 2  # as it is, and noted


def test_gradients_may_lie_anyhow():
    owner = Trainee(gated)
    inputs = [t.requires_grad_() for t in gated_inputs(0)]
    shape = gated(*inputs).shape
    rows = torch.randn(*shape[1:], device=DEVICE)
    turned = torch.randn(shape[::-1], device=DEVICE).permute(*reversed(range(len(shape))))
    shifted = torch.randn(rows.numel() * shape[0] + 1, device=DEVICE)[1:].view(shape)
    behind = torch.randn(2, *shape, device=DEVICE)[1]  # as of what is concatenated
    for grad in (rows.expand(shape), turned, shifted, turned, behind):
        assert_same_bits(both_passes(owner, inputs, 0, grad), both_passes(gated, inputs, 0, grad))
    assert owner.calls == 2


def trained(function=gated):
    """An owner that replays, and its inputs."""
    owner = Trainee(function)
    inputs = [t.requires_grad_() for t in gated_inputs(0)]
    owner(*inputs), owner(*inputs)
    calls = owner.calls
    owner(*inputs)
    assert owner.calls == calls
    return owner, inputs


@pytest.mark.parametrize("kind", [Owner, Trainee])
def test_results_may_be_changed_in_place(kind):
    """Though they are parts of what lines make: of a product as a matrix, here."""
    inputs = [t.requires_grad_() for t in gated_inputs(0)]
    owner = kind(F.linear)
    for _ in range(3):
        y = owner(*inputs)
    y += inputs[2]
    assert owner.calls == 2 and torch.equal(y, F.linear(*inputs) + inputs[2])


def test_a_graph_that_is_kept_may_be_walked_again():
    owner, inputs = trained()
    y = owner(*inputs)
    first, second = (torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True) for _ in range(2))
    assert_same_bits(first, second)
    (only,) = torch.autograd.grad(y, inputs[1], torch.ones_like(y))
    assert torch.equal(only, first[1])


@pytest.mark.parametrize("kind", ["average", "norm"])
def test_a_bias_that_no_gradient_depends_on_may_be_changed_between_the_passes(kind):
    """Whether the pass is replayed or not. Of what is read, a change is an error."""
    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    weight, bias = (torch.randn(8, device=DEVICE, requires_grad=True) for _ in range(2))
    scale = torch.ones(1, device=DEVICE)

    def function(x, weight, bias):
        if kind == "norm":
            return layer_norm(x, weight, bias, backend="triton")
        return weighted_average_norm([x], scale, weight, bias, backend="triton")

    inputs = (x, weight, bias)
    owner = Trainee(lambda *tensors: function(*tensors[:3]))
    expected = torch.autograd.grad(function(*inputs).sum(), inputs)
    for _ in range(4):
        y = owner(*inputs, scale)
        with torch.no_grad():
            bias.add_(1)
        for actual, other in zip(torch.autograd.grad(y.sum(), inputs), expected, strict=True):
            assert torch.equal(actual, other)
    assert owner.calls == 2
    for _ in range(2):
        y = owner(*inputs, scale)
        with torch.no_grad():
            weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class HandedOn(torch.autograd.Function):
    """Twice its input, and the input for those who come later."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return 2 * x, x

    @staticmethod
    def backward(ctx, grad, other):
        own = None if grad is None else 2 * grad
        return own if other is None else other if own is None else own + other


def test_what_is_handed_on_brings_its_later_gradients():
    """To one node, whether both results are used, or one."""
    calls = []

    def function(x, y):
        calls.append(1)
        x, passed = HandedOn.apply(x)
        return torch.mm(x, y), passed

    owner = Trainee(None)
    for uses in ("both", "both", "result", "handed on", "both"):
        x, y = (torch.randn(4, 4, device=DEVICE, requires_grad=True) for _ in range(2))
        result, passed = replay(owner, None, function, (x, y), handed_on=1)
        assert torch.equal(passed, x)
        used = {"both": (result.t(), passed.square()), "result": (result.t(),), "handed on": (passed.square(),)}[uses]
        grads = torch.autograd.grad(sum(each.sum() for each in used), (x, y), allow_unused=True)
        plain = {"both": (2 * x @ y, x.square()), "result": (2 * x @ y,), "handed on": (x.square(),)}[uses]
        expected = torch.autograd.grad(sum(each.sum() for each in plain), (x, y), allow_unused=True)
        for actual, other in zip(grads, expected, strict=True):
            assert (actual is None and other is None) or torch.allclose(actual, other)
    assert len(calls) == 2  # as it is, and noted


class Ignored(torch.autograd.Function):
    """Uses its input for nothing."""

    @staticmethod
    def forward(ctx, x, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return None, grad


def test_results_that_nobody_used_have_no_gradients():
    owner, inputs = trained()
    other = torch.ones(2, device=DEVICE, requires_grad=True)
    Ignored.apply(owner(*inputs), other).sum().backward()
    assert other.grad is not None and all(t.grad is None for t in inputs)


def test_gradients_of_replays_have_none_themselves():
    owner, inputs = trained()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(owner(*inputs).sum(), inputs, create_graph=True)


def test_a_weight_that_is_changed_between_the_passes_is_an_error():
    owner, inputs = trained()
    y = owner(*inputs)
    with torch.no_grad():
        inputs[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_result_that_is_changed_and_was_kept_is_an_error():
    """Also where it is a part of what was kept."""
    owner = Trainee(lambda x: x.exp()[:, :4])
    x = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    for _ in range(3):
        y = owner(x)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert owner.calls == 2


def test_who_watches_autograd_sees_plain_calls():
    owner, inputs = trained()
    expected = both_passes(gated, inputs, 0)
    saved = []

    def is_called():
        calls = owner.calls
        assert_same_bits(both_passes(owner, inputs, 0), expected)
        return owner.calls > calls

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        assert is_called() and saved
    with torch.autograd.detect_anomaly(check_nan=False):
        assert is_called()
    assert not is_called()
    recomputed = both_passes(lambda *tensors: checkpoint(owner, *tensors, use_reentrant=False), inputs, 0)
    assert_same_bits(recomputed, expected)


def test_hooks_on_what_is_given_see_each_gradient_once():
    owner = Trainee(gated)
    inputs = [t.requires_grad_() for t in gated_inputs(0)]
    seen = []
    inputs[1].register_hook(seen.append)
    for step in range(4):
        owner(*inputs).sum().backward()
        assert len(seen) == step + 1
    owner, inputs = trained()
    inputs[1].register_hook(lambda grad: grad * 2)
    (grad,) = torch.autograd.grad(gated(*inputs).sum(), inputs[1])
    assert torch.equal(torch.autograd.grad(owner(*inputs).sum(), inputs[1])[0], grad)


def test_what_has_no_gradient_is_replayed_under_grad_mode_too():
    owner = Trainee(gated)
    for seed in range(4):
        inputs = gated_inputs(seed)
        y = owner(*inputs)
        assert torch.equal(y, gated(*inputs)) and not y.requires_grad
    assert owner.calls == 2


class Doubled(torch.autograd.Function):
    """A gradient that writes into what the forward pass saved."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x * 2)
        return x + 1

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0].mul_(grad)


class DoubledOut(Doubled):
    @staticmethod
    def backward(ctx, grad):
        (saved,) = ctx.saved_tensors
        return torch.sum(torch.stack([saved, grad]), 0, out=saved)


@pytest.mark.parametrize("kind", [Doubled, DoubledOut])
def test_what_cannot_be_noted_of_a_backward_pass_is_done_as_ever(kind):
    def function(x):
        return kind.apply(x * 3)

    owner = Trainee(function)
    for seed in range(4):
        inputs = [gated_inputs(seed)[0].requires_grad_()]
        assert_same_bits(both_passes(owner, inputs, 0), both_passes(function, inputs, 0))
    assert owner.calls == 5  # once to find out


def test_passes_of_one_autocast_add_up_their_gradients_in_float32():
    """Where PyTorch's one copy of the weight for both passes adds them up in bfloat16."""
    _, weight, bias = gated_inputs(0)
    weight.requires_grad_()

    def gradient(function, *batches):
        with torch.autocast(DEVICE, torch.bfloat16):
            total = sum(function(x, weight, bias).square().sum() for x in batches)
        return torch.autograd.grad(total, weight)[0]

    owner = Trainee(gated)
    first, second = gated_inputs(1)[0], gated_inputs(2)[0]
    for _ in range(3):
        both = gradient(owner, first, second)
    assert owner.calls == 2  # as it is, and noted
    assert torch.equal(both, gradient(gated, first) + gradient(gated, second))


class TwoLayers(nn.Module):
    """Layers that are replayed, the second of which may be left out."""

    def __init__(self):
        super().__init__()
        self.layers = [Trainee(gated), Trainee(gated)]
        self.weights = nn.ParameterList([t for seed in range(2) for t in gated_inputs(seed)[1:]])

    def forward(self, x, number):
        return sum(layer(x, *self.weights[2 * i : 2 * i + 2]) for i, layer in enumerate(self.layers[:number]))


@pytest.fixture
def one_process():
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("find_unused", [False, True])
def test_processes_sum_the_gradients_of_replays_once_a_step(find_unused, one_process):
    """Of two batches each, of which the first is not shared (`no_sync`)."""

    def sum_of_two(state, bucket):  # the other process has the same gradients
        future = torch.futures.Future()
        future.set_result(bucket.buffer() * 2)
        return future

    model, reference = TwoLayers(), TwoLayers()
    reference.layers = [gated, gated]
    trained = DistributedDataParallel(model, find_unused_parameters=find_unused)
    trained.register_comm_hook(None, sum_of_two)
    for step in range(4):
        number = 1 if find_unused and step % 2 else 2
        batches = [gated_inputs(10 * step + i)[0] for i in range(2)]
        with trained.no_sync():
            trained(batches[0], number).square().sum().backward()
        trained(batches[1], number).square().sum().backward()
        for x in batches:
            (2 * reference(x, number).square().sum()).backward()
        for actual, expected in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)
        model.zero_grad()
        reference.zero_grad()
    assert [layer.calls for layer in model.layers] == [2, 2]  # as it is, and noted


def test_replays_take_weights_that_are_gathered_for_each_pass(one_process):
    """As FSDP2 has them: their memory is freed between the passes, and filled again before the backward one."""
    model, reference = nn.Sequential(TwoLayers()), TwoLayers()
    reference.layers = [gated, gated]
    model[0].register_forward_pre_hook(lambda module, inputs: (*inputs, 2))
    layers = model[0].layers
    mesh = init_device_mesh(DEVICE, (1,))
    fully_shard(model[0], mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, reference)]
    for step in range(4):
        x = gated_inputs(step)[0]
        model(x).square().mean().backward()
        reference(x, 2).square().mean().backward()
        for actual, expected in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(actual.grad.full_tensor(), expected.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert [layer.calls for layer in layers] == [2, 2]  # as it is, and noted


OPTIONS = (1e-5, torch.bfloat16)
OPERATORS = {
    "norm_gate": (_norm_gate, ((2, 3, 2, 4, 8), (2, 3, 16), (16,), (16,)), (*OPTIONS, True)),
    "norm_gate without a norm": (_norm_gate, ((2, 3, 16), (2, 3, 16)), (None, None, *OPTIONS, False)),
    "norm_gate, backward": (_norm_gate_backward, (*[(2, 3, 16)] * 3, (16,), (16,), (2, 2, 3)), ()),
    "weighted_average": (_weighted_average, ([(2, 5, 8)] * 3, (3,), (8,), (8,)), (*OPTIONS, True)),
    "weighted_average, backward": (_weighted_average_backward, ((2, 5, 8), [(2, 5, 8)] * 2, (2,), (8,), (2, 2, 5)), ()),
    "layer_norm": (_layer_norm, ((2, 4, 6, 8), (8,), (8,)), (*OPTIONS, 1, True)),
    "layer_norm, backward": (_layer_norm_backward, ((2, 4, 6, 8), (2, 4, 6, 8), (8,), (2, 2, 4, 6)), (1,)),
    "depthwise_conv_silu": (_convolve, ((2, 5, 7, 8), (8, 1, 3, 3), (8,)), ()),
    "directional_conv_silu": (_convolve_both_ways, ((3, 5, 8), (16, 1, 4), (16,)), ()),
    "scan_parameters": (_scan_parameters, ((2, 8, 16), (2, 16, 3)), (True, torch.bfloat16)),
    "scan_parameters, backward": (
        _scan_parameters_backward,
        ((16, 32), (2, 16, 3), (2, 16, 3)),
        (8, True, torch.float32),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_of_compiled_graphs_give_the_same_bits_when_replayed(name, monkeypatch):
    operator, shapes, options = OPERATORS[name]
    replays = []
    monkeypatch.setattr(module, "note", lambda *args, note=module.note: replays.append(note(*args)) or replays[-1])
    for seed in (0, 0, 1, 0):  # noted the second time, then replayed
        generator = torch.Generator().manual_seed(seed)
        make = lambda shape: torch.randn(shape, generator=generator).to(DEVICE)  # noqa: B023, E731
        tensors = [[make(each) for each in shape] if isinstance(shape, list) else make(shape) for shape in shapes]
        with torch.no_grad():
            results, expected = operator.registered(*tensors, *options), operator.function(*tensors, *options)
        for result, other in zip(
            *((r,) if isinstance(r, torch.Tensor) else r for r in (results, expected)), strict=True
        ):
            other = torch.empty(0) if other is None else other
            assert result.stride() == other.stride() and result.equal(other.to(result.device))
    ((entry, _),) = replays
    assert callable(entry)


PRIVATE = ("_empty_strided_cpu", "_empty_strided_cuda", "_reinterpret_tensor")


@pytest.mark.parametrize("missing", [*((name,) for name in PRIVATE), PRIVATE], ids=lambda names: " ".join(names))
def test_a_pytorch_without_what_is_its_own_affair(missing, monkeypatch):
    """Replays allocate and take parts in its public ways."""
    for name in missing:
        monkeypatch.delattr(notebook.guards, name)
    spec = importlib.util.spec_from_file_location("vim2.ops.notebook_once_more", notebook.__file__)
    once_more = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, once_more)
    spec.loader.exec_module(once_more)
    for name in ("Notebook", "noting", "share_memory"):
        monkeypatch.setattr(module, name, getattr(once_more, name))
    assert (once_more.take_part is once_more._take_part) == ("_reinterpret_tensor" in missing)
    assert len(once_more.QUICK_ALLOCATIONS) == sum(name not in missing for name in PRIVATE[:2])
    owner = Trainee(gated)
    for seed in range(4):
        inputs = [t.requires_grad_() for t in gated_inputs(seed)]
        results = []
        for run in (owner, gated):
            y = run(*inputs)
            y = y + 0
            results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
        assert_same_bits(*results)
    assert owner.calls == 2  # as it is, and noted


@pytest.fixture
def sums(monkeypatch):
    """How many sums each launch of such has made."""
    from vim2.ops.triton_sums import Sums

    made, call = [], Sums.launch

    def counted(launch, *tensors):
        made.append(len(launch.sums))
        return call(launch, *tensors)

    monkeypatch.setattr(Sums, "launch", counted)
    return made


@pytest.mark.skipif(DEVICE == "cuda", reason="replays launch compiled kernels by themselves there")
@pytest.mark.parametrize("most", [480, 5, 1])
def test_casts_and_sums_of_gradients_are_made_in_one_launch(most, sums, monkeypatch):
    """Of two inputs, two weights and a norm: one launch in the backward pass, with the bits of plain calls. More only
    where that would be given too many tensors."""
    monkeypatch.setattr(notebook, "MAX_TENSORS", most)

    def function(x, z, weight, other, norm_weight, norm_bias):
        return norm_gate(F.linear(x, weight), F.linear(z, other), norm_weight, norm_bias, backend="triton")

    owner = Trainee(function)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        shapes = (3, 8), (3, 8), (20, 8), (20, 8), (20,), (20,)
        inputs = [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_() for shape in shapes]
        expected = both_passes(function, inputs, seed, autocast=True)
        sums.clear()
        assert_same_bits(both_passes(owner, inputs, seed, autocast=True), expected)
    assert owner.calls == 2 and sums == {480: [5], 5: [2, 2, 1], 1: [1] * 5}[most]


@pytest.mark.skipif(DEVICE == "cuda", reason="replays launch compiled kernels by themselves there")
def test_casts_of_what_is_given_are_made_in_one_launch(sums):
    def function(x, weight, other):
        return F.linear(torch.sin(F.linear(x, weight.float())), other.float())

    owner = Owner(function)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x, *weights = (torch.randn(8, 8, generator=generator).to(DEVICE) for _ in range(3))
        weights = [weight.bfloat16() for weight in weights]
        expected = function(x, *weights)
        sums.clear()
        assert torch.equal(owner(x, *weights), expected)
    assert owner.calls == 2 and sums == [2]


def test_sums_wait_for_nothing_that_comes_later():
    """Sums that others read, of parts that are changed afterwards, also by a sum, and of sums, beside two that go
    together."""
    from vim2.ops.triton_sums import sum_parts

    def function(parts):
        read, changed, inner, outer, plain, early = (torch.empty(1, 1, 8, device=DEVICE) for _ in range(6))
        sum_parts(parts, read)
        twice = read * 2
        memory = parts * 3
        sum_parts(memory, changed)
        memory.zero_()
        sum_parts(parts, inner)
        sum_parts(inner.unsqueeze(0), outer)
        sum_parts(parts * 5, plain)
        memory = parts * 7
        sum_parts(memory, early)
        sum_parts(parts * 2, memory[0])
        return twice, changed, outer, plain, early, memory[:1]

    owner = Owner(function)
    for seed in range(3):
        parts = torch.randn(4, 1, 1, 8, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        for actual, factor in zip(owner(parts), (2, 3, 1, 5, 7, 2), strict=True):
            torch.testing.assert_close(actual.view(1, 1, 8), parts.sum(0) * factor)
    assert owner.calls == 2
